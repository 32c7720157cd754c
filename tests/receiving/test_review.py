"""What hostile reviewers found: threads that close, timeouts, backends that report nonsense, exceptions of handlers, junk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx
from linkrx import registry
from linkrx.backend import Backend, ReceiveConfig
from linkrx.memory.columns import Descriptors
from linkrx.packets import Owner
from linkrx.sources.capabilities import Capabilities

# Closing.


def test_threads_that_close_at_once() -> None:
    """Each close() returns when all is released, however many threads call it while another receives."""
    for _ in range(200):
        with pair() as (receiver, _):
            rx = linkrx.open(receiver, lambda *_: None)
            together = threading.Barrier(3)
            released: list[bool] = []

            def close(
                rx: linkrx.Dispatcher = rx,
                together: threading.Barrier = together,
                released: list[bool] = released,
            ) -> None:
                together.wait()
                rx.close()
                released.append(rx._released)

            def dispatch(rx: linkrx.Dispatcher = rx, together: threading.Barrier = together) -> None:
                together.wait()
                try:
                    rx.dispatch(0)
                except (linkrx.Closed, linkrx.Busy):
                    return

            threads = [threading.Thread(target=step, daemon=True) for step in (close, close, dispatch)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert released == [True, True]


def test_a_dispatcher_that_was_never_opened() -> None:
    """Whatever is asked of it raises, or answers as one that has nothing."""
    made = linkrx.Dispatcher.__new__(linkrx.Dispatcher)
    for name in dir(type(made)):
        if name.startswith("__"):
            continue
        try:
            member = getattr(made, name)
            if callable(member):
                member()
        except (TypeError, ValueError, AttributeError, linkrx.LinkrxError):
            continue


# Timeouts.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timeout", [1e-9, 5e-324])
def test_a_packet_that_is_there_comes_in_no_time(backend: str, timeout: float) -> None:
    """However short the timeout and however often the source was empty before, a packet that waits is received."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend) as rx:
        for number in range(50):
            for _ in range(number):
                with pytest.raises(TimeoutError):
                    rx.recv(0.000_01)
            sender.send(frame(number))
            assert number_of(rx.recv(timeout)) == number


@pytest.mark.parametrize("backend", BACKENDS)
def test_latency_waits_no_longer_than_the_timeout(backend: str) -> None:
    """A packet that comes while recv waits is returned when its time is up, though `latency` would let it wait for ever."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e9) as rx:
        for number in range(3):
            later = threading.Timer(0.02, sender.send, (frame(number),))
            later.start()
            assert number_of(rx.recv(0.2)) == number
            later.join()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_and_a_handler_end_what_latency_holds_back(backend: str) -> None:
    """However long `latency` is: stop() ends the wait, and so does what a signal handler raises."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, lambda *_: None, backend=backend, latency=1e9) as rx,
    ):
        for _ in range(60):  # until it waits first
            rx.dispatch(0.000_01)
        sender.send(frame(0))
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                for _ in range(2):
                    rx.dispatch()
                    sender.send(frame(1))
        finally:
            signal.signal(signal.SIGALRM, before)
        later = threading.Timer(0.1, rx.stop)
        later.start()
        assert rx.run() is linkrx.End.STOPPED
        later.join()


# Backends that report nonsense.


class Nonsense(Backend):
    """Reports one packet, with a number that is wrong."""

    name = "nonsense"
    rank = 1
    wrong = ""

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Nothing."""
        return None

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._descriptors = descriptors

    def fill(self, arena: Owner, room: int) -> int:
        """Describe it."""
        report, columns, wrong = self._descriptors.report, self._descriptors.columns, self.wrong
        columns.starts[0] = 0xFFFFFF00 if wrong == "start" else 0
        columns.lengths[0] = {"length": 0xFFFFFF00, "beyond": 72}.get(wrong, 60)
        report.receives = 1
        report.end = {"end": 1 << 31, "alignment": 62}.get(wrong, 64)
        report.count = {"count": self._descriptors.rows + 1, "negative": 0xFFFFFFFF}.get(wrong, 1)
        return int(report.count)


@pytest.mark.skipif(len(BACKENDS) < 3, reason="the C core was not built: plain Python has no memory to guard")
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("wrong", ["start", "length", "beyond", "end", "alignment", "count", "negative"])
def test_nonsense_is_refused_each_time(
    wrong: str, kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that point out of the memory are a ValueError, the second time as well; and stop() and close() work."""
    classes = (*registry.classes(), Nonsense)
    monkeypatch.setattr(registry, "classes", lambda: classes)
    monkeypatch.setattr(Nonsense, "wrong", wrong)
    with pair(kind) as (receiver, _):
        rx = linkrx.open(receiver, lambda *_: None, backend="nonsense")
        for _ in range(3):
            with pytest.raises((ValueError, OverflowError)):
                rx.dispatch(0)
        rx.stop()
        rx.close()
        assert rx._released


# Exceptions of signal handlers.


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "os_readv"])
@pytest.mark.parametrize("polled", [False, True])
def test_no_packet_is_lost_on_the_way_out(backend: str, polled: bool) -> None:
    """Whatever handlers raise while packets are iterated over, each comes once, also where somebody polls fileno()."""

    class Interrupt(Exception):
        pass

    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupt

    got: list[linkrx.Packet] = []
    sent = raised = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pair(socket.SOCK_SEQPACKET) as (receiver, sender), linkrx.open(receiver, backend=backend) as rx:
            if polled:
                rx.fileno()
            for _ in range(500):
                for _ in range(4):
                    sender.send(frame(sent))
                    sent += 1
                turns = 0
                while len(got) < sent and turns < 10_000:
                    turns += 1
                    try:
                        armed = True
                        # At first at once, and then later, so that each step is interrupted and none for ever.
                        signal.setitimer(signal.ITIMER_REAL, 0.000_005 * min(turns, 100))
                        # In C: nothing between the receiver and the list looks at signals.
                        got.extend(islice(rx, 1))
                        armed = False
                    except Interrupt:
                        raised += 1
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if rx._left == 0 and len(got) < sent and not _is_readable(receiver):
                        break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [number_of(packet) for packet in got] == list(range(sent))
    assert raised


def _is_readable(receiver: socket.socket) -> bool:
    try:
        return bool(receiver.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


# Nothing but junk.

# UDP_SEGMENT: one call sends 64 datagrams of one byte, faster than anybody reads them.
FLOOD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
    flood.connect(("127.0.0.1", int(sys.argv[1])))
    flood.setsockopt(socket.IPPROTO_UDP, 103, 1)
    print("ready", flush=True)
    while True:
        flood.send(bytes(64))
"""


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "os_readv"])
@pytest.mark.parametrize("how", ["recv", "next", "run", "batches"])
def test_handlers_run_while_only_junk_comes(backend: str, how: str) -> None:
    """What a handler raises comes out, and other threads run, while runts come as fast as they are read."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        linkrx.open(receiver, print, backend=backend) as rx,
    ):
        receiver.bind(("127.0.0.1", 0))
        calls: dict[str, Callable[[], object]] = {
            "recv": rx.recv,
            "next": lambda: next(rx),
            "run": rx.run,
            "batches": lambda: next(iter(rx.batches())),
        }
        before = signal.signal(signal.SIGALRM, interrupt)
        flood = subprocess.Popen(
            [sys.executable, "-c", FLOOD, str(receiver.getsockname()[1])], stdout=subprocess.PIPE
        )
        try:
            assert flood.stdout is not None
            flood.stdout.readline()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Interrupt):
                calls[how]()
            assert rx.stats().runts > 0
        finally:
            signal.signal(signal.SIGALRM, before)
            flood.kill()
            flood.wait()
            assert flood.stdout is not None
            flood.stdout.close()


# Forks.


def test_a_child_that_closes_inside_deliver_leaves_other_files_alone(tmp_path: Path) -> None:
    """A child forked inside deliver closes its dispatcher: files that get the numbers of what it closed are not written to."""
    forked = False
    files: list[int] = []
    with pair() as (receiver, sender):

        def deliver(*_: object) -> None:
            nonlocal forked
            forked = os.fork() == 0
            if forked:
                rx.close()
                files.extend(os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(8))

        rx = linkrx.open(receiver, deliver)
        rx.fileno()
        sender.send(frame(0))
        try:
            rx.dispatch()
        finally:
            if forked:
                os._exit(any(os.fstat(file).st_size for file in files))
        _, status = os.wait()
        rx.close()
    assert os.waitstatus_to_exitcode(status) == 0
