"""The same as _core/types/record.c in Python, used without the core."""

from __future__ import annotations

from array import array
from struct import pack
from typing import TYPE_CHECKING

from linkrx.capture.blocks import BLOCK_HEAD, ENHANCED, RECORD_HEAD, padded
from linkrx.kernel.uapi import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from linkrx.memory.framing import BARE_IP_TYPES, FILE_LINK_TYPE

if TYPE_CHECKING:
    from linkrx.packets import Batch, Packet

ETHERNET, RAW, LINUX_SLL, LINUX_SLL2, UNKNOWN = 1, 101, 113, 276, 0xFFFFFFFF  # LINKTYPE_*
NO_TIME = 0xFFFFFFFE  # the file cannot have the time of the packet
_UNREAD = {801: 105, 802: 119, 803: 127, 804: 230}  # IEEE 802.11 and 802.15.4, by ARPHRD_* number
_PACKET_OUTGOING = 4  # linux/if_packet.h

_OUTBOUND = pack("=HHIHH", 2, 4, 2, 0, 0)  # epb_flags, and the end of options
_SECOND = 10**9


def record(
    packets: Batch | Packet,
    first: int,
    keys: array[int],
    out: bytearray,
    at: int,
    pcapng: bool,
    clock: int,
    /,
) -> tuple[int, int, int]:
    """Write records of packets, beginning with number `first`. See lrx_record() in _core/types/types.h."""
    from linkrx.packets import Packet

    rows = [packets] if isinstance(packets, Packet) else packets
    for index in range(first, len(rows)):
        packet = rows[index]
        when = clock if packet.timestamp_ns is None else packet.timestamp_ns
        if when < 0 or (not pcapng and when // _SECOND >= 1 << 32):
            return index, at, NO_TIME << 32
        kind = _link_type_of(packet)
        key = kind << 32 | (packet.link_type if kind == UNKNOWN else packet.interface)
        if key not in keys:
            return index, at, key
        frame = _sll2(packet) if kind == LINUX_SLL2 else packet.tagged()
        original_length = packet.wire_length + len(frame) - len(packet)
        if pcapng:
            number, high, low = keys.index(key), when >> 32, when & 0xFFFFFFFF
            body = pack("=IIIII", number, high, low, len(frame), original_length)
            body += padded(frame) + (_OUTBOUND if packet.outgoing else b"")
            length = BLOCK_HEAD.size + len(body) + 4
            made = BLOCK_HEAD.pack(ENHANCED, length) + body + pack("=I", length)
        else:
            head = RECORD_HEAD.pack(when // _SECOND, when % _SECOND, len(frame), original_length)
            made = head + frame
        if at + len(made) > len(out):
            return index, at, 0
        out[at : at + len(made)] = made
        at += len(made)
    return len(rows), at, 0


def _file_type(packet: Packet) -> int:
    """As _core/report.h has it. 0: the packet does not come from a capture file."""
    file_type: int = packet.__reduce__()[1][-1]
    return file_type


def is_from_file(packet: Packet) -> bool:
    """Whether a packet comes from a capture file."""
    return _file_type(packet) != 0


def _link_type_of(packet: Packet) -> int:
    if len(packet.link_header):
        return ETHERNET
    file_type = _file_type(packet)
    of_file = file_type & FILE_LINK_TYPE
    if of_file in (LINUX_SLL, LINUX_SLL2):
        return LINUX_SLL2
    if file_type and not packet.protocol:
        return of_file
    if not packet.protocol:
        return _UNREAD.get(packet.link_type, UNKNOWN)
    is_ip = packet.link_type in BARE_IP_TYPES and packet.protocol in (ETHERTYPE_IPV4, ETHERTYPE_IPV6)
    return RAW if is_ip and not packet.remote and packet.vlan is None else LINUX_SLL2


def _sll2(packet: Packet) -> bytes:
    """A frame of LINKTYPE_LINUX_SLL2. The protocol of a tagged packet is its TPID; the TCI and the EtherType follow the header."""
    protocol, tag, address = packet.protocol, b"", packet.remote or b""
    if packet.vlan is not None:
        protocol, tag = packet.vlan.tpid, pack("!HH", packet.vlan.tci, packet.protocol)
    kind = _PACKET_OUTGOING if packet.outgoing else 0
    head = pack("!HHIHBB8s", protocol, 0, packet.interface, packet.link_type, kind, len(address), address)
    return head + tag + packet.tobytes()
