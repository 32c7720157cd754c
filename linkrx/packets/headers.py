"""The types of a packet's fields, and the rare methods of a packet, which are in Python only."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple, Protocol

from linkrx.kernel.uapi import GSO_ECN

# linux/virtio_net.h
NEEDS_CSUM, DATA_VALID = 1, 2

UDP_HEADER_BYTES = 8
TCP_DATA_OFFSET = 12  # the byte whose upper half is the header's length in words


class Bytes(Protocol):
    """The bytes of a frame: bytes, a memoryview or a packet."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...


class Described(Bytes, Protocol):
    """The parts of a packet that describe() and tagged() use."""

    @property
    def protocol(self) -> int: ...
    @property
    def remote(self) -> bytes | None: ...
    @property
    def local(self) -> bytes | None: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def vlan(self) -> Vlan | None: ...
    def tobytes(self) -> bytes: ...


class Flags(IntFlag):
    """The bits of `Batch.flags`."""

    TRUNCATED = 1
    OUTGOING = 2
    VLAN = 4
    TIMESTAMP = 8
    CHECKSUM_UNFINISHED = 16


# Plain numbers for the code that runs once per packet: an IntFlag operation costs a microsecond.
TRUNCATED, OUTGOING, VLAN, TIMESTAMP, CHECKSUM_UNFINISHED = (int(flag) for flag in Flags)

# Only between segmentation and classification: the row describes no frame. No packet has this flag.
MALFORMED = 0x8000


class Vlan(NamedTuple):
    """The outer VLAN tag that the kernel took out of the frame (IEEE 802.1Q)."""

    tpid: int
    tci: int

    @property
    def id(self) -> int:
        """The VLAN identifier, 12 bits. 0: the tag carries a priority only."""
        return self.tci & 0x0FFF

    @property
    def priority(self) -> int:
        """The priority code point, 0 to 7."""
        return self.tci >> 13

    @property
    def dei(self) -> bool:
        """The drop eligible indicator."""
        return bool(self.tci & 0x1000)


class Gso(IntEnum):
    """The type of a super-packet: VIRTIO_NET_HDR_GSO_* in linux/virtio_net.h, without the bit for ECN."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5


class VnetHeader(NamedTuple):
    """The virtio-net header in front of a frame, as the kernel wrote it: struct virtio_net_hdr in linux/virtio_net.h.

    `csum_start` counts from the first byte of the frame. For super-packets of TCP and UDP `hdr_len` is the size in bytes of the
    headers that each frame has, which `Packet.vnet` works out. Otherwise it is the kernel's hint.
    """

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int

    @property
    def needs_checksum(self) -> bool:
        """The checksum field holds only the pseudo-header's sum (VIRTIO_NET_HDR_F_NEEDS_CSUM)."""
        return bool(self.flags & NEEDS_CSUM)

    @property
    def checksum_valid(self) -> bool:
        """The kernel or a device has verified the checksum (VIRTIO_NET_HDR_F_DATA_VALID)."""
        return bool(self.flags & DATA_VALID)

    @property
    def super_packet(self) -> bool:
        """The frame stands for several of `gso_size` bytes of payload each."""
        return bool(self.gso_type & ~GSO_ECN)

    @property
    def gso(self) -> Gso | int:
        """The type of the super-packet. A number for a type that linkrx does not know."""
        kind = self.gso_type & ~GSO_ECN
        return Gso(kind) if kind in Gso._value2member_map_ else kind

    @property
    def ecn(self) -> bool:
        """CWR is meant for the first frame only (VIRTIO_NET_HDR_GSO_ECN)."""
        return bool(self.gso_type & GSO_ECN)


def header_bytes(header: VnetHeader, frame: Bytes) -> int:
    """The size in bytes of a super-packet's headers, worked out from where its checksum starts.

    The kernel's `hdr_len` may be larger: virtio_net_hdr_from_skb() in linux/virtio_net.h.
    """
    if not header.needs_checksum or header.csum_start >= len(frame):
        return header.hdr_len
    if header.gso == Gso.UDP_L4:
        return header.csum_start + UDP_HEADER_BYTES
    if header.gso in (Gso.TCPV4, Gso.TCPV6) and header.csum_start + TCP_DATA_OFFSET < len(frame):
        return header.csum_start + (frame[header.csum_start + TCP_DATA_OFFSET] >> 4) * 4
    return header.hdr_len


def mac(address: bytes | None) -> str:
    """A link address with colons, or a dash for none."""
    return address.hex(":") if address else "-"


def describe(packet: Described) -> str:
    """The repr of a packet."""
    route = "" if packet.remote is None else f" {mac(packet.remote)} > {mac(packet.local)}"
    cut = " truncated" if packet.truncated else ""
    return f"<Packet 0x{packet.protocol:04x}{route} {len(packet)} bytes{cut}>"


def tagged(packet: Described) -> bytes:
    """The frame with the VLAN tag that the kernel took out, inserted after the addresses (IEEE 802.1Q)."""
    frame, tag = packet.tobytes(), packet.vlan
    if tag is None or packet.local is None:
        return frame
    return frame[:12] + struct.pack("!HH", *tag) + frame[12:]


def vnet_of(raw: bytes, big_endian: int, frame: Bytes) -> VnetHeader:
    """The header of a frame from its ten bytes, struct virtio_net_hdr."""
    header = VnetHeader(*struct.unpack(">BBHHHH" if big_endian else "<BBHHHH", raw))
    return header._replace(hdr_len=header_bytes(header, frame)) if header.super_packet else header
