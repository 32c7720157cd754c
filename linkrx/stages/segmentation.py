"""Splits super-packets into frames, and finishes checksums: in C, or in Python without the core.

Both write the same bytes as software segmentation in the kernel: tcp_gso_segment, __udp_gso_segment, inet_gso_segment,
ipv6_gso_segment and skb_checksum_help. Tests compare them with the kernel and with each other.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Protocol

from linkrx import _core
from linkrx.kernel.uapi import ETHERTYPE_IPV4, ETHERTYPE_IPV6, GSO_ECN, TUN_PKT_STRIP, VNET_HEADER_BYTES
from linkrx.memory.columns import Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.packets import Owner
from linkrx.packets.headers import CHECKSUM_UNFINISHED, MALFORMED, TRUNCATED, Gso, VnetHeader

_ETHERTYPE_AT = 12
_VLAN_TAGS = (0x8100, 0x88A8)
_VLAN_TAGS_MOST = 2
_IP_VERSIONS = {ETHERTYPE_IPV4: 4, ETHERTYPE_IPV6: 6}
_IP_LENGTH_MOST = 0xFFFF

_IPV4_HEADER = 20
_IPV4_FRAGMENT = 0x3FFF  # more fragments, or an offset
_IPV6_HEADER = 40
_IPV6_NEXT_AT = 6
_HOP_BY_HOP, _ROUTING, _DESTINATION = 0, 43, 60  # the extension headers that may stand in front
# RFC 2675, as the kernel puts it in front of TCP when the packet is longer than 65,536 bytes.
_JUMBO_BYTES = 8
_JUMBO_OPTION = 194
_JUMBO_LEAST = 65_536

_TCP, _TCP_HEADER, _TCP_OFFSET_AT, _TCP_FLAGS_AT, _TCP_CHECKSUM_AT = 6, 20, 12, 13, 16
_TCP_FIN_PSH, _TCP_CWR = 0x09, 0x80
_UDP, _UDP_HEADER, _UDP_LENGTH_AT, _UDP_CHECKSUM_AT = 17, 8, 4, 6


class Segmenter(Protocol):
    """Writes the packets that a backend received as frames into an arena, and describes them."""

    def segment(self, staging: Owner, arena: Owner, room: int) -> int:
        """Write frames into up to `room` bytes of `arena`, from its cursor on. The packets are in `staging`, from its cursor on.

        Returns the number of frames. The next call goes on where this one ended, also within a super-packet.
        """
        ...

    @property
    def waiting(self) -> int:
        """The number of received packets that are not split completely."""
        ...

    def receive_by(self, native: int, at_once: int, staged: int, spare: int) -> bool:
        """Let `segment` receive by itself, through a backend's `native`. False if it cannot.

        It receives up to `at_once` packets into `staged` bytes, and again while `spare` bytes of the arena are free.
        """
        ...


def segmenter(taken: Descriptors, given: Descriptors, framing: Framing) -> Segmenter:
    """The segmenter in C where the core was built. `framing` must have a virtio-net header."""
    make = CSegmenter if _core.lib else PythonSegmenter
    return make(taken, given, framing)


class CSegmenter:
    """Segmentation in C. A full-sized segment takes 30 ns more than a copy."""

    def __init__(self, taken: Descriptors, given: Descriptors, framing: Framing) -> None:
        self._report = taken.report
        self._memory = (taken.memory, given.memory)  # keeps them alive: C has their addresses
        self._state = _core.new(
            "struct lrx_segmenter *",
            taken=taken.address(),
            taken_rows=taken.rows,
            packet_info=framing.packet_info_size,
            vnet=framing.vnet_header_size,
            swapped=framing.vnet_little_endian != (sys.byteorder == "little"),
            link_header=framing.link_header,
            link_type=framing.link_type,
            per_packet=framing.per_packet,
            given=given.address(),
            given_rows=given.rows,
        )
        self._segment = _core.lib.lrx_segment

    def receive_by(self, native: int, at_once: int, staged: int, spare: int) -> bool:
        state = self._state
        state.mechanism = _core.at("struct lrx_mechanism *", native)
        state.taken_rows, state.staged, state.spare = at_once, staged, spare
        return True

    def segment(self, staging: Owner, arena: Owner, room: int) -> int:
        given: int = self._segment(
            self._state, staging.address + staging.cursor, arena.address + arena.cursor, room
        )
        return given

    @property
    def waiting(self) -> int:
        waiting: int = self._report.count - self._state.next
        return waiting


class PythonSegmenter:
    """Segmentation in Python. A segment takes tens of microseconds."""

    def __init__(self, taken: Descriptors, given: Descriptors, framing: Framing) -> None:
        self._taken, self._given, self._framing = taken, given, framing
        # The next received row, the number of its frames that are written, and the rows and bytes that are written. One object
        # and one store, so that the next pass goes on there after an interruption.
        self._at = (0, 0, 0, 0)

    def receive_by(self, native: int, at_once: int, staged: int, spare: int) -> bool:
        return False

    def segment(self, staging: Owner, arena: Owner, room: int) -> int:
        taken, given = self._taken.report, self._given.report
        columns = self._given.columns
        received = staging.view[staging.cursor :]
        region = arena.view[arena.cursor : arena.cursor + room]
        count, most = taken.count, self._given.rows - given.held_back
        row, done, rows, cursor = self._at
        full = False
        while row < count and not full:
            outcome = self._outcome_of(received, row)
            while done < outcome.frames:
                data = outcome.frame(done)
                end = align(cursor + len(data))
                full = rows == most or end > room
                if full:
                    break
                region[cursor : cursor + len(data)] = data
                columns.starts[rows] = cursor
                columns.lengths[rows] = len(data)
                columns.wire_lengths[rows] = outcome.wire_length
                columns.flags[rows] = outcome.flags
                columns.timestamps[rows] = self._taken.columns.timestamps[row]
                columns.interfaces[rows] = self._taken.columns.interfaces[row]
                columns.vlan_tcis[rows] = self._taken.columns.vlan_tcis[row]
                columns.vlan_tpids[rows] = self._taken.columns.vlan_tpids[row]
                columns.protocols[rows] = self._taken.columns.protocols[row]
                columns.link_types[rows] = self._taken.columns.link_types[row]
                columns.addresses[rows] = self._taken.columns.addresses[row]
                columns.address_lengths[rows] = self._taken.columns.address_lengths[row]
                rows, cursor, done = rows + 1, end, done + 1
                self._at = (row, done, rows, cursor)
            else:
                row, done = row + 1, 0
                self._at = (row, done, rows, cursor)
        # Nothing is called from here on, so no signal handler runs.
        given.count = rows
        given.end = cursor
        given.receives = taken.receives
        taken.receives = 0
        if row < count:
            self._at = (row, done, 0, 0)
            return rows
        self._at = (0, 0, 0, 0)
        taken.count = 0
        # The errno follows the last packet.
        if taken.error:
            given.error = taken.error
        taken.error = 0
        return rows

    @property
    def waiting(self) -> int:
        return self._taken.report.count - self._at[0]

    def _outcome_of(self, received: memoryview, row: int) -> _Outcome:
        framing, columns = self._framing, self._taken.columns
        start, length, flags = columns.starts[row], columns.lengths[row], columns.flags[row]
        wire_length = columns.wire_lengths[row]
        data = bytes(received[start : start + length])
        if length <= framing.prefix:
            return _Outcome(data, None, wire_length, flags)
        information = data[: framing.packet_info_size]
        stripped = information and struct.unpack_from("=H", information)[0] & TUN_PKT_STRIP
        truncated = bool(flags & TRUNCATED or wire_length > length or stripped)
        vnet = VnetHeader(*struct.unpack_from(framing.vnet_format, data, framing.packet_info_size))
        frame = data[framing.prefix :]
        try:
            whole = _split(frame, vnet, framing.link_header_of(columns.link_types[row]), truncated)
            if whole:
                prefix = information + bytes(framing.vnet_header_size)
                return _Outcome(prefix, whole, 0, flags & ~CHECKSUM_UNFINISHED)
            if vnet.needs_checksum and not truncated:
                frame = _finished(frame, vnet)
                flags &= ~CHECKSUM_UNFINISHED
            elif vnet.gso_type == Gso.NONE:
                return _Outcome(data, None, wire_length, flags)
        except _MalformedError:
            return _Outcome(b"", None, 0, flags | MALFORMED | (TRUNCATED if truncated else 0))
        rest = data[framing.packet_info_size + VNET_HEADER_BYTES : framing.prefix]
        return _Outcome(information + bytes(VNET_HEADER_BYTES) + rest + frame, None, wire_length, flags)


@dataclass(frozen=True)
class _Outcome:
    """The result of a row: `data` unchanged, or the segments of a super-packet, each with `data` in front."""

    data: bytes
    whole: _SuperPacket | None
    wire_length: int
    flags: int

    @property
    def frames(self) -> int:
        return self.whole.segments if self.whole else 1

    def frame(self, k: int) -> bytes:
        return self.data + self.whole.segment(k) if self.whole else self.data


class _MalformedError(Exception):
    """The virtio-net header does not fit its frame."""


def _require(truth: bool) -> None:
    if not truth:
        raise _MalformedError


def _sum_of(data: bytes | bytearray) -> int:
    """The sum of the 16-bit words of `data`, modulo 65,535. It is zero only if all words are."""
    return int.from_bytes(data, "big") << 8 * (len(data) % 2)


def _checksum(total: int) -> int:
    """The internet checksum (RFC 1071) of words with this sum."""
    return 0xFFFF ^ ((total % 0xFFFF or 0xFFFF) if total else 0)


def _finished(frame: bytes, vnet: VnetHeader) -> bytes:
    """skb_checksum_help(): for every protocol, a sum of zero is written as 0xffff."""
    at = vnet.csum_start + vnet.csum_offset
    _require(at + 2 <= len(frame))
    checksum = _checksum(_sum_of(frame[vnet.csum_start :])) or 0xFFFF
    return frame[:at] + checksum.to_bytes(2, "big") + frame[at + 2 :]


@dataclass(frozen=True)
class _SuperPacket:
    """The offsets of a super-packet's headers from its first byte, and the values that all its segments share."""

    frame: bytes
    network: int
    transport: int
    payload: int
    size: int  # payload of every segment but the last
    version: int
    protocol: int
    jumbo: bool  # segments do not have the jumbo option
    pseudo_header: int  # the sum of its words, without the length

    @property
    def segments(self) -> int:
        """The number of segments, at least two."""
        return -(-(len(self.frame) - self.payload) // self.size)

    def segment(self, k: int) -> bytes:
        """Segment k: a whole frame."""
        network, transport = self.network, self.transport
        ip = bytearray(self.frame[network:transport])
        l4 = bytearray(self.frame[transport : self.payload])
        data = self.frame[self.payload + k * self.size :][: self.size]
        if self.jumbo:
            ip[_IPV6_NEXT_AT] = _TCP
            del ip[_IPV6_HEADER : _IPV6_HEADER + _JUMBO_BYTES]
        length = len(l4) + len(data)
        if self.version == 4:
            (identification,) = struct.unpack_from("!H", ip, 4)
            struct.pack_into("!HH", ip, 2, len(ip) + length, (identification + k) & 0xFFFF)
            struct.pack_into("!H", ip, 10, 0)
            struct.pack_into("!H", ip, 10, _checksum(_sum_of(ip)))
        else:
            struct.pack_into("!H", ip, 4, len(ip) - _IPV6_HEADER + length)
        if self.protocol == _TCP:
            at = _TCP_CHECKSUM_AT
            (sequence,) = struct.unpack_from("!I", l4, 4)
            struct.pack_into("!I", l4, 4, (sequence + k * self.size) & 0xFFFFFFFF)
            if k:
                l4[_TCP_FLAGS_AT] &= ~_TCP_CWR
            if k + 1 < self.segments:
                l4[_TCP_FLAGS_AT] &= ~_TCP_FIN_PSH
        else:
            at = _UDP_CHECKSUM_AT
            struct.pack_into("!H", l4, _UDP_LENGTH_AT, length)
        struct.pack_into("!H", l4, at, 0)
        checksum = _checksum(self.pseudo_header + length + _sum_of(l4) + _sum_of(data))
        struct.pack_into("!H", l4, at, checksum or (0 if self.protocol == _TCP else 0xFFFF))
        return self.frame[:network] + ip + l4 + data


def _split(frame: bytes, vnet: VnetHeader, link_header: int, truncated: bool) -> _SuperPacket | None:
    """The super-packet in a frame, or None. Raises _MalformedError if its headers are not complete."""
    if vnet.gso_type == Gso.NONE:
        return None
    _require(not truncated and vnet.gso_size > 0)
    network, version = _network(frame, link_header)
    transport, protocol, jumbo = _transport(frame, network, version)
    room = len(frame) - transport
    if vnet.gso_type == Gso.UDP_L4:
        # Without NEEDS_CSUM the kernel refuses them.
        _require(protocol == _UDP and room >= _UDP_HEADER and vnet.needs_checksum)
        payload, checksum_at = transport + _UDP_HEADER, _UDP_CHECKSUM_AT
    else:
        _require(vnet.gso_type & ~GSO_ECN == (Gso.TCPV4 if version == 4 else Gso.TCPV6))
        _require(protocol == _TCP and room >= _TCP_HEADER)
        header = (frame[transport + _TCP_OFFSET_AT] >> 4) * 4
        _require(_TCP_HEADER <= header <= room)
        payload, checksum_at = transport + header, _TCP_CHECKSUM_AT
    if vnet.needs_checksum:
        _require((vnet.csum_start, vnet.csum_offset) == (transport, checksum_at))
    if len(frame) - payload <= vnet.gso_size:
        return None  # the kernel does not split it either
    _require(payload - network + vnet.gso_size <= _IP_LENGTH_MOST)
    if vnet.needs_checksum:
        # The sender left the sum of the pseudo-header in the field, with the length of the whole in it. Like the
        # kernel, use it: with a routing header only the sender knows the final destination.
        length = room if protocol == _TCP else int.from_bytes(frame[transport + _UDP_LENGTH_AT :][:2], "big")
        pseudo_header = int.from_bytes(frame[transport + checksum_at :][:2], "big") + _minus(length)
    else:
        addresses = frame[network + 12 : network + 20] if version == 4 else frame[network + 8 : network + 40]
        pseudo_header = _sum_of(addresses) + protocol
    return _SuperPacket(
        frame, network, transport, payload, vnet.gso_size, version, protocol, jumbo, pseudo_header
    )


def _minus(number: int) -> int:
    """The number to add to a sum of 16-bit words to subtract `number`."""
    return 0xFFFF - number % 0xFFFF


def _network(frame: bytes, link_header: int) -> tuple[int, int]:
    """The offset of the IP header, and the version that the link header gives."""
    _require(len(frame) > link_header)
    if not link_header:
        return 0, frame[0] >> 4
    at = _ETHERTYPE_AT
    for _ in range(_VLAN_TAGS_MOST):
        if int.from_bytes(frame[at : at + 2], "big") in _VLAN_TAGS:
            at += 4
    return at + 2, _IP_VERSIONS.get(int.from_bytes(frame[at : at + 2], "big"), 0)


def _transport(frame: bytes, network: int, version: int) -> tuple[int, int, bool]:
    """The offset of the end of the IP header, the next protocol, and whether it has a jumbo payload option."""
    ip = frame[network:]
    if version == 4:
        _require(len(ip) >= _IPV4_HEADER and ip[0] >> 4 == 4)
        _require(not int.from_bytes(ip[6:8], "big") & _IPV4_FRAGMENT)
        size = (ip[0] & 0x0F) * 4
        _require(_IPV4_HEADER <= size <= len(ip))
        return network + size, ip[9], False
    _require(version == 6 and len(ip) >= _IPV6_HEADER and ip[0] >> 4 == 6)
    protocol, size = ip[_IPV6_NEXT_AT], _IPV6_HEADER
    while protocol in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
        _require(len(ip) - size >= 8)
        protocol, size = ip[size], size + (ip[size + 1] + 1) * 8
        _require(size <= len(ip))
    jumbo = (
        len(ip) > _JUMBO_LEAST
        and ip[_IPV6_NEXT_AT] == _HOP_BY_HOP
        and ip[_IPV6_HEADER : _IPV6_HEADER + 3] == bytes([_TCP, 0, _JUMBO_OPTION])
    )
    return network + size, protocol, jumbo
