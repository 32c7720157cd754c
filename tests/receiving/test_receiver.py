"""The receiver: waits, adaptive reading, threads, signals and ends."""

from __future__ import annotations

import errno
import inspect
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from support.pairs import BACKENDS, Pair, frame, number_of, pair
from support.received import needs_core
from support.run import that_take

import linkrx
from linkrx import _core
from linkrx.kernel import messages
from linkrx.testing import rigs
from linkrx.testing.stops import alarmed, ignore
from linkrx.testing.waiting import PATIENCE, asleep, running, until
from linkrx.testing.waiting import number_of as marked


@pytest.fixture
def ends() -> Iterator[Pair]:
    """A datagram pair."""
    with pair() as found:
        yield found


def suppressed(error: type[Exception], call: Callable[..., object], *arguments: object) -> None:
    """Call a function and ignore one type of error."""
    with suppress(error):
        call(*arguments)


# No other process can make a call block.


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [(rigs.pipe_nonblocking, backend) for backend in that_take("pipe")]
    + [(rigs.tap, backend) for backend in that_take("tap")],
)
def test_another_owner_makes_the_open_file_block(kind: rigs.MakeRig, backend: str) -> None:
    """If another owner of the open file clears O_NONBLOCK, no call blocks, with an empty queue or after the last packet."""
    with kind() as rig, rig.open(backend, ignore) as rx:
        fd = rig.source if isinstance(rig.source, int) else rig.source.fileno()  # type: ignore[union-attr]
        assert not os.get_blocking(fd)
        os.set_blocking(fd, True)
        assert rx.drain() == 0
        assert rx.dispatch(0.001) is True
        for count in (1, 3, 12):
            for number in range(count):
                rig.send(rig.frame(100, number))
            delivered = 0
            while delivered < count:
                delivered += rx.drain()
            assert delivered == count
            assert rx.drain() == 0
        assert rx.dispatch(0.001) is True
        assert rx.end is None
        assert os.get_blocking(fd)


# Other threads.


@pytest.mark.skipif(_core.types is None, reason=f"what Python reads gives the lock up: {_core.reason}")
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "os_readv"])
def test_a_lone_packet_beside_a_busy_thread(backend: str, ends: Pair) -> None:
    """Reads of packets that come one by one keep the GIL, so a thread that waits for it does not run meanwhile."""
    over = False
    turns = 0

    def spin() -> None:
        nonlocal turns
        while not over:
            turns += 1
            for _ in range(10_000):
                pass
            time.sleep(0)

    interval = sys.getswitchinterval()
    with linkrx.open(ends[0], ignore, backend=backend) as rx:
        for number in range(20):  # until the receiver has learned that packets come one by one
            ends[1].send(frame(number))
            assert number_of(rx.recv(0)) == number
            with pytest.raises(TimeoutError):
                rx.recv(0)
        for number in range(10):
            ends[1].send(frame(number))
        with running(spin):
            try:
                sys.setswitchinterval(1000)  # from the next switch on, no thread is forced to release the GIL
                seen = turns
                until(lambda: turns > seen + 1)
                before = turns
                got = [rx.recv(0) for _ in range(10)]
                after = turns
            finally:
                over = True
                sys.setswitchinterval(interval)
        assert after == before
        assert list(map(number_of, got)) == list(range(10))


def test_close_from_another_thread(ends: Pair) -> None:
    """close() from another thread ends a waiting call, returns after it, and releases everything. A second close() has no effect."""
    before = sorted(os.listdir("/proc/self/fd"))
    for way in (
        lambda rx: rx.run(),
        lambda rx: rx.dispatch(),
        lambda rx: list(rx),
        lambda rx: list(rx.batches()),
    ):
        rx = linkrx.open(ends[0], ignore)
        with running(lambda way=way, rx=rx: suppressed(linkrx.Closed, way, rx)):  # type: ignore[misc]
            until(lambda rx=rx: asleep(rx))  # type: ignore[misc]
            rx.close()
            assert rx._released
            rx.close()
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_close_from_two_threads_at_once(ends: Pair) -> None:
    """Two close() calls at once both return after the receiving thread has left."""
    rx = linkrx.open(ends[0], ignore)
    with running(lambda: suppressed(linkrx.Closed, rx.run)):
        until(lambda: asleep(rx))
        with running(rx.close), running(rx.close):
            pass
        assert rx._released


def test_close_waits_for_deliver(ends: Pair) -> None:
    """close() returns after the deliver that runs in another thread, and no other deliver follows."""
    started, may_go_on = threading.Event(), threading.Event()
    events: list[str] = []

    def deliver(*_: object) -> None:
        started.set()
        assert may_go_on.wait(PATIENCE)
        events.append("delivered")

    rx = linkrx.open(ends[0], deliver)

    def close() -> None:
        rx.close()
        events.append("closed")

    for number in range(3):
        ends[1].send(frame(number))
    with running(lambda: suppressed(linkrx.Closed, rx.run)):
        assert started.wait(PATIENCE)
        with running(close):
            until(lambda: rx._closed)
            assert events == []
            may_go_on.set()
    assert events == ["delivered", "closed"]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("ring", [False, pytest.param(True, marks=needs_core)])
def test_stats_beside_close(ring: bool, ends: Pair) -> None:
    """stats() in one thread during close() in another returns the counters or raises Closed."""
    for _ in range(20 if ring else 200):
        rx = (
            linkrx.open("lo", backend="packet_mmap", receive_buffer=1 << 18) if ring else linkrx.open(ends[0])
        )

        def ask(rx: linkrx.Dispatcher = rx) -> None:
            while True:
                rx.stats()

        with running(lambda ask=ask: suppressed(linkrx.Closed, ask)):  # type: ignore[misc]
            rx.close()


# Signals.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["run", "recv", "next"])
def test_ctrl_c_under_a_load_that_yields_nothing(backend: str, way: str, ends: Pair) -> None:
    """An exception of a signal handler propagates out of a call that never waits: with endless runts, or with a deliver in C."""

    class Interrupt(Exception):
        pass

    over = threading.Event()
    payload = frame(1) if way == "run" else b"runt"

    def flood() -> None:
        while not over.is_set():
            try:
                ends[1].send(payload, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()

    caught = False

    def interrupt(frame: FrameType | None) -> None:
        # Not in callbacks of the collector, and not while a generator is closed: both ignore exceptions.
        ours = frame and frame.f_globals.get("__name__", "").startswith(("linkrx", "test_"))
        if ours and not caught and not frame.f_code.co_flags & inspect.CO_GENERATOR:  # type: ignore[union-attr]
            raise Interrupt

    # A deliver in C, which runs no signal handler.
    with linkrx.open(ends[0], "".format, backend=backend) as rx:
        calls: dict[str, Callable[[], object]] = {"run": rx.run, "recv": rx.recv, "next": lambda: next(rx)}
        with running(flood):
            try:
                with alarmed(interrupt, first=0.05, interval=0.2):
                    try:
                        calls[way]()
                    except Interrupt:
                        caught = True
            finally:
                over.set()
        assert caught
        assert rx.end is None


# Adaptive reading.


@pytest.mark.skipif(_core.types is None, reason=f"plain Python asks for all each time: {_core.reason}")
def test_packets_that_come_one_by_one(ends: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet that comes during a wait takes one wait and, after the receiver has adapted, little more than one read."""
    reads = 0
    recvmsg = messages._libc.recvmsg

    def counted(*arguments: object) -> int:
        nonlocal reads
        reads += 1
        length: int = recvmsg(*arguments)
        return length

    monkeypatch.setattr(messages, "_libc", SimpleNamespace(recvmsg=counted))
    with linkrx.open(ends[0], backend="os_readv") as rx:

        def send() -> None:
            for number in range(300):
                until(lambda number=number: rx.stats().waits > number)  # type: ignore[misc]
                ends[1].send(frame(number))

        with running(send):
            for number in range(300):
                assert number_of(rx.recv(PATIENCE)) == number
                if number == 99:
                    reads = 0
        assert rx.stats().waits == 300
        assert 200 <= reads < 200 * 1.2


@pytest.mark.skipif(_core.types is None, reason=f"plain Python asks for all each time: {_core.reason}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backlog_is_found(backend: str, ends: Pair) -> None:
    """After packets that came one by one, a full queue is received in large batches after at most 31 packets."""
    sizes: list[int] = []
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with linkrx.open(ends[0], ignore, backend=backend) as rx:
        for number in range(100):
            ends[1].send(frame(number))
            assert rx.dispatch(PATIENCE)
        for number in range(200):
            ends[1].send(frame(number))
        before = rx.stats().packets
        while rx.stats().packets < 300:
            assert rx.dispatch(PATIENCE)
            sizes.append(rx.stats().packets - before)
            before = rx.stats().packets
        large = next(place for place, size in enumerate(sizes) if size > 1)
        assert sum(sizes[:large]) <= 32
        assert max(sizes) >= 16
        assert sum(sizes) == 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_latency_holds_back(backend: str, ends: Pair) -> None:
    """With latency=, a wait continues after the first packet, and later packets come in the same batch. A timeout of 0 does not wait."""
    got: list[int] = []
    with linkrx.open(
        ends[0], lambda *call: got.append(number_of(call[3])), backend=backend, latency=0.2
    ) as rx:

        def send() -> None:
            until(lambda: asleep(rx))
            for number in range(5):
                ends[1].send(frame(number))

        with running(send):
            assert rx.dispatch(PATIENCE)
            while len(got) < 5:
                assert rx.dispatch(0)
        assert rx.stats().waits == 1
        ends[1].send(frame(5))
        assert rx.drain() == 1
        assert rx.stats().waits == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_latency_is_waited_for_once(backend: str, ends: Pair) -> None:
    """After a wait with latency=, all packets of the queue come, also after lone packets, and those after a full batch come at once."""
    got: list[int] = []
    with linkrx.open(
        ends[0], lambda *call: got.append(number_of(call[3])), backend=backend, batch_size=4, latency=0.02
    ) as rx:
        for number in range(20):
            ends[1].send(frame(number))
            assert rx.drain() == 1
        for _ in range(20):
            assert rx.dispatch(0.001)  # in vain, so that the next calls wait before they read
        before = rx.stats()
        for number in range(20, 27):
            ends[1].send(frame(number))
        assert rx.dispatch(PATIENCE)
        assert rx.dispatch(PATIENCE)
        assert got == list(range(27))
        assert rx.stats().waits - before.waits <= 1


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("tap"))
def test_latency_holds_back_on_a_tap(backend: str) -> None:
    """With latency= on a TAP queue, packets that come while one is held back are delivered with it, after one wait."""
    got: list[int] = []
    with (
        rigs.tap() as rig,
        rig.open(backend, lambda *call: got.append(marked(rig, call[3])), latency=0.2) as rx,
    ):

        def send() -> None:
            until(lambda: asleep(rx))
            for number in range(5):
                rig.send(rig.frame(60, number))

        with running(send):
            assert rx.dispatch(PATIENCE)
            while len(got) < 5:
                assert rx.dispatch(0)
        assert got == list(range(5))
        assert rx.stats().waits == 1


@pytest.mark.parametrize("skipped", [1, 3, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_waiting_a_packet_is_found_behind_runts(backend: str, skipped: int, ends: Pair) -> None:
    """A call with timeout 0 skips runts in front of a packet, at most as many as a batch has rows."""
    got: list[int] = []
    rows = 4
    with linkrx.open(
        ends[0], lambda *call: got.append(number_of(call[3])), backend=backend, batch_size=rows
    ) as rx:

        def pull() -> None:
            with suppress(TimeoutError):
                got.append(number_of(rx.recv(0)))

        def one_batch() -> None:
            for batch in rx.batches(0):
                got.extend(map(number_of, batch))
                break

        for number, call in enumerate((pull, rx.drain, lambda: rx.dispatch(0), one_batch)):
            for _ in range(skipped):
                ends[1].send(b"runt")
            ends[1].send(frame(number))
            calls = 0
            while number not in got:
                before = rx.stats().runts
                call()
                calls += 1
                assert rx.stats().runts - before < 2 * rows
                assert calls <= skipped
            assert calls == 1 or skipped > rows
        assert got == [0, 1, 2, 3]
        assert rx.stats().runts == 4 * skipped


# After the end.


def test_fileno_after_the_end(ends: Pair) -> None:
    """After the end fileno() is readable until a call has reported it, also if fileno() is first called after the end."""
    for early in (True, False):
        with linkrx.open(ends[0], ignore) as rx, selectors.DefaultSelector() as selector:
            if early:
                rx.fileno()
            rx.stop()
            selector.register(rx, selectors.EVENT_READ)
            assert selector.select(PATIENCE)
            assert rx.drain() == 0
            assert rx.end is linkrx.End.STOPPED
            assert not selector.select(0)
            rx.stop()
            assert rx.dispatch() is False
            assert not selector.select(0)
            selector.unregister(rx)
            selector.register(rx, selectors.EVENT_READ)
            assert not selector.select(0)
            selector.unregister(rx)
    with selectors.DefaultSelector() as selector, pytest.raises(ValueError, match="closed"):
        selector.register(rx, selectors.EVENT_READ)


def test_recv_behind_the_end() -> None:
    """recv() after the end raises Ended: an OSError with the errno of a socket, an EOFError, and a LinkrxError."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, linkrx.open(receiver) as rx:
        sender.close()
        for _ in range(2):
            with pytest.raises(linkrx.Ended) as raised:
                rx.recv()
            assert raised.value.errno == errno.ESHUTDOWN
            assert isinstance(raised.value, OSError)
            assert isinstance(raised.value, EOFError)
            assert isinstance(raised.value, linkrx.LinkrxError)


# Re-entry.


def test_reentry_from_a_finalizer(ends: Pair) -> None:
    """A `__del__` that runs inside deliver and receives gets Busy, and no packet is lost."""
    refused: list[linkrx.Busy] = []

    class Receives:
        def __del__(self) -> None:
            try:
                rx.drain()
            except linkrx.Busy as error:
                refused.append(error)

    got: list[int] = []
    kept = [Receives()]

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))
        kept.clear()

    with linkrx.open(ends[0], deliver) as rx:
        for number in range(3):
            ends[1].send(frame(number))
        while len(got) < 3:
            assert rx.dispatch(PATIENCE)
    assert got == [0, 1, 2]
    assert len(refused) == 1


def test_reentry_from_a_greenlet(ends: Pair) -> None:
    """A greenlet to which deliver switches gets Busy from every call that receives, and can stop. No packet is lost."""
    greenlet: Any = pytest.importorskip("greenlet", reason="needs greenlet, which is not installed")
    got: list[int] = []
    refused = 0

    def other() -> None:
        nonlocal refused
        while True:
            for call in (
                rx.dispatch,
                rx.drain,
                rx.run,
                rx.recv,
                partial(next, rx),
                partial(next, rx.batches()),
            ):
                with pytest.raises(linkrx.Busy):
                    call()
                refused += 1
            if len(got) == 3:
                rx.stop(flush=True)
            main.switch()

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))
        suspended.switch()

    main, suspended = greenlet.getcurrent(), greenlet.greenlet(other)
    with linkrx.open(ends[0], deliver) as rx:
        for number in range(3):
            ends[1].send(frame(number))
        assert rx.run() is linkrx.End.STOPPED
    assert (got, refused) == ([0, 1, 2], 18)


def test_reentry_from_what_deliver_returns(ends: Pair) -> None:
    """The object that deliver returns is released inside the receiving call, so its `__del__` gets Busy."""
    refused: list[linkrx.Busy] = []

    class Receives:
        def __del__(self) -> None:
            try:
                rx.recv(0)
            except linkrx.Busy as error:
                refused.append(error)

    with linkrx.open(ends[0], lambda *_: Receives()) as rx:
        for number in range(3):
            ends[1].send(frame(number))
        while len(refused) < 3:
            assert rx.dispatch(PATIENCE)
        assert rx.stats().packets == 3


def test_reentry_from_a_tracer(ends: Pair) -> None:
    """A profiler that receives while Python code of the receiver runs gets Busy, and every packet comes once."""
    refused = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal refused
        if event == "call":
            try:
                rx.drain()
            except linkrx.Busy:
                refused += 1

    got: list[int] = []
    with linkrx.open(ends[0], lambda *call: got.append(number_of(call[3])), backend="os_readv") as rx:
        for number in range(10):
            ends[1].send(frame(number))
        sys.setprofile(profile)
        try:
            while len(got) < 10:
                rx.dispatch(0)
        finally:
            sys.setprofile(None)
    assert got == list(range(10))
    assert refused
