"""One packet: a row of a batch, and what its fields mean."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from linkrx.batch import Batch

ETH_HEADER_BYTES = 14  # linux/if_ether.h ETH_HLEN
ETH_ADDRESS_BYTES = 6
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD

# linux/virtio_net.h
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_ECN = 0x80

UDP_HEADER_BYTES = 8
TCP_DATA_OFFSET = 12  # the byte whose upper half is the header's length in words


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

    tci: int
    tpid: int


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


def header_bytes(told: VnetHeader, frame: memoryview) -> int:
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


class Packet:
    """One received frame with what is known about it. It never changes, however long it is kept.

    `len(packet)` and `bytes(packet)` are those of the frame. Keeping a packet keeps its batch's memory;
    `copy()` does not.
    """

    __slots__ = ("_batch", "_index")

    # Set by whoever makes it: a constructor of its own would double what a packet costs.
    _batch: Batch
    _index: int

    @property
    def frame(self) -> memoryview:
        """The bytes as received, link header included."""
        batch, index = self._batch, self._index
        start = batch.starts[index]
        return batch.memory[start : start + batch.lengths[index]]

    @property
    def link_header(self) -> memoryview:
        """The Ethernet header (14 bytes), or nothing where there is none."""
        batch = self._batch
        start = batch.starts[self._index]
        return batch.memory[start : start + batch.framing.link_header]

    @property
    def data(self) -> memoryview:
        """What follows the link header."""
        batch, index = self._batch, self._index
        start = batch.starts[index]
        return batch.memory[start + batch.framing.link_header : start + batch.lengths[index]]

    @property
    def protocol(self) -> int:
        """The EtherType as it stands in the header; without a link header 0x0800 or 0x86DD from the IP version."""
        protocol: int = self._batch.protocols[self._index]
        return protocol

    @property
    def remote(self) -> bytes | None:
        """The source MAC address, or None without Ethernet."""
        batch = self._batch
        if not batch.framing.ethernet:
            return None
        start = batch.starts[self._index] + ETH_ADDRESS_BYTES
        return batch.memory[start : start + ETH_ADDRESS_BYTES].tobytes()

    @property
    def local(self) -> bytes | None:
        """The destination MAC address, or None without Ethernet."""
        batch = self._batch
        if not batch.framing.ethernet:
            return None
        start = batch.starts[self._index]
        return batch.memory[start : start + ETH_ADDRESS_BYTES].tobytes()

    @property
    def wire_length(self) -> int:
        """The frame's length before it was cut, where the kernel tells it; else the length that was kept."""
        length: int = self._batch.wire_lengths[self._index]
        return length

    @property
    def truncated(self) -> bool:
        """The frame was longer than what was kept of it."""
        return bool(self._batch.flags[self._index] & TRUNCATED)

    @property
    def outgoing(self) -> bool:
        """Whether this host sent the frame itself; only ever true with `outgoing=True`."""
        return bool(self._batch.flags[self._index] & OUTGOING)

    @property
    def checksum_unfinished(self) -> bool:
        """A local sender left the transport checksum to a device that the frame has not passed."""
        return bool(self._batch.flags[self._index] & CHECKSUM_UNFINISHED)

    @property
    def timestamp_ns(self) -> int | None:
        """Nanoseconds since 1970 at which the kernel received the frame, or None without `timestamps=True`."""
        if not self._batch.flags[self._index] & TIMESTAMP:
            return None
        when: int = self._batch.timestamps[self._index]
        return when

    @property
    def vlan(self) -> Vlan | None:
        """The VLAN tag that the kernel stripped, or None."""
        batch, index = self._batch, self._index
        if not batch.flags[index] & VLAN:
            return None
        return Vlan(batch.vlan_tcis[index], batch.vlan_tpids[index])

    @property
    def vnet(self) -> VnetHeader | None:
        """The virtio-net header that stood in front of the frame, or None where the source has none."""
        batch = self._batch
        if not batch.framing.vnet_header_size:
            return None
        start = batch.starts[self._index] - batch.framing.vnet_header_size
        told = VnetHeader(*struct.unpack_from(batch.framing.vnet_format, batch.memory, start))
        return told._replace(hdr_len=header_bytes(told, self.frame)) if told.super_packet else told

    def copy(self) -> Packet:
        """The same packet in memory of its own, exactly its size."""
        return self._batch.pick(self._index, self._index + 1)[0]

    def __len__(self) -> int:
        length: int = self._batch.lengths[self._index]
        return length

    def __bool__(self) -> bool:
        return True

    def __bytes__(self) -> bytes:
        batch, index = self._batch, self._index
        start = batch.starts[index]
        return batch.memory[start : start + batch.lengths[index]].tobytes()

    def __repr__(self) -> str:
        route = "" if self.remote is None else f" {mac(self.remote)} > {mac(self.local)}"
        return (
            f"<Packet 0x{self.protocol:04x}{route} {len(self)} bytes{' truncated' if self.truncated else ''}>"
        )


def mac(address: bytes | None) -> str:
    """A link address as people write it, or a dash for none."""
    return address.hex(":") if address else "-"
