"""Capture files made from the formats' specifications, without code of linkrx, and the packets in them."""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass, field
from fractions import Fraction

import linkrx

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
ETHERNET, RAW = 1, 101

MICROSECONDS, NANOSECONDS, KUZNETZOV = 0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34


def frame(size: int, mark: int = 0) -> bytes:
    """An Ethernet frame of `size` bytes that contains `mark`."""
    head = LOCAL + REMOTE + b"\x88\xb5" + mark.to_bytes(4, "big")
    return Short((head + bytes(range(256)) * (size // 256 + 1))[:size])


class Short(bytes):
    """Bytes whose repr is short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>" if len(self) > 2000 else super().__repr__()


@dataclass(frozen=True)
class Recorded:
    """One packet of a capture file."""

    data: bytes = field(repr=False)
    wire_length: int
    timestamp_ns: int | None
    interface: int = 0
    outgoing: bool = False

    @classmethod
    def of(cls, packet: linkrx.Packet) -> Recorded:
        """The recorded packet, from a packet that linkrx received."""
        return cls(bytes(packet), packet.wire_length, packet.timestamp_ns, packet.interface, packet.outgoing)


def read(file: object, **options: object) -> list[Recorded]:
    """All packets of a capture file, in order."""
    with linkrx.open(linkrx.CaptureFile(file), **options) as rx:  # type: ignore[arg-type]
        return [Recorded.of(packet) for packet in rx]


class Pieces(io.RawIOBase):
    """A file without a descriptor. Each read returns a piece of a chosen size."""

    def __init__(self, data: bytes, chooses: random.Random | int) -> None:
        self.data = memoryview(data)
        self.chooses = chooses

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        """Read the next piece."""
        size = (
            self.chooses
            if isinstance(self.chooses, int)
            else self.chooses.choice((1, 3, 17, 200, 5000, 300_000))
        )
        piece = self.data[: min(size, len(into))]
        into[: len(piece)] = piece
        self.data = self.data[len(piece) :]
        return len(piece)


# pcap: pcap-savefile(5).


def pcap(
    packets: list[Recorded],
    *,
    magic: int = MICROSECONDS,
    order: str = "<",
    link_type: int = ETHERNET,
    version: tuple[int, int] = (2, 4),
    swap_lengths: bool = False,
    snaplen: int = 262_144,
) -> bytes:
    """A pcap file."""
    unit = 1 if magic == NANOSECONDS else 1000
    made = bytearray(struct.pack(order + "IHHiIII", magic, *version, 0, 0, snaplen, link_type))
    for one in packets:
        assert one.timestamp_ns is not None
        seconds, rest = divmod(one.timestamp_ns, 10**9)
        lengths = (len(one.data), one.wire_length)
        made += struct.pack(
            order + "IIII", seconds, rest // unit, *(lengths[::-1] if swap_lengths else lengths)
        )
        if magic == KUZNETZOV:
            made += struct.pack(order + "IHBB", one.interface, 0, 4 if one.outgoing else 0, 0)
        made += one.data
    return bytes(made)


# pcapng: draft-ietf-opsawg-pcapng.


def padded(data: bytes) -> bytes:
    """The data, padded to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)


def option(order: str, code: int, value: bytes) -> bytes:
    """A pcapng option."""
    return struct.pack(order + "HH", code, len(value)) + padded(value)


def block(order: str, kind: int, body: bytes) -> bytes:
    """A pcapng block."""
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", kind) + length + body + length


def section(order: str = "<", options: bytes = b"") -> bytes:
    """A section header block."""
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1) + options)


@dataclass
class Interface:
    """An interface of a section."""

    link_type: int = ETHERNET
    snaplen: int = 0
    name: str | None = None
    resolution: int | None = None  # if_tsresol
    offset: int | None = None  # if_tsoffset
    options: list[bytes] = field(default_factory=list)

    def block(self, order: str = "<") -> bytes:
        """The interface description block of this interface."""
        body = struct.pack(order + "HHI", self.link_type, 0, self.snaplen)
        if self.name is not None:
            body += option(order, 2, self.name.encode())
        if self.resolution is not None:
            body += option(order, 9, bytes([self.resolution]))
        if self.offset is not None:
            body += option(order, 14, struct.pack(order + "q", self.offset))
        return block(order, 1, body + option(order, 0, b""))

    def nanoseconds(self, units: int) -> int | None:
        """The timestamp of a packet in nanoseconds, or None if it is out of range."""
        resolution = 6 if self.resolution is None else self.resolution
        unit = Fraction(1, 2 ** (resolution & 0x7F) if resolution & 0x80 else 10 ** (resolution & 0x7F))
        time = int(units * unit * 10**9) + (self.offset or 0) * 10**9
        return time if -(2**63) <= time < 2**63 else None


def enhanced(
    order: str, interface: int, units: int, data: bytes, wire_length: int, options: bytes = b""
) -> bytes:
    """An enhanced packet block."""
    body = struct.pack(order + "IIIII", interface, units >> 32, units & 0xFFFFFFFF, len(data), wire_length)
    return block(order, 6, body + padded(data) + options)


def obsolete(
    order: str, interface: int, units: int, data: bytes, wire_length: int, options: bytes = b""
) -> bytes:
    """An obsolete packet block."""
    body = struct.pack(
        order + "HHIIII", interface, 0xFFFF, units >> 32, units & 0xFFFFFFFF, len(data), wire_length
    )
    return block(order, 2, body + padded(data) + options)


def simple(order: str, data: bytes, wire_length: int) -> bytes:
    """A simple packet block."""
    return block(order, 3, struct.pack(order + "I", wire_length) + padded(data))
