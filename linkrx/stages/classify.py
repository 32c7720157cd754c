"""Classification: which received frames are packets, and their metadata. In C: `_core/classify.c`.

Both write the same table; a property test holds them to each other.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linkrx.kernel import bpf
from linkrx.kernel.uapi import (
    ARPHRD_LOOPBACK,
    ETH_P_8021AD,
    ETH_P_8021Q,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    TUN_PKT_STRIP,
)
from linkrx.memory.columns import ROW_BYTES, Descriptors, Table
from linkrx.memory.counters import BYTES, CUT, EMPTY, FILTERED, PACKETS, RUNTS, UNKNOWN_PROTOCOL
from linkrx.memory.counters import MALFORMED as COUNT_MALFORMED
from linkrx.memory.framing import BARE_IP_TYPES, ETHERNET_TYPES, NO_LINK_HEADER, Framing
from linkrx.packets.headers import MALFORMED, OUTGOING, TRUNCATED, VLAN

if TYPE_CHECKING:
    from linkrx.packets import Owner

_ETHERTYPE = struct.Struct("!H")
ETHERTYPE_VLAN = ETH_P_8021Q
_VLAN_TYPES = (ETH_P_8021Q, ETH_P_8021AD)
_IP_VERSIONS = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}

# Takes the arena and the number of descriptors; writes the batch's table behind the frames, and marks the descriptors as
# classified.
Classify = Callable[["Owner", int], None]


@dataclass
class Filter:
    """The filter that linkrx itself runs on each frame: struct lrx_filter. Without a program every frame passes."""

    program: Sequence[bpf.Instruction] = ()
    tags: bool = False


def _has_inner_tag(data: bytes, wire_length: int, reported: int) -> bool:
    """Whether a cooked packet starts with the TCI and type of an inner VLAN tag, and not with the reported protocol's own header."""
    if len(data) < 4 or reported in _VLAN_TYPES:
        return False
    (kind,) = _ETHERTYPE.unpack_from(data, 2)
    if kind != reported and kind not in _VLAN_TYPES:
        return False
    if reported == ETHERTYPE_IPV4:
        return data[0] >> 4 != 4 or data[0] & 15 < 5 or kind > wire_length
    if reported == ETHERTYPE_IPV6:
        return data[0] >> 4 != 6 or (len(data) == 6 and _ETHERTYPE.unpack_from(data, 4)[0] + 40 > wire_length)
    return True


def classifier(
    descriptors: Descriptors,
    framing: Framing,
    counters: array[int],
    *,
    interface: int = 0,
    filter: Filter | None = None,
) -> Classify:
    """A function that classifies a receive.

    `interface` is the index of the interface for packets of which the backend does not report it. `filter` may change between
    two receives.
    """
    rule = filter or Filter()
    reported, report = descriptors.columns, descriptors.report
    prefix, per_packet = framing.prefix, framing.per_packet

    def classify(arena: Owner, count: int) -> None:
        region = arena.view[arena.cursor :]
        end = report.end
        table = Table(region[end : end + ROW_BYTES * count], count)
        row = total = empty = runts = unknown = cut = malformed = filtered = 0
        for index in range(count):
            start, length = reported.starts[index], reported.lengths[index]
            flags = reported.flags[index]
            if flags & MALFORMED:
                malformed += 1
                cut += flags & TRUNCATED
                continue
            if length <= prefix:
                empty += 1
                continue
            if framing.packet_info and struct.unpack_from("=H", region, start)[0] & TUN_PKT_STRIP:
                flags |= TRUNCATED
            wire_length = max(reported.wire_lengths[index], length)
            start, length, wire_length = start + prefix, length - prefix, wire_length - prefix
            link_type = (reported.link_types[index] if per_packet else 0) or framing.link_type
            bare = per_packet and reported.link_headers[index] == NO_LINK_HEADER
            link_header = 0 if bare else framing.link_header_of(link_type)
            # A socket on all interfaces gets a packet that is sent on lo twice: outgoing and incoming. A capture file may have one.
            if (
                per_packet
                and flags & OUTGOING
                and link_type == ARPHRD_LOOPBACK
                and not interface
                and not bare
            ):
                filtered += 1
                continue
            protocol = reported.protocols[index] if per_packet else 0
            if per_packet and framing.packet_info:
                (protocol,) = _ETHERTYPE.unpack_from(region, start - prefix + 2)
            if rule.program:
                tagged = flags & VLAN
                packet = bpf.Filtered(
                    region[start : start + length],
                    wire_length,
                    link_header,
                    reported.interfaces[index] or interface,
                    link_type,
                    bool(flags & OUTGOING),
                    (reported.vlan_tpids[index], reported.vlan_tcis[index]) if tagged else None,
                    protocol,
                )
                length = bpf.kept(rule.program, packet, tags=rule.tags)
                if not length:
                    filtered += 1
                    continue
            if wire_length > length:
                flags |= TRUNCATED
            cut += flags & TRUNCATED
            if per_packet and protocol and flags & VLAN and not link_header:
                beginning = bytes(region[start : start + min(length, 6)])
                if _has_inner_tag(beginning, wire_length, protocol):
                    protocol = ETHERTYPE_VLAN
            if length < link_header:
                runts += 1
                continue
            if protocol:
                pass
            elif link_header:
                (protocol,) = _ETHERTYPE.unpack_from(region, start + 12)
            elif not per_packet or link_type in ETHERNET_TYPES or link_type in BARE_IP_TYPES:
                protocol = _IP_VERSIONS.get(region[start] >> 4, 0)
                if not protocol:
                    unknown += 1
                    continue
            table.timestamps[row] = reported.timestamps[index]
            table.starts[row] = start
            table.lengths[row] = length
            table.wire_lengths[row] = wire_length
            table.interfaces[row] = reported.interfaces[index] or interface
            table.protocols[row] = protocol
            table.flags[row] = flags
            table.vlan_tcis[row] = reported.vlan_tcis[index]
            table.vlan_tpids[row] = reported.vlan_tpids[index]
            if per_packet:
                table.file_types[row] = reported.file_types[index]
                table.link_types[row] = link_type
                table.addresses[row] = reported.addresses[index]
                table.address_lengths[row] = reported.address_lengths[index]
                table.link_headers[row] = link_header
            total += length
            row += 1
        # Nothing is called from here on, so an interrupted pass is repeated as a whole and counted once.
        counters[PACKETS] += row
        counters[BYTES] += total
        counters[RUNTS] += runts
        counters[EMPTY] += empty
        counters[UNKNOWN_PROTOCOL] += unknown
        counters[CUT] += cut
        counters[COUNT_MALFORMED] += malformed
        counters[FILTERED] += filtered
        report.rows = count
        report.classified = row + 1
        report.count = report.held_back = 0

    return classify
