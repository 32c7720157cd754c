"""What the fields of a packet mean, and what is asked of a packet so rarely that it is written in Python only."""

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
    """What a frame is looked at through: bytes, a memoryview or a packet."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...


class Described(Bytes, Protocol):
    """What describe() and tagged() need of a packet."""

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

# Between splitter and classifier only: a row that describes no frame. No packet has it, so Flags has not.
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
    """What a super-packet is made of: VIRTIO_NET_HDR_GSO_* in linux/virtio_net.h, without the bit for ECN."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5


class VnetHeader(NamedTuple):
    """The virtio-net header in front of a frame, as the kernel wrote it: struct virtio_net_hdr in linux/virtio_net.h.

    `csum_start` counts from the first byte of the frame. `hdr_len` is a hint of the kernel, except where
    `Packet.vnet` could do better: of super-packets of TCP and UDP it is how many bytes of headers each frame has.
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
        """Whoever sent the frame on has looked at its checksum (VIRTIO_NET_HDR_F_DATA_VALID)."""
        return bool(self.flags & DATA_VALID)

    @property
    def super_packet(self) -> bool:
        """The frame stands for several of `gso_size` bytes of payload each."""
        return bool(self.gso_type & ~GSO_ECN)

    @property
    def gso(self) -> Gso | int:
        """What the super-packet is made of; the number for types that linkrx does not know."""
        kind = self.gso_type & ~GSO_ECN
        return Gso(kind) if kind in Gso._value2member_map_ else kind

    @property
    def ecn(self) -> bool:
        """CWR is meant for the first frame only (VIRTIO_NET_HDR_GSO_ECN)."""
        return bool(self.gso_type & GSO_ECN)


def header_bytes(told: VnetHeader, frame: Bytes) -> int:
    """Bytes of headers in front of the payload of a super-packet, found where its checksum starts: `hdr_len` may be as
    much as the kernel had in one piece, virtio_net_hdr_from_skb() in linux/virtio_net.h.
    """
    if not told.needs_checksum or told.csum_start >= len(frame):
        return told.hdr_len
    if told.gso == Gso.UDP_L4:
        return told.csum_start + UDP_HEADER_BYTES
    if told.gso in (Gso.TCPV4, Gso.TCPV6) and told.csum_start + TCP_DATA_OFFSET < len(frame):
        return told.csum_start + (frame[told.csum_start + TCP_DATA_OFFSET] >> 4) * 4
    return told.hdr_len


def mac(address: bytes | None) -> str:
    """A link address as people write it, or a dash for none."""
    return address.hex(":") if address else "-"


def describe(packet: Described) -> str:
    """The repr of a packet."""
    route = "" if packet.remote is None else f" {mac(packet.remote)} > {mac(packet.local)}"
    cut = " truncated" if packet.truncated else ""
    return f"<Packet 0x{packet.protocol:04x}{route} {len(packet)} bytes{cut}>"


def tagged(packet: Described) -> bytes:
    """The frame with the VLAN tag that the kernel took out put back behind the addresses (IEEE 802.1Q), where it has these."""
    frame, tag = packet.tobytes(), packet.vlan
    if tag is None or packet.local is None:
        return frame
    return frame[:12] + struct.pack("!HH", *tag) + frame[12:]


def vnet_of(raw: bytes, big_endian: int, frame: Bytes) -> VnetHeader:
    """The ten bytes of struct virtio_net_hdr that stood in front of a frame."""
    told = VnetHeader(*struct.unpack(">BBHHHH" if big_endian else "<BBHHHH", raw))
    return told._replace(hdr_len=header_bytes(told, frame)) if told.super_packet else told
