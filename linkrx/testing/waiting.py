"""How checks and tests wait for what other threads and the kernel do: never by sleeping, never for ever."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.testing.rigs import Rig

PATIENCE = 30.0  # seconds until what should have happened never will
FLOOD_MOST = 5_000_000  # frames of one flood

# What a sender is told while a queue is full or the link is down.
_REFUSED = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.EPIPE})


def collect(dispatcher: Dispatcher, packets: int) -> list[Packet]:
    """That many packets, or fewer if no more come."""
    found: list[Packet] = []
    while len(found) < packets:
        try:
            found.append(dispatcher.recv(PATIENCE))
        except TimeoutError:
            break
    return found


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """`work` in a thread, joined at the end; what it raises is raised here."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(
        target=guarded, daemon=True
    )  # one that hangs must not keep the program from ending
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive(), "the thread never came back"
    if failures:
        raise failures[0]


def patiently(condition: Callable[[], object]) -> Iterator[None]:
    """One turn after the other until the condition holds; fails when it does not in PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        yield


def until(condition: Callable[[], object]) -> None:
    """Give other threads the processor until something they do is seen."""
    for _ in patiently(condition):
        os.sched_yield()


def asleep(rx: Dispatcher) -> bool:
    """Whether its thread has gone into a wait."""
    return rx.stats().waits > 0


@contextmanager
def flooded(rig: Rig, size: int = 100) -> Iterator[list[int]]:
    """Frames of `size` bytes as fast as a thread can send them; the list holds how many were taken so far."""
    sent = [0]
    over = threading.Event()

    def flood() -> None:
        while not over.is_set() and sent[0] < FLOOD_MOST:
            try:
                rig.send(rig.frame(size, sent[0]))
            except OSError as error:
                if error.errno not in _REFUSED and not isinstance(error, BlockingIOError):
                    raise
                os.sched_yield()
            else:
                sent[0] += 1

    with running(flood):
        try:
            yield sent
        finally:
            over.set()


def number_of(rig: Rig, packet: Packet) -> int:
    """The mark of a frame that `Rig.frame` made."""
    return int.from_bytes(packet.data[0 if rig.ethernet else 1 :][:4], "big")
