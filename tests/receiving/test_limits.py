"""Limits of run() and batches(), and stop(flush=True), beyond the conformance checks."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.pairs import BACKENDS, Pair, frame, number_of, pair
from support.run import that_take

import linkrx
from linkrx.testing import rigs
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import veth
from linkrx.testing.waiting import PATIENCE, patiently

FILE_RECORDS = 150_000
LIMITS = [0, -1, 1.0, "2", float("nan")]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """A datagram pair."""
    with pair() as found:
        yield found


@pytest.mark.parametrize("count", LIMITS)
def test_no_count(ends: Pair, count: object) -> None:
    """A count that is not a positive integer raises an error that shows it, and nothing is received."""
    ends[1].send(frame(1))
    with linkrx.open(ends[0], lambda *_: None) as rx:
        with pytest.raises((TypeError, ValueError), match=f"count={count!r}"):
            rx.run(count=count)  # type: ignore[arg-type]
        assert rx.stats().packets == 0


@pytest.mark.parametrize("duration", [-1, float("nan"), "2", 10**400])
def test_no_duration(ends: Pair, duration: object) -> None:
    """An invalid duration of run() and of batches() raises an error that names it."""
    with linkrx.open(ends[0], lambda *_: None) as rx:
        for call in (rx.run, rx.batches):
            with pytest.raises((TypeError, ValueError), match=f"duration={duration!r}"):
                call(duration=duration)  # type: ignore[arg-type]


def test_a_count_of_any_size(ends: Pair) -> None:
    """A count that does not fit in 64 bits is accepted, and is never reached."""
    with linkrx.open(ends[0], lambda *_: rx.stop()) as rx:
        ends[1].send(frame(1))
        assert rx.run(count=10**30) is linkrx.End.STOPPED


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_add_up(ends: Pair, backend: str) -> None:
    """Each packet is delivered once, in order, for any counts, also with other receiving calls in between."""
    got: list[int] = []
    with linkrx.open(ends[0], lambda *received: got.append(number_of(received[3])), backend=backend) as rx:
        for number in range(100):
            ends[1].send(frame(number))
            if number % 10 == 9:
                rx.run(count=3)
                got.append(number_of(rx.recv()))
                rx.run(count=2)
                if number % 20 == 19:
                    rx.run(count=8)
        assert got == list(range(100))


def test_a_count_that_an_exception_cuts_short(ends: Pair) -> None:
    """An exception of deliver propagates out of run(count=), and the next run() continues after that packet."""
    got: list[int] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))
        if got == [0, 1]:
            raise ZeroDivisionError

    with linkrx.open(ends[0], deliver) as rx:
        for number in range(5):
            ends[1].send(frame(number))
        with pytest.raises(ZeroDivisionError):
            rx.run(count=4)
        assert rx.run(count=3) is None
        assert got == [0, 1, 2, 3, 4]


def test_a_stop_in_the_last_packet_of_a_count(ends: Pair) -> None:
    """If a count is reached and reception is over, run() returns the End."""
    with linkrx.open(ends[0], lambda *_: rx.stop()) as rx:
        ends[1].send(frame(1))
        assert rx.run(count=1) is linkrx.End.STOPPED


def test_a_duration_looks_at_the_clock_behind_each_packet(ends: Pair) -> None:
    """A deliver that takes longer than the whole duration is called once."""
    got: list[int] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))
        signal.sigtimedwait([], 0.02)  # takes time; nothing depends on how much

    with linkrx.open(ends[0], deliver) as rx:
        for number in range(5):
            ends[1].send(frame(number))
        # If this process does not run meanwhile, the duration is over before the first packet.
        for _ in patiently(lambda: got):
            assert rx.run(duration=0.01) is None
        assert got == [0]
        assert [number_of(packet) for batch in rx.batches(0) for packet in batch] == [1, 2, 3, 4]


def test_a_duration_leaves_what_waits(ends: Pair) -> None:
    """After its duration batches() ends, although packets wait. Another iteration returns them."""
    with linkrx.open(ends[0]) as rx:
        over = rx.batches(duration=0)
        for number in range(3):
            ends[1].send(frame(number))
        assert list(over) == []
        assert sum(map(len, rx.batches(0, duration=PATIENCE))) == 3


def test_asynchronous_durations(ends: Pair) -> None:
    """Under asyncio too, a duration ends the iteration under load, and without packets."""

    async def work() -> int:
        received = 0
        async for batch in rx.batches(duration=0.02):
            received += len(batch)
            ends[1].send(frame(1))
        return received

    with linkrx.open(ends[0]) as rx:
        assert asyncio.run(work()) == 0
        ends[1].send(frame(1))
        # If this process does not run meanwhile, the duration is over at once.
        for _ in patiently(lambda: asyncio.run(work()) > 0):
            assert rx.end is None
        assert rx.end is None


# stop(flush=True) on a source that is never empty.


def never_empty(rx: linkrx.Dispatcher, send: object) -> int:
    """Receive until the end, while more packets are sent than received. Returns the number of received packets."""
    received = 0
    rx.stop(flush=True)
    for _ in rx:
        received += 1
        for _ in range(2):
            with suppress(BlockingIOError):
                send()  # type: ignore[operator]
    return received


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("tap"))
def test_a_flush_of_a_queue_that_is_never_empty(backend: str) -> None:
    """A flush ends after a queue of a thousand packets and a batch were received, and not before. Packets in the source are not counted as lost."""
    with rigs.tap() as rig, rig.open(backend) as rx:
        assert rig.device is not None
        rig.device.set(txqlen=1000)
        rig.device.set_up()
        rig.send(rig.frame(100))
        received = never_empty(rx, lambda: rig.send(rig.frame(100)))
        assert rx.end is linkrx.End.STOPPED
        assert 1000 <= received <= 1000 + 3 * 512


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_a_flush_of_an_interface_that_is_never_quiet(backend: str) -> None:
    """A flush ends after as many packets as the socket's buffer holds were received.

    On a ring it may end earlier, because the last packets are in a block that the kernel has not closed.
    """
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.open(near, backend=backend, receive_buffer=1 << 18) as rx,
    ):
        injector.send(bytes(60))
        assert never_empty(rx, lambda: injector.send(bytes(60))) > (0 if backend == "packet_mmap" else 100)
        assert rx.end is linkrx.End.STOPPED


@pytest.mark.usefixtures("devices")
@pytest.mark.skipif("packet_mmap" not in that_take("packet"), reason="rings need the C core")
def test_a_flush_waits_for_an_open_block() -> None:
    """On a ring with a long latency, a flush delivers the packets that came before the stop."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.open(near, backend="packet_mmap", latency=0.2) as rx,
    ):
        for number in range(5):
            injector.send(frame(number).ljust(60, b"\0"))
        rx.stop(flush=True)
        assert [packet.u32(14) for packet in rx] == [0, 1, 2, 3, 4]
        assert rx.end is linkrx.End.STOPPED


def test_a_flush_in_an_event_loop(ends: Pair) -> None:
    """During a flush fileno() stays readable until drain() has delivered the queued packets and reported the end."""
    got: list[int] = []
    with (
        linkrx.open(ends[0], lambda *received: got.append(number_of(received[3])), batch_size=2) as rx,
        closing(selectors.DefaultSelector()) as selector,
    ):
        selector.register(rx, selectors.EVENT_READ)
        for number in range(5):
            ends[1].send(frame(number))
        rx.stop(flush=True)
        while rx.end is None:
            assert selector.select(PATIENCE)
            rx.drain()
        assert got == [0, 1, 2, 3, 4]


def test_a_flush_under_asyncio(ends: Pair) -> None:
    """After stop(flush=True), `async for` returns the queued packets and ends, also if it waits at the call."""

    async def work() -> list[int]:
        got = []
        asyncio.get_running_loop().call_later(0.01, rx.stop, True)
        async for packet in rx:
            got.append(number_of(packet))
        return got

    with linkrx.open(ends[0]) as rx:
        ends[1].send(frame(1))
        assert asyncio.run(work()) == [1]
        assert rx.end is linkrx.End.STOPPED


class Counting(selectors.DefaultSelector):
    """Counts how often an event loop wakes."""

    wakes = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Count a wake-up."""
        self.wakes += 1
        return super().select(timeout)


@pytest.fixture
def slow_ring(
    devices: None, request: pytest.FixtureRequest
) -> Iterator[tuple[linkrx.Dispatcher, list[int], socket.socket]]:
    """A dispatcher on a ring with a latency of 400 ms or of the parameter; its delivered packets; a socket that sends to it."""
    if "packet_mmap" not in that_take("packet"):
        pytest.skip("without the C core there is no ring")
    got: list[int] = []
    with (
        veth() as (near, far),
        linkrx.open(
            near,
            lambda *received: got.append(received[3].u32(14)),
            latency=getattr(request, "param", 0.4),
            filter="ether proto 0x88b5",
        ) as rx,
        injector_on(far) as injector,
    ):
        assert rx.backend == "packet_mmap"
        yield rx, got, injector


@pytest.mark.parametrize("sent", [0, 3])
def test_a_flush_of_a_slow_ring_in_an_event_loop(
    slow_ring: tuple[linkrx.Dispatcher, list[int], socket.socket], sent: int
) -> None:
    """While a flush waits for a ring's block, the event loop sleeps, and has few wake-ups: for packets, the end, and a timer."""
    rx, got, injector = slow_ring
    with closing(Counting()) as selector:
        selector.register(rx, selectors.EVENT_READ)
        for number in range(sent):
            injector.send(rigs.LOCAL + rigs.REMOTE + b"\x88\xb5" + number.to_bytes(4, "big"))
        rx.stop(flush=True)
        while rx.end is None:
            assert selector.select(PATIENCE)
            rx.drain()
        assert got == list(range(sent))
        assert selector.wakes <= 8


def test_a_flush_of_a_slow_ring_under_asyncio(
    slow_ring: tuple[linkrx.Dispatcher, list[int], socket.socket],
) -> None:
    """Under asyncio a flush of a slow ring delivers the packets to a waiting task. stop() during the flush ends it at once."""
    rx, _, injector = slow_ring

    async def work() -> list[int]:
        asyncio.get_running_loop().call_later(0.01, rx.stop, True)
        injector.send(rigs.LOCAL + rigs.REMOTE + b"\x88\xb5" + bytes(4))
        return [packet.u32(14) async for packet in rx]

    selector = Counting()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        assert runner.run(work()) == [0]
    assert rx.end is linkrx.End.STOPPED
    assert selector.wakes <= 30


@pytest.mark.parametrize("slow_ring", [60.0], ids=["a minute"], indirect=True)
def test_a_stop_while_a_slow_ring_flushes(
    slow_ring: tuple[linkrx.Dispatcher, list[int], socket.socket],
) -> None:
    """stop() during a flush of a slow ring makes fileno() readable at once."""
    rx, got, _ = slow_ring
    with closing(Counting()) as selector:
        selector.register(rx, selectors.EVENT_READ)
        rx.stop(flush=True)
        assert selector.select(PATIENCE)
        assert rx.drain() == 0
        assert rx.end is None
        assert not selector.select(0)
        rx.stop(flush=True)
        assert selector.select(0)
        assert rx.drain() == 0
        rx.stop()
        assert selector.select(0)
        assert rx.drain() == 0
        assert rx.run() is linkrx.End.STOPPED
        assert got == []


def test_a_flush_behind_the_end_and_after_close() -> None:
    """stop(flush=True) after the end and after close() has no effect."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, linkrx.open(receiver, lambda *_: None) as rx:
        with sender:
            sender.send(frame(1))
        assert rx.run() is linkrx.End.EOF
        rx.stop(flush=True)
        assert rx.run() is linkrx.End.EOF
    rx.stop(flush=True)


def test_close_ends_a_flush(ends: Pair) -> None:
    """After stop(flush=True) and close() without a call in between, the end is STOPPED."""
    with linkrx.open(ends[0], lambda *_: None) as rx:
        rx.stop(flush=True)
        assert rx.end is None
    assert rx.end is linkrx.End.STOPPED


def test_a_flush_in_a_forked_child(ends: Pair) -> None:
    """A child's stop(flush=True) does not disturb the parent."""
    with linkrx.open(ends[0]) as rx:
        child = os.fork()
        if not child:
            rx.stop(flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        ends[1].send(frame(1))
        assert number_of(rx.recv(PATIENCE)) == 1
        assert rx.end is None


def test_a_flush_of_a_capture_file(tmp_path: Path) -> None:
    """A flush of a capture file delivers every packet, also more of them than any queue holds."""
    path = tmp_path / "many.pcap"
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 1)
    path.write_bytes(head + (struct.pack("<IIII", 0, 0, 60, 60) + bytes(60)) * FILE_RECORDS)
    with linkrx.open(linkrx.CaptureFile(path)) as rx:
        rx.stop(flush=True)
        assert sum(map(len, rx.batches())) == FILE_RECORDS
        assert rx.end is not None
