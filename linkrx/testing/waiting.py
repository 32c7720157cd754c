"""Functions with which checks and tests wait for other threads and for the kernel: without sleeping, and with a deadline."""

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

PATIENCE = 30.0  # seconds until a wait fails
TURN_MOST = 3.0  # seconds that one turn of a wait counts
FLOOD_MOST = 5_000_000  # frames of one flood

# Errors of send(2) while a queue is full or the link is down.
_REFUSED = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.EPIPE})


@contextmanager
def watched(rx: Dispatcher) -> Iterator[Dispatcher]:
    """A stop() ends a receiving call that does not return. The check then misses its packets."""
    stop = threading.Timer(PATIENCE, rx.stop)
    stop.start()
    try:
        yield rx
    finally:
        stop.cancel()
        stop.join()


def collect(dispatcher: Dispatcher, packets: int) -> list[Packet]:
    """Receive this number of packets, or fewer if no more come in PATIENCE seconds."""
    found: list[Packet] = []
    while len(found) < packets:
        try:
            found.append(dispatcher.recv(PATIENCE))
        except TimeoutError:
            break
    return found


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run `work` in a thread, and join it at the end. Raises the exception of `work`."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)  # a thread that hangs must not block the exit
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive(), f"the thread did not return in {PATIENCE:g} s"
    if failures:
        raise failures[0]


def patiently(condition: Callable[[], object]) -> Iterator[None]:
    """Yield until the condition holds. Raises AssertionError if it does not hold within PATIENCE seconds.

    A turn counts as TURN_MOST seconds at most, so that no test fails because a virtual machine was paused to save or move it.
    """
    left, before = PATIENCE, time.monotonic()
    while not condition():
        now = time.monotonic()
        left -= min(now - before, TURN_MOST)
        before = now
        assert left > 0, f"the condition did not hold within {PATIENCE:g} s"
        yield


def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds, and give other threads the processor. Raises as `patiently` does."""
    for _ in patiently(condition):
        os.sched_yield()


def asleep(rx: Dispatcher) -> bool:
    """Whether its thread has waited."""
    return rx.stats().waits > 0


@contextmanager
def flooded(rig: Rig, size: int = 100) -> Iterator[list[int]]:
    """Send frames of `size` bytes from a thread, as fast as it can. Gives a list with the number of frames sent so far."""
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
