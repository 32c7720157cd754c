"""Packet and Batch in plain Python, simple rather than fast. In C: `_core/types/`.

Here each packet is a `bytes` object from the start, so the rule of memory of `_core/types/memory.c` is not needed.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn, Self, SupportsIndex

from linkrx.kernel.uapi import ETH_ADDRESS_BYTES
from linkrx.packets.headers import (
    CHECKSUM_UNFINISHED,
    OUTGOING,
    TIMESTAMP,
    TRUNCATED,
    VLAN,
    Vlan,
    VnetHeader,
    describe,
    tagged,
    vnet_of,
)

VNET_BYTES = 10  # linux/virtio_net.h struct virtio_net_hdr
LINK_ADDRESS_MOST = 8  # linux/if_packet.h: of sockaddr_ll.sll_addr
START = 64  # where frames begin in an arena, as in C

_FORMATS = {
    "timestamps": "q",
    "starts": "I",
    "lengths": "I",
    "wire_lengths": "I",
    "interfaces": "I",
    "protocols": "H",
    "flags": "H",
    "vlan_tcis": "H",
    "vlan_tpids": "H",
    "link_types": "H",
}


class Packet(bytes):
    """One received frame and its metadata. It never changes, however long it is kept."""

    _restored_by: ClassVar[Callable[..., Any]]  # restore_packet() of linkrx.packets, which stores it here

    wire_length: int
    interface: int
    protocol: int
    link_type: int
    _timestamp: int
    _flags: int
    _vlan: Vlan
    _link_header: int
    _address: bytes
    _vnet: bytes  # struct virtio_net_hdr, or nothing
    _big_endian: bool
    _file_type: int  # as _core/report.h has it: of a packet of a capture file

    def __new__(cls) -> Self:
        """Packets are received, or restored from pickles."""
        raise TypeError("cannot create 'linkrx.Packet' instances")

    def __init_subclass__(cls) -> None:
        """The types in C have no subclasses either."""
        raise TypeError("type 'linkrx.Packet' is not an acceptable base type")

    @property
    def frame(self) -> memoryview:
        """The bytes as received, link header included."""
        return memoryview(self)

    @property
    def link_header(self) -> memoryview:
        """The Ethernet header, 14 bytes, or empty if there is none."""
        return memoryview(self)[: self._link_header]

    @property
    def data(self) -> memoryview:
        """The bytes after the link header."""
        return memoryview(self)[self._link_header :]

    @property
    def remote(self) -> bytes | None:
        """The source MAC address, 6 bytes. Without an Ethernet header, the sender's link address that the kernel reports, or None."""
        return self[ETH_ADDRESS_BYTES : 2 * ETH_ADDRESS_BYTES] if self._link_header else self._address or None

    @property
    def local(self) -> bytes | None:
        """The destination MAC address, 6 bytes, or None without Ethernet."""
        return self[:ETH_ADDRESS_BYTES] if self._link_header else None

    @property
    def truncated(self) -> bool:
        """Whether the frame was cut."""
        return bool(self._flags & TRUNCATED)

    @property
    def outgoing(self) -> bool:
        """Whether this host sent the frame."""
        return bool(self._flags & OUTGOING)

    @property
    def checksum_unfinished(self) -> bool:
        """Whether a local sender left the transport checksum to a device that the frame has not passed."""
        return bool(self._flags & CHECKSUM_UNFINISHED)

    @property
    def timestamp_ns(self) -> int | None:
        """Nanoseconds since 1970 at which the kernel received the frame, or None."""
        return self._timestamp if self._flags & TIMESTAMP else None

    @property
    def vlan(self) -> Vlan | None:
        """The VLAN tag that the kernel took out of the frame, or None."""
        return self._vlan if self._flags & VLAN else None

    @property
    def vnet(self) -> VnetHeader | None:
        """The virtio-net header in front of the frame, or None if the source has none."""
        return vnet_of(self._vnet, self._big_endian, self) if self._vnet else None

    def tobytes(self) -> bytes:
        """The frame as bytes."""
        return bytes(self)

    def tagged(self) -> bytes:
        """The frame as it was on the wire: with the VLAN tag that the kernel took out put back."""
        return tagged(self)

    def u16(self, offset: SupportsIndex, /) -> int:
        """The two bytes at an offset into the frame, as a big-endian number. Raises IndexError if there are no two."""
        return self._number(operator.index(offset), 2)

    def u32(self, offset: SupportsIndex, /) -> int:
        """The four bytes at an offset into the frame, as a big-endian number. Raises IndexError if there are no four."""
        return self._number(operator.index(offset), 4)

    def _number(self, offset: int, size: int) -> int:
        at = offset + len(self) if offset < 0 else offset
        if not 0 <= at <= len(self) - size:
            raise IndexError(f"{size} bytes at {offset} of a frame of {len(self)} bytes")
        return int.from_bytes(self[at : at + size], "big")

    def copy(self) -> Packet:
        """The same packet."""
        return self

    def __copy__(self) -> Packet:
        return self

    def __deepcopy__(self, memo: object) -> Packet:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        vnet = (2 if self._big_endian else 1) if self._vnet else 0
        state = (
            *(bytes(self), self._timestamp, self.wire_length, self.interface, self.protocol, self._flags),
            *(
                self._vlan.tci,
                self._vlan.tpid,
                self.link_type,
                self._address,
                self._link_header,
                vnet,
                self._vnet,
                self._file_type,
            ),
        )
        return Packet._restored_by, (1, *state)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            return bytes.__eq__(self, other)
        try:
            return memoryview(other).tobytes() == bytes(self)  # type: ignore[arg-type]
        except (TypeError, ValueError, BufferError):
            return NotImplemented

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = bytes.__hash__

    def __lt__(self, other: object) -> bool:
        raise TypeError("order is not supported between packets")

    __le__ = __gt__ = __ge__ = __lt__

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"'linkrx.Packet' object attribute {name!r} is read-only")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"'linkrx.Packet' object attribute {name!r} is read-only")

    def __repr__(self) -> str:
        return describe(self)

    __str__ = __repr__  # bytes has its own


def restore(
    frame: bytes,
    timestamp: int,
    wire_length: int,
    interface: int,
    protocol: int,
    flags: int,
    tci: int,
    tpid: int,
    link_type: int,
    address: bytes,
    link_header: int,
    vnet: int,
    vnet_header: bytes,
    file_type: int,
    /,
) -> Packet:
    """A packet from the values of its pickle after the version."""
    if (
        type(frame) is not bytes
        or len(frame) < link_header
        or link_header not in (0, 14)
        or vnet not in (0, 1, 2)
        or len(vnet_header) != (VNET_BYTES if vnet else 0)
        or not 0 <= protocol | flags | tci | tpid | link_type < 1 << 16
        or len(address) > (0 if link_header else LINK_ADDRESS_MOST)
        or not 0 <= wire_length | interface | file_type < 1 << 32
        or not -(1 << 63) <= operator.index(timestamp) < 1 << 63
    ):
        raise ValueError("this is no packet that linkrx has pickled")
    packet = bytes.__new__(Packet, frame)
    vars(packet).update(
        wire_length=wire_length,
        interface=interface,
        protocol=protocol,
        link_type=link_type,
        _timestamp=timestamp,
        _flags=flags,
        _vlan=Vlan(tpid, tci),
        _link_header=link_header,
        _address=bytes(address),
        _big_endian=vnet == 2,
        _vnet=vnet_header,
        _file_type=file_type,
    )
    return packet


class Batch:
    """Packets received together. Index and iteration give packets; the columns have one element for each."""

    memory: memoryview
    timestamps: memoryview
    starts: memoryview
    lengths: memoryview
    wire_lengths: memoryview
    interfaces: memoryview
    protocols: memoryview
    flags: memoryview
    vlan_tcis: memoryview
    vlan_tpids: memoryview
    link_types: memoryview

    def __new__(cls) -> Self:
        """Batches are received."""
        raise TypeError("cannot create 'linkrx.Batch' instances")

    def __init_subclass__(cls) -> None:
        """The types in C have no subclasses either."""
        raise TypeError("type 'linkrx.Batch' is not an acceptable base type")

    def __reduce__(self) -> NoReturn:
        """A list of packets can be pickled, a batch cannot."""
        raise TypeError("cannot pickle 'linkrx.Batch' object")

    _packets: list[Packet]
    _columns: dict[str, memoryview]

    @classmethod
    def _of(cls, packets: list[Packet]) -> Batch:
        batch = object.__new__(cls)
        columns = {"memory": memoryview(b"".join(packets))}
        vars(batch).update(_packets=packets, _columns=columns)
        starts, end = [], 0
        for packet in packets:
            starts.append(end)
            end += len(packet)
        values: dict[str, list[int]] = {
            "timestamps": [packet._timestamp for packet in packets],
            "starts": starts,
            "lengths": [len(packet) for packet in packets],
            "wire_lengths": [packet.wire_length for packet in packets],
            "interfaces": [packet.interface for packet in packets],
            "protocols": [packet.protocol for packet in packets],
            "flags": [packet._flags for packet in packets],
            "vlan_tcis": [packet._vlan.tci for packet in packets],
            "vlan_tpids": [packet._vlan.tpid for packet in packets],
            "link_types": [packet.link_type for packet in packets],
        }
        for name, form in _FORMATS.items():
            columns[name] = memoryview(array(form, values[name])).toreadonly()
        return batch

    def __getattr__(self, name: str) -> memoryview:
        """A new view each time, because the caller may release it."""
        if name == "_columns" or name not in self._columns:
            raise AttributeError(f"'linkrx.Batch' object has no attribute {name!r}", name=name, obj=self)
        return memoryview(self._columns[name])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"'linkrx.Batch' object attribute {name!r} is read-only")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"'linkrx.Batch' object attribute {name!r} is read-only")

    def frames(self) -> list[bytes]:
        """All frames, each as bytes."""
        return [bytes(packet) for packet in self._packets]

    def copy(self) -> Batch:
        """The same packets, in memory of their own."""
        return Batch._of(self._packets)

    def __len__(self) -> int:
        return len(self._packets)

    def __getitem__(self, index: int) -> Packet:
        index = operator.index(index)
        if not -len(self._packets) <= index < len(self._packets):
            raise IndexError(f"packet {index} of a batch of {len(self._packets)}")
        return self._packets[index]

    def __iter__(self) -> Iterator[Packet]:
        return iter(self._packets)

    def __repr__(self) -> str:
        return f"<Batch of {len(self)} packets, {len(self.memory)} bytes>"


class Owner:
    """Memory that a mechanism fills: an arena of `size` bytes."""

    cursor = START
    held = False
    address = 0

    def __init__(self, size: int = 0) -> None:
        self.limit = size
        self.view = memoryview(bytearray(size))

    def take_back(self) -> bool:
        """Always True, because packets have their own bytes."""
        return True
