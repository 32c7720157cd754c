"""Super-packets and the frames of their segmentation, built field by field, without linkrx's segmentation."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from linkrx.memory.columns import Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.packets import Owner
from linkrx.stages.segmentation import Segmenter

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
TCP, UDP = 6, 17
FIN, PSH, ACK, URG, ECE, CWR = 0x01, 0x08, 0x10, 0x20, 0x40, 0x80
SOURCES = {4: bytes([198, 51, 100, 1]), 6: bytes.fromhex("20010db8") + bytes(11) + b"\x01"}
TARGETS = {4: bytes([198, 51, 100, 2]), 6: bytes.fromhex("20010db8") + bytes(11) + b"\x02"}
ETHERTYPES = {4: 0x0800, 6: 0x86DD}
JUMBO_LEAST = 65_536
NOISE = random.Random(20).randbytes(70_000)


def ones_complement(data: bytes) -> int:
    """The 16-bit ones' complement sum of RFC 1071, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Super:
    """A TCP or UDP packet of `payload` bytes, to be segmented into pieces of `size`. With size 0 only its checksum is unfinished."""

    version: int = 4
    protocol: int = TCP
    payload: int = 4000
    size: int = 1448
    ethernet: bool = True
    tags: tuple[int, ...] = ()
    ip_options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()
    tcp_options: bytes = b""
    flags: int = ACK | PSH
    ecn: bool = False
    identification: int = 0x1234
    dont_fragment: bool = True
    sequence: int = 0x01020304
    jumbo: bool = False
    data: bytes = field(default=NOISE, repr=False)

    @property
    def link(self) -> bytes:
        """The Ethernet header with its tags, or nothing."""
        if not self.ethernet:
            return b""
        tags = b"".join(struct.pack("!HH", tag, 0x2005) for tag in self.tags)
        return LOCAL + REMOTE + tags + ETHERTYPES[self.version].to_bytes(2, "big")

    @property
    def transport(self) -> int:
        """The offset of the TCP or UDP header."""
        extensions = sum(len(content) + 2 for _, content in self._extensions)
        return len(self.link) + (20 + len(self.ip_options) if self.version == 4 else 40 + extensions)

    @property
    def _extensions(self) -> tuple[tuple[int, bytes], ...]:
        """The extension headers, with the jumbo option of RFC 2675 in front. Its length field is 0, because nothing reads it."""
        return (((0, b"\xc2\x04" + bytes(4)),) if self.jumbo else ()) + self.extensions

    @property
    def headers(self) -> int:
        """The length of all headers together."""
        return self.transport + (20 + len(self.tcp_options) if self.protocol == TCP else 8)

    @property
    def checksum_offset(self) -> int:
        """The offset of the checksum in the transport header."""
        return 16 if self.protocol == TCP else 6

    @property
    def is_super(self) -> bool:
        """Whether there is more than one segment."""
        return 0 < self.size < self.payload

    def vnet(self, order: str = "<", /, **changes: int) -> bytes:
        """struct virtio_net_hdr, 10 bytes."""
        gso_type = (5 if self.protocol == UDP else 1 if self.version == 4 else 4) | (0x80 if self.ecn else 0)
        fields = {
            "flags": 1,
            "gso_type": gso_type if self.is_super else 0,
            "hdr_len": self.headers if self.is_super else 0,
            "gso_size": self.size if self.is_super else 0,
            "csum_start": self.transport,
            "csum_offset": self.checksum_offset,
            **changes,
        }
        return struct.pack(f"{order}BBHHHH", *fields.values())

    def frame(self) -> bytes:
        """The super-packet, with the sum of the pseudo-header in the checksum field."""
        return self._built(0, self.payload, 0, self.flags, finished=False)

    def frames(self) -> list[bytes]:
        """The frames after segmentation."""
        if not self.is_super:
            return [self._built(0, self.payload, 0, self.flags, finished=True)]
        if self.jumbo and len(self.frame()) - len(self.link) > JUMBO_LEAST:
            return replace(self, jumbo=False).frames()
        made = []
        for k, at in enumerate(range(0, self.payload, self.size)):
            flags = self.flags & ~(0 if at + self.size >= self.payload else FIN | PSH)
            flags &= ~(CWR if k else 0)
            made.append(self._built(at, min(self.size, self.payload - at), k, flags, finished=True))
        return made

    def _built(self, at: int, size: int, k: int, flags: int, *, finished: bool) -> bytes:
        if self.protocol == TCP:
            sequence = (self.sequence + at) & 0xFFFFFFFF
            offset = (20 + len(self.tcp_options)) // 4 << 4
            head = struct.pack("!HHIIBBHHH", 4321, 80, sequence, 7, offset, flags, 500, 0, 3)
            l4 = head + self.tcp_options + self.data[at : at + size]
        else:
            l4 = struct.pack("!HHHH", 4321, 53, 8 + size, 0) + self.data[at : at + size]
        source, target = SOURCES[self.version], TARGETS[self.version]
        pseudo = source + target + struct.pack("!II", len(l4), self.protocol)
        checksum = ones_complement(pseudo)
        if finished:
            checksum = 0xFFFF ^ ones_complement(pseudo + l4)
            # A device or skb_checksum_help writes a zero of any protocol as 0xffff; segmentation only UDP's.
            if checksum == 0 and (self.protocol == UDP or not self.is_super):
                checksum = 0xFFFF
        place = self.checksum_offset
        l4 = l4[:place] + checksum.to_bytes(2, "big") + l4[place + 2 :]
        return self.link + self._ip(len(l4), k) + l4

    def _ip(self, length: int, k: int) -> bytes:
        source, target = SOURCES[self.version], TARGETS[self.version]
        if self.version == 4:
            size = 20 + len(self.ip_options)
            identification = (self.identification + k) & 0xFFFF
            fragment = 0x4000 if self.dont_fragment else 0
            total = size + length if size + length <= 0xFFFF else 0
            head = struct.pack(
                "!BBHHHBBH", 0x40 | size // 4, 2, total, identification, fragment, 64, self.protocol, 0
            )
            ip = head + source + target + self.ip_options
            return ip[:10] + (0xFFFF ^ ones_complement(ip)).to_bytes(2, "big") + ip[12:]
        numbers = [number for number, _ in self._extensions] + [self.protocol]
        chain = b"".join(
            bytes([following, (len(content) + 2) // 8 - 1]) + content
            for following, (_, content) in zip(numbers[1:], self._extensions, strict=True)
        )
        total = len(chain) + length if len(chain) + length <= 0xFFFF else 0
        head = struct.pack("!IHBB", 0x60200000 | 5, total, numbers[0], 64)
        return head + source + target + chain


@dataclass(frozen=True)
class Row:
    """One row that a segmenter reads or writes: bytes and metadata."""

    data: bytes
    flags: int = 0
    wire_length: int = 0
    timestamp: int = 0
    vlan_tci: int = 0
    vlan_tpid: int = 0


Make = Callable[[Descriptors, Descriptors, Framing], Segmenter]

GUARD = 64  # bytes, as many as an arena has in front of its cursor


@cache
def _arenas(_: int) -> tuple[Owner, Owner]:
    return Owner(1 << 20), Owner(1 << 20)


class Bench:
    """A segmenter with two arenas, and guard bytes around the memory that it may write."""

    def __init__(self, make: Make, framing: Framing, given_rows: int = 64, arenas: int = 0) -> None:
        """Benches with different `arenas` do not share memory."""
        self.taken, self.given = Descriptors(64), Descriptors(given_rows)
        self.staging, self.arena = _arenas(arenas)
        self.segmenter = make(self.taken, self.given, framing)

    def take(self, rows: Iterable[Row], receives: int = 1, error: int = 0) -> None:
        """Write rows into the staging arena, as a backend does."""
        cursor = index = 0
        columns = self.taken.columns
        for index, row in enumerate(rows, 1):
            start = self.staging.cursor + cursor
            self.staging.view[start : start + len(row.data)] = row.data
            columns.starts[index - 1] = cursor
            columns.lengths[index - 1] = len(row.data)
            columns.wire_lengths[index - 1] = row.wire_length
            columns.flags[index - 1] = row.flags
            columns.timestamps[index - 1] = row.timestamp
            columns.vlan_tcis[index - 1] = row.vlan_tci
            columns.vlan_tpids[index - 1] = row.vlan_tpid
            cursor = align(cursor + len(row.data))
        report = self.taken.report
        report.count, report.receives, report.end, report.error = index, receives, cursor, error

    def give(self, room: int) -> list[Row]:
        """Call the segmenter once, and return the rows. Asserts that it writes nothing outside its room."""
        arena, report = self.arena, self.given.report
        first, last = arena.cursor, arena.cursor + room
        arena.view[first - GUARD : last + GUARD] = b"\xa5" * (room + 2 * GUARD)
        rows = self.segmenter.segment(self.staging, arena, room)
        assert rows == report.count <= self.given.rows
        end = report.end
        assert end <= room
        assert bytes(arena.view[first - GUARD : first]) == b"\xa5" * GUARD
        assert bytes(arena.view[first + end : last + GUARD]) == b"\xa5" * (room - end + GUARD)
        return self.described()

    def described(self) -> list[Row]:
        """The rows that the segmenter wrote. Asserts that they are contiguous and aligned."""
        report, columns = self.given.report, self.given.columns
        given, before = [], 0
        for index in range(report.count):
            start, length = columns.starts[index], columns.lengths[index]
            assert start == before
            before = align(start + length)
            place = self.arena.cursor + start
            given.append(
                Row(
                    bytes(self.arena.view[place : place + length]),
                    columns.flags[index],
                    columns.wire_lengths[index],
                    columns.timestamps[index],
                    columns.vlan_tcis[index],
                    columns.vlan_tpids[index],
                )
            )
        assert report.end == before
        return given

    def all(self, rows: Iterable[Row], room: int = 200_000) -> list[Row]:
        """All rows after segmentation of `rows`, in as many calls as needed."""
        return list(self._all(rows, room))

    def _all(self, rows: Iterable[Row], room: int) -> Iterator[Row]:
        self.take(rows)
        while self.segmenter.waiting:
            given = self.give(room)
            assert given, "no progress"
            yield from given
