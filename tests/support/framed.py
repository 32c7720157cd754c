"""A model of how linkrx processes a frame, and checks that held packets and batches do not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from linkrx.packets import Batch, Packet

# Holds a packet, batch or view, and checks its contents.
Check = Callable[[], None]


@dataclass(frozen=True)
class Framed:
    """The expected outcome for a frame: `kind` is `packet`, or the counter that counts it."""

    kind: str
    prefix: bytes = b""
    frame: bytes = b""
    protocol: int = 0
    wire_length: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class Setup:
    """The settings of a dispatcher that decide the outcome for a frame."""

    ethernet: bool
    prefix: int
    ladder: tuple[int, ...] | None
    tells_wire_length: bool

    def receive(self, raw: bytes) -> Framed:
        """The expected outcome for one frame."""
        capacity = len(raw) if self.ladder is None else self.prefix + sum(self.ladder)
        kept, cut = raw[:capacity], len(raw) > capacity
        if len(kept) <= self.prefix:
            return Framed("empty")
        frame = kept[self.prefix :]
        protocol = int.from_bytes(frame[12:14], "big")
        if self.ethernet and len(frame) < 14:
            return Framed("runts", truncated=cut)
        if not self.ethernet:
            protocol = {4: 0x0800, 6: 0x86DD}.get(frame[0] >> 4, 0)
            if not protocol:
                return Framed("unknown_protocol", truncated=cut)
        wire_length = (len(raw) if self.tells_wire_length else len(kept)) - self.prefix
        return Framed("packet", kept[: self.prefix], frame, protocol, wire_length, cut)


def check_packet(packet: Packet, framed: Framed, setup: Setup) -> None:
    """Assert that bytes and attributes of a packet are those of the frame that was sent."""
    frame = framed.frame
    assert bytes(packet) == frame
    assert len(packet) == len(frame)
    assert packet.protocol == framed.protocol
    assert (packet.wire_length, packet.truncated) == (framed.wire_length, framed.truncated)
    link_header = 14 if setup.ethernet else 0
    assert packet.link_header == frame[:link_header]
    assert packet.data == frame[link_header:]
    assert packet.remote == (frame[6:12] if setup.ethernet else None)
    assert packet.local == (frame[:6] if setup.ethernet else None)
    assert (packet.timestamp_ns, packet.vlan, packet.outgoing) == (None, None, False)
    if setup.prefix:
        assert packet.vnet is not None
        assert (packet.vnet.flags, packet.vnet.gso_type) == tuple(framed.prefix[:2])
    else:
        assert packet.vnet is None


def hold_packet(packet: Packet, framed: Framed, setup: Setup) -> Check:
    """Hold a packet. For every other packet also hold a slice of its frame, so that linkrx copies the packet."""
    shown = framed.frame[3:9]
    piece = packet.frame[3:9] if len(packet) % 2 else shown

    def check() -> None:
        assert packet[3:9] == shown
        assert piece == shown
        if piece is not shown:
            check_packet(packet, framed, setup)

    return check


def hold_arrays(batch: Batch, framed: list[Framed]) -> Check:
    """Hold arrays over the memory and two columns of a batch, without the batch."""
    memory = np.frombuffer(batch.memory, np.uint8)
    starts, lengths = (np.frombuffer(column, np.uint32) for column in (batch.starts, batch.lengths))

    def check() -> None:
        frames = [memory[start : start + n].tobytes() for start, n in zip(starts, lengths, strict=True)]
        assert frames == [one.frame for one in framed]

    return check


def hold_batch(batch: Batch, framed: list[Framed], setup: Setup) -> Check:
    """Hold a batch."""

    def check() -> None:
        assert list(batch.lengths) == [len(one.frame) for one in framed]
        assert list(batch.wire_lengths) == [one.wire_length for one in framed]
        assert list(batch.protocols) == [one.protocol for one in framed]
        assert list(batch.flags) == [int(one.truncated) for one in framed]
        assert list(batch.timestamps) == [0] * len(framed)
        check_packet(batch[-1], framed[-1], setup)

    return check
