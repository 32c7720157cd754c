"""A model of one source and its dispatchers: every sent frame with its expected outcome, and the rules that open and close."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from itertools import takewhile
from operator import not_
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import linkrx
from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from support.framed import Check, Framed, Setup, check_packet

RUN_HERE = ("os_readv", "readv", "recvmmsg")
BACKENDS = st.sampled_from(
    ["auto", *(info.name for info in linkrx.backends() if info.supported and info.name in RUN_HERE)]
)
BATCH_SIZES = st.sampled_from([1, 3, 64])


def empty_at_end(frames: list[bytes]) -> int:
    """How many frames at the end are empty."""
    return len(list(takewhile(not_, reversed(frames))))


class Ledger(RuleBasedStateMachine):
    """One source, and one dispatcher at a time. `waiting` are the sent frames that no earlier dispatcher received."""

    # Subclasses set these for their source.
    queue: int
    lengths: st.SearchStrategy[int]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.sent = self.accounted = 0
        self.waiting: list[bytes] = []
        self.rx: Dispatcher | None = None
        self.hung_up = False
        self.reset()
        self.kept: list[Check] = []  # each holds an object and checks it
        self.source: Any = None
        self.send_frame: Callable[[bytes], object] = bytes

    def reset(self) -> None:
        """Start the model of a new dispatcher: nothing was delivered yet."""
        self.framed: list[Framed] = []
        self.packets: list[Framed] = []  # the frames that it must deliver
        self.handed = self.calls = 0
        self.stopped = self.closed = self.polled = False
        self.script: Callable[[], None] | None = None
        self.countdown = 0

    def make(self, draw: st.DataObject) -> tuple[Any, Callable[[bytes], object]]:
        """A source, and a function that sends to it."""
        raise NotImplementedError

    def setups(self, draw: st.DataObject) -> tuple[Setup, dict[str, Any]]:
        """The settings and options of the next open."""
        raise NotImplementedError

    def read_raw(self) -> bytes | None:
        """Read the next frame of the kernel's queue without linkrx. None if the queue is empty."""
        raise NotImplementedError

    def read_rest(self) -> list[bytes]:
        """Read all frames of the kernel's queue without linkrx.

        If the peer of a seqpacket socket has closed, empty records at the end look like the end.
        """
        left = []
        for _ in range(len(self.waiting) + 1):
            raw = self.read_raw()
            if raw is None:
                break
            left.append(raw)
        if self.hung_up:
            left = left[: len(left) - empty_at_end(left)] + [b""] * empty_at_end(self.waiting)
        self.accounted += len(self.waiting)
        self.waiting = []
        return left

    # The model.

    @property
    def due(self) -> int:
        """How many packets the dispatcher must still deliver."""
        return len(self.packets) - self.handed

    def is_open(self) -> bool:
        """Whether there is a dispatcher that is not closed."""
        return self.rx is not None and not self.closed

    def take(self, packet: Packet) -> Framed:
        """Assert that a received packet is the next one."""
        assert self.due, "received more packets than were sent"
        framed = self.packets[self.handed]
        check_packet(packet, framed, self.setup)
        self.handed += 1
        return framed

    def deliver(self, remote: bytes | None, local: bytes | None, protocol: int, packet: Packet) -> None:
        """Check the packet, then run the script of the rule."""
        assert not self.stopped, "delivered after stop()"
        assert not self.closed, "delivered after close()"
        framed = self.take(packet)
        assert (remote, local, protocol) == (packet.remote, packet.local, framed.protocol)
        if self.script is not None:
            self.countdown -= 1
            if self.countdown < 0:
                script, self.script = self.script, None
                script()

    def ends_here(self) -> bool:
        """Whether the next call may report the end."""
        return self.stopped or (self.hung_up and not self.due)

    # Opening, sending, ends.

    @initialize(data=st.data(), backend=BACKENDS, batch_size=BATCH_SIZES)
    def begin(self, data: st.DataObject, backend: str, batch_size: int) -> None:
        """Make a source and open it."""
        self.source, self.send_frame = self.make(data)
        self.open(data, backend, batch_size)

    @rule(data=st.data(), backend=BACKENDS, batch_size=BATCH_SIZES)
    @precondition(lambda self: self.rx is None)
    def open_again(self, data: st.DataObject, backend: str, batch_size: int) -> None:
        """Open the same source again, with the frames that the previous dispatcher left in its queue."""
        self.open(data, backend, batch_size)

    def open(self, data: st.DataObject, backend: str, batch_size: int) -> None:
        """Open the source, with any settings that it allows."""
        self.reset()
        if backend == "recvmmsg" and not isinstance(self.source, socket.socket):
            backend = "auto"  # refused, which is tested elsewhere
        self.setup, options = self.setups(data)
        if self.setup.ladder is not None:
            options["buffer_sizes"] = self.setup.ladder
        self.rx = linkrx.open(self.source, self.deliver, backend=backend, batch_size=batch_size, **options)
        tells = isinstance(self.source, socket.socket)
        self.setup = Setup(self.setup.ethernet, self.setup.prefix, self.setup.ladder, tells)
        note(f"{self.rx.backend} {self.setup}")
        for raw in self.waiting:
            self.add(raw)

    @rule(data=st.data(), first=st.sampled_from([0x45, 0x45, 0x60, 0x6F, 0x00]))
    @precondition(lambda self: not self.hung_up)
    def send(self, data: st.DataObject, first: int) -> None:
        """Send frames of any length."""
        for length in data.draw(st.lists(self.lengths, min_size=1, max_size=12)):
            self.send_one(first, length)

    @rule(length=st.sampled_from([60, 1514, 65_000]), number=st.sampled_from([3, 30, 70]))
    @precondition(lambda self: not self.hung_up)
    def flood(self, length: int, number: int) -> None:
        """Send more frames than a batch holds, and more long frames than an arena holds."""
        for _ in range(number):
            self.send_one(0x45, length)

    def send_one(self, first: int, length: int) -> None:
        """Send a frame, which contains its number if it is long enough."""
        body = bytes([first]) + self.sent.to_bytes(4, "big") + bytes(range(self.sent % 7, 256))
        raw = bytearray((body * (length // len(body) + 1))[:length])
        for start in (10, 12):  # where an IP header starts behind a virtio-net header
            if start < length:
                raw[start] = first
        if len(self.waiting) >= self.queue:
            return
        try:
            self.send_frame(bytes(raw))
        except BlockingIOError:
            return
        self.sent += 1
        # The kernel may change the header in front of a frame.
        self.waiting.append(self.as_received(bytes(raw)))
        if self.rx is not None:
            self.add(self.waiting[-1])

    def add(self, raw: bytes) -> None:
        """Add a frame that the dispatcher will receive."""
        self.framed.append(self.setup.receive(raw))
        if self.framed[-1].kind == "packet":
            self.packets.append(self.framed[-1])

    def as_received(self, raw: bytes) -> bytes:
        """The bytes that a read returns for a sent frame."""
        return raw

    @rule()
    @precondition(lambda self: self.is_open() and self.calls > 2)
    def stop(self) -> None:
        """Stop, for the first time or again."""
        assert self.rx is not None
        self.rx.stop()
        self.stopped = True

    @rule(settled=st.booleans())
    @precondition(lambda self: self.rx is not None and (self.calls > 3 or self.closed))
    def leave(self, settled: bool) -> None:
        """Close, with or without reading the counters first."""
        if settled and not self.closed:
            self.settle_and_close()
        else:
            self.close()

    def settle_and_close(self) -> None:
        """Stop, read the counters, and close. The next dispatcher must receive exactly the other frames."""
        rx = self.rx
        assert rx is not None
        if rx.end is None:
            self.stop()
        assert not rx.dispatch()
        assert self.stopped or rx.end is linkrx.End.EOF
        stats = rx.stats()
        assert stats.packets == self.handed
        assert stats.bytes == sum(len(framed.frame) for framed in self.packets[: self.handed])
        received = stats.packets + stats.runts + stats.empty + stats.unknown_protocol + stats.undelivered
        if rx.end is linkrx.End.EOF:
            # Empty records right before the end look like the end.
            assert not any(self.waiting[received:])
            received = len(self.waiting)
        assert received <= len(self.waiting)
        self.accounted += received
        del self.waiting[:received]
        rx.close()
        self.rx = None

    def close(self) -> None:
        """Close without reading the counters. The kernel's queue must then hold the frames that linkrx had not received."""
        rx = self.rx
        assert rx is not None
        rx.close()
        rx.close()
        self.rx, self.closed = None, False
        waiting, left = self.waiting, self.read_rest()
        received = len(waiting) - len(left)
        assert waiting[received:] == left
        assert self.handed <= sum(framed.kind == "packet" for framed in self.framed[:received])
