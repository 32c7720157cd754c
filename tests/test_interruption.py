"""An exception at any point where a signal handler may raise: nothing is lost, repeated, uncounted or kept silent."""

from __future__ import annotations

import errno
import gc
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import ring
from conftest import points, that_take
from super_packets import UDP, Super

import linkrx
from linkrx import _core, dispatcher, rigs, segment, segmenting
from linkrx.rigs import LOCAL, REMOTE
from linkrx.testing.resources import descriptors, settings_of
from linkrx.testing.waiting import until

HEADER = LOCAL + REMOTE + b"\x08\x00"
BACKENDS = that_take("unix_dgram")
PACKET_BACKENDS = that_take("packet")
NUMBERS = [0, 1, 2, 3, 4]
RUNTS = 2


class Interrupted(Exception):
    """What the signal handler raises."""


class Unreachable(ConnectionRefusedError):
    """The same of a handler that uses a socket of its own: an OSError, with an errno that means nothing to reception."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNREFUSED, "somebody else's")


class After:
    """Raises Interrupted inside `with` at the n-th point where CPython runs signal handlers, and then no more.

    These points are behind calls into C and at the start of functions in Python.
    """

    def __init__(self, events: int, error: type[Exception] = Interrupted) -> None:
        self.left = events
        self.error = error
        self.raised = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_return" or (event == "call" and frame.f_lasti <= 0):
            self.count(frame)

    def count(self, frame: FrameType) -> None:
        """One such point. Inside `deliver` the packet has been handed over; what a `__del__` raises Python loses."""
        callers = [frame.f_code.co_name, frame.f_back.f_code.co_name if frame.f_back else ""]
        if (
            frame.f_code in (After.__enter__.__code__, After.__exit__.__code__)
            or "deliver" in callers
            or "__del__" in callers
        ):
            return
        if not self.left:
            sys.setprofile(None)
            self.raised = True
            raise self.error
        self.left -= 1

    def __enter__(self) -> None:
        gc.disable()  # what is collected meanwhile is somebody else's
        sys.setprofile(self)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()


def number_of(packet: linkrx.Packet) -> int:
    """The number of a packet: behind the link header, or where the payload of a UDP super-packet's frames starts."""
    return packet.data[0] if packet.data[0] != 0x45 else packet.data[28]


@dataclass(frozen=True)
class Way:
    """A kind of socket, how it is opened, and what is in front of each frame."""

    name: str
    kind: socket.SocketKind = socket.SOCK_DGRAM
    options: dict[str, Any] = field(default_factory=dict)
    prefix: bytes = b""
    split: bool = False

    def send_numbers(self, sender: socket.socket) -> None:
        """A frame for each, or a super-packet that stands for them."""
        if self.split:
            size = 8
            data = b"".join(bytes([number] * size) for number in NUMBERS)
            case = Super(protocol=UDP, payload=len(data), size=size, data=data)
            sender.send(case.vnet() + case.frame())
        else:
            for number in NUMBERS:
                sender.send(self.prefix + HEADER + bytes([number]))


# Room for a few more than are sent: os_readv makes buffers for all of them, and each is a point to stop at.
FEW: dict[str, Any] = {"batch_size": 8}
DGRAM, SEQPACKET = Way("dgram", options=FEW), Way("seqpacket", socket.SOCK_SEQPACKET, FEW)
SEGMENT: dict[str, Any] = {"vnet_header": True, "segment": True, "batch_size": 2}
WAYS = [
    DGRAM,
    SEQPACKET,
    Way("segment", options=SEGMENT, prefix=bytes(10)),
    Way("split", options=SEGMENT, prefix=bytes(10), split=True),
    Way("split_seqpacket", socket.SOCK_SEQPACKET, SEGMENT, bytes(10), split=True),
]


Pull = Callable[[linkrx.Dispatcher, list[linkrx.Packet]], None]


def drain(rx: linkrx.Dispatcher, _: list[linkrx.Packet]) -> None:
    """Deliver one batch."""
    rx.drain()


def dispatch(rx: linkrx.Dispatcher, _: list[linkrx.Packet]) -> None:
    """Deliver one batch."""
    rx.dispatch(0)


def recv(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    """Take one packet."""
    got.append(rx.recv(0))


def batches(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    """Take one batch."""
    got.extend(packet for batch in rx.batches(0) for packet in batch)


@dataclass
class Cut:
    """A dispatcher whose call was cut short, with both ends of its source and what was delivered."""

    rx: linkrx.Dispatcher
    packets: list[linkrx.Packet]
    receiver: socket.socket | None

    @property
    def got(self) -> list[int]:
        """The numbers of what was delivered."""
        return [number_of(packet) for packet in self.packets]

    def readable(self) -> bool:
        """Whether an event loop would call."""
        poll = select.poll()
        poll.register(self.rx.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def queued(self) -> int:
        """Take what is still in the source, and say how many packets that was."""
        assert self.receiver is not None
        self.receiver.setblocking(False)
        for number in range(len(NUMBERS) + RUNTS + 1):
            try:
                self.receiver.recv(100)
            except BlockingIOError:
                return number
        raise AssertionError("more was queued than sent")


def each_point(way: Way, backend: str, pull: Pull, error: type[Exception] = Interrupted) -> Iterator[Cut]:
    """One that was interrupted at its first event, one at its second, and so on."""
    for point in range(5000):
        receiver, sender = socket.socketpair(socket.AF_UNIX, way.kind)
        got: list[linkrx.Packet] = []

        def deliver(
            _r: object, _l: object, _p: int, packet: linkrx.Packet, into: list[linkrx.Packet] = got
        ) -> None:
            into.append(packet)

        with receiver, sender, linkrx.open(receiver, deliver, backend=backend, **way.options) as rx:
            rx.fileno()
            way.send_numbers(sender)
            for _ in range(RUNTS):
                sender.send(way.prefix + b"runt")
            if way.kind == socket.SOCK_SEQPACKET:
                sender.close()
            after = After(point, error)
            with suppress(error), after:
                pull(rx, got)
            if not after.raised:
                assert point > 10, "the interruption never came"
                return
            yield Cut(rx, got, receiver)
    raise AssertionError("the call never ended")


def end(rx: linkrx.Dispatcher, _: list[linkrx.Packet]) -> None:
    """Stop with packets at hand."""
    rx.recv(0)
    rx.stop()
    rx.dispatch(0)


# Pulling gives a packet up to CPython's own return to the caller: one that is cut short there is counted as delivered.
MAY_LOSE: dict[Pull, int] = {drain: 0, dispatch: 0, recv: 1, batches: len(NUMBERS)}


@pytest.mark.parametrize("pull", MAY_LOSE, ids=lambda pull: pull.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_an_event_loop_goes_on(way: Way, backend: str, pull: Pull) -> None:
    """After an interruption fileno() is readable until all is delivered, each packet once, and silent from then on."""
    for cut in each_point(way, backend, pull):
        turns = 0
        while cut.readable() and cut.rx.end is None:
            cut.rx.drain()
            turns += 1
            assert turns < 20, "readable for ever"
        assert cut.got == sorted(set(cut.got))
        told = cut.rx.stats()
        assert (told.packets, told.runts, told.undelivered) == (len(NUMBERS), RUNTS, 0)
        assert 0 <= told.packets - len(cut.got) <= MAY_LOSE[pull]
        assert cut.queued() == 0 if way.kind == socket.SOCK_DGRAM else cut.rx.end is linkrx.End.EOF


@pytest.mark.parametrize("pull", [drain, dispatch], ids=lambda pull: pull.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_an_oserror_of_a_handler_is_not_the_kernels(way: Way, backend: str, pull: Pull) -> None:
    """What a signal handler raises costs no packet, also where it looks like what the kernel says instead of packets."""
    for cut in each_point(way, backend, pull, Unreachable):
        for _ in range(20):
            cut.rx.drain()
        assert cut.got == NUMBERS
        told = cut.rx.stats()
        assert (told.packets, told.runts, told.undelivered) == (len(NUMBERS), RUNTS, 0)


@pytest.mark.parametrize("pull", [*MAY_LOSE, end], ids=lambda pull: pull.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "way", [way for way in WAYS if way.name in ("dgram", "segment")], ids=lambda way: way.name
)
def test_a_stop_counts_what_is_left(way: Way, backend: str, pull: Pull) -> None:
    """After an interruption and stop() every packet was delivered, is counted, or is still in the source."""
    for cut in each_point(way, backend, pull):
        cut.rx.stop()
        assert cut.rx.dispatch(0) is False
        told = cut.rx.stats()
        assert 0 <= told.packets - len(cut.got) <= MAY_LOSE.get(pull, 1)
        assert told.packets + told.undelivered + told.runts + cut.queued() == len(NUMBERS) + RUNTS


# A ring: batches of three leave a block half read, and the kernel closes one every 10 ms.
RING: dict[str, Any] = {"backend": "packet_mmap", "batch_size": 3, "receive_buffer": 2**20, "latency": 0.01}
needs_ring = pytest.mark.skipif("packet_mmap" not in PACKET_BACKENDS, reason="the C core was not built")


def send_into_ring(rig: rigs.Rig) -> None:
    """All numbers, and wait until the kernel has handed them over."""
    for number in NUMBERS:
        rig.send((HEADER + bytes([number])).ljust(60, b"\0"))
    until(lambda: sum(ring.waiting()) == len(NUMBERS))


@needs_ring
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("pull", MAY_LOSE, ids=lambda pull: pull.__name__)
def test_an_event_loop_goes_on_with_a_ring(pull: Pull) -> None:
    """The same on a ring, again and again on the same one: each packet once, and silent when it is empty."""
    packets: list[linkrx.Packet] = []

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        packets.append(packet)

    with rigs.interface() as rig, linkrx.open(rig.source, deliver, **RING) as rx:
        rx.fileno()
        lost = 0
        for point in range(2000):
            send_into_ring(rig)
            packets.clear()
            interrupted = False
            try:
                with After(point):
                    pull(rx, packets)
            except Interrupted:
                interrupted = True
            cut = Cut(rx, packets, None)
            turns = 0
            while cut.readable():
                rx.drain()
                turns += 1
                assert turns < 10, "readable for ever"
            assert cut.got == sorted(set(cut.got))
            assert len(NUMBERS) - len(cut.got) <= MAY_LOSE[pull]
            lost += len(NUMBERS) - len(cut.got)
            told = rx.stats()
            assert (told.packets, told.undelivered) == (len(NUMBERS) * (point + 1), 0)
            assert ring.waiting() == []
            if not interrupted:
                break
        assert point > 10
        assert not interrupted, "the call never ended"
        assert rx.stats().kernel_drops == 0


@needs_ring
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("pull", [*MAY_LOSE, end], ids=lambda pull: pull.__name__)
def test_a_stop_counts_what_is_left_of_a_ring(pull: Pull) -> None:
    """After an interruption and stop() every packet was delivered, is counted, or is still in the ring."""
    with rigs.interface() as rig:
        for point in points(2000):
            packets: list[linkrx.Packet] = []

            def deliver(
                _r: object, _l: object, _p: int, packet: linkrx.Packet, into: list[linkrx.Packet] = packets
            ) -> None:
                into.append(packet)

            with linkrx.open(rig.source, deliver, **RING) as rx:
                send_into_ring(rig)
                interrupted = False
                try:
                    with After(point):
                        pull(rx, packets)
                except Interrupted:
                    interrupted = True
                rx.stop()
                assert rx.dispatch(0) is False
                told = rx.stats()
                assert 0 <= told.packets - len(packets) <= MAY_LOSE.get(pull, 1)
                # Blocks that are read in place are given back later, and what is held of one that was begun is counted.
                mechanism: Any = rx._reception._mechanism
                read = sum(_core.lib.lrx_ring_lent(mechanism._state, slot) for slot in (0, 1))
                left = ring.waiting()[read + (1 if mechanism.held else 0) :]
                assert told.packets + told.undelivered + sum(left) == len(NUMBERS)
            if not interrupted:
                break
        assert point > 10
        assert not interrupted, "the call never ended"


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", PACKET_BACKENDS)
def test_a_link_that_goes_down_leaves_no_descriptor(backend: str) -> None:
    """Wherever an interruption comes while a link goes down and up, it is counted once, and no descriptor is left."""
    with rigs.interface() as rig, rig.open(backend, lambda *_: None, **FEW) as rx:
        device = rig.device
        assert device is not None
        before = descriptors()
        for point in range(2000):
            device.set(state="down")
            try:
                with After(point):
                    rx.dispatch(0)
                    rx.dispatch(0)
            except Interrupted:
                device.set(state="up")
                rx.dispatch(0)
                assert descriptors() == before
                assert rx.end is None
                assert rx.stats().link_downs == point + 1, (
                    f"the {point}. interruption took what the kernel said"
                )
            else:
                break
        assert point > 10
        device.set_up()
        rig.send(rig.frame(100))
        assert rx.recv(10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_iteration_gives_each_packet_once(backend: str) -> None:
    """A handler that raises anywhere in `for packet in rx`, jumps back included, costs no packet."""
    armed = False

    def handler(_: int, frame: FrameType | None) -> None:
        # Not at the yield itself: a generator that raises is over, with what it had in hand.
        if armed and frame is not None and frame.f_code.co_filename == dispatcher.__file__:
            raise Interrupted

    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with receiver, sender, linkrx.open(receiver, batch_size=300, backend=backend) as rx:
            interrupted = 0
            # Few of them come while the loop itself is at work, and not what it calls or its caller.
            for turn in range(20_000):
                if turn >= 600 and interrupted >= 5:
                    break
                got: list[int] = []
                for number in range(100):
                    sender.send(HEADER + bytes([number]))
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 0.00002 + 0.000002 * (turn % 100))
                try:
                    for packet in rx:
                        got.append(packet.data[0])
                        if len(got) == 100:
                            break
                except Interrupted:
                    interrupted += 1
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                while len(got) < 100:
                    got.append(rx.recv(0).data[0])
                assert got == list(range(100))
            assert interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What is interrupted here is no receive: a deletion, a demotion, a close, silence of a source that yields nothing.


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "kind", [rigs.interface, rigs.packet, rigs.packet_segment], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deletion_is_noticed_all_the_same(backend: str, kind: rigs.MakeRig) -> None:
    """The kernel tells once that a link is down: wherever an interruption comes, it counts, and its deletion ends it."""
    for point in points(2000):
        with kind() as rig, rig.open(backend, lambda *_: None, **FEW) as rx:
            assert rig.device is not None
            rig.device.set_down()
            try:
                with After(point):
                    rx.dispatch(0)
                    rx.dispatch(0)
            except Interrupted:
                rx.dispatch(0)
                assert rx.stats().link_downs == 1, point
                rig.device.delete()
                turns = 0
                while rx.dispatch(1):
                    turns += 1
                    assert turns < 10, f"not noticed after {point}"
                assert rx.end is linkrx.End.LINK_GONE
            else:
                break
    assert point > 10


@pytest.mark.skipif(len(BACKENDS) < 3, reason="the C core was not built")
@pytest.mark.parametrize("ladder", ["", "os_readv"])
def test_a_demotion_takes_one_step(ladder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever an interruption comes in a demotion, the next backend takes over, and none behind it."""
    monkeypatch.setenv("LINKRX_AVOID", ladder)
    for point in range(2000):
        with rigs.unix_dgram() as rig, linkrx.open(rig.source, lambda *_: None) as rx:
            refused = rx._reception._mechanism

            def refuse(*_: object) -> int:
                raise OSError(errno.ENOSYS, "refused")

            refused.fill = refuse  # type: ignore[method-assign,assignment]
            rig.send(rig.frame(60))
            try:
                with After(point):
                    rx.drain()
            except Interrupted:
                rx.drain()
                assert (rx.backend, rx.stats().demotions) == ("readv", 1), point
                assert rx.stats().packets == 1
            else:
                break
    assert point > 20


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "kind", [rigs.unix_dgram, rigs.packet, rigs.interface], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_close_can_be_done_again(backend: str, kind: rigs.MakeRig) -> None:
    """Wherever an interruption comes in close, another close releases and restores the rest."""
    if backend == "packet_mmap" and kind is rigs.unix_dgram:
        return  # refused, as the conformance cells show
    with kind() as rig:
        options = {"receive_buffer": 123_456} | (
            {} if kind is rigs.unix_dgram else {"timestamps": backend != "readv"}
        )
        if backend == "os_readv":
            options.pop("timestamps", None)
        before, settings = descriptors(), settings_of(rig.source)
        for point in range(2000):
            rx = rig.open(backend, **options)
            try:
                with After(point):
                    rx.close()
                break
            except Interrupted:
                pass  # its traceback holds on to what was at work: look when that has gone
            rx.close()
            assert descriptors() == before, point
            assert settings_of(rig.source) == settings, point
        assert point > 3


def test_looking_away_can_be_interrupted() -> None:
    """Wherever an interruption comes while a source is left alone that yields nothing, packets still come later."""
    for point in range(4000):
        receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.shutdown(socket.SHUT_RD)
        with receiver, sender, linkrx.open(receiver, lambda *_: None) as rx:
            rx.fileno()
            try:
                with After(point):
                    for _ in range(20):
                        rx.drain()
            except Interrupted:
                for _ in range(3):
                    rx.drain()
                assert rx.end is None
                rx.stop()
                assert rx.dispatch() is False
            else:
                break
    assert point > 20


@pytest.mark.parametrize("way", [way for way in WAYS if way.split], ids=lambda way: way.name)
def test_splitting_in_python(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever an exception comes while a super-packet is split without the core, each frame is delivered once."""
    monkeypatch.setattr(segmenting, "segmenter", segment.in_python)
    test_an_event_loop_goes_on(way, "os_readv", drain)
