"""Which of the received frames are packets, and what is known about each: _core/classify.c in Python, for where there is no core.

Both write the same table; a property test holds them to each other.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linkrx.kernel import bpf
from linkrx.kernel.uapi import ETH_HEADER_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, TUN_PKT_STRIP
from linkrx.memory.columns import ROW_BYTES, Descriptors, Table
from linkrx.memory.counters import BYTES, CUT, EMPTY, FILTERED, PACKETS, RUNTS, UNKNOWN_PROTOCOL
from linkrx.memory.counters import MALFORMED as COUNT_MALFORMED
from linkrx.memory.framing import Framing
from linkrx.packets.headers import MALFORMED, OUTGOING, TRUNCATED, VLAN

if TYPE_CHECKING:
    from linkrx.packets import Owner

_ETHERTYPE = struct.Struct("!H")
_IP_VERSIONS = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}

# Takes the arena and the number of descriptors; writes the batch's table behind the frames, and marks the descriptors as
# classified.
Classify = Callable[["Owner", int], None]


@dataclass
class Filter:
    """What linkrx itself runs on each frame: struct lrx_filter. Without a program everything passes."""

    program: Sequence[bpf.Instruction] = ()
    tags: bool = False
    hardware_type: int = 0


def classifier(
    descriptors: Descriptors,
    framing: Framing,
    counters: array[int],
    *,
    interface: int = 0,
    filter: Filter | None = None,
) -> Classify:
    """`interface` is the index of that of every packet, where the backend does not tell it. `filter` may change between two
    receives.
    """
    rule = filter or Filter()
    reported, report = descriptors.columns, descriptors.report
    prefix, link_header = framing.prefix, framing.link_header

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
            if rule.program:
                tagged = flags & VLAN
                packet = bpf.Filtered(
                    region[start : start + length],
                    wire_length,
                    link_header,
                    reported.interfaces[index] or interface,
                    rule.hardware_type,
                    bool(flags & OUTGOING),
                    (reported.vlan_tpids[index], reported.vlan_tcis[index]) if tagged else None,
                )
                length = bpf.kept(rule.program, packet, tags=rule.tags)
                if not length:
                    filtered += 1
                    continue
            if wire_length > length:
                flags |= TRUNCATED
            cut += flags & TRUNCATED
            if link_header:
                if length < ETH_HEADER_BYTES:
                    runts += 1
                    continue
                (protocol,) = _ETHERTYPE.unpack_from(region, start + 12)
            else:
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
            total += length
            row += 1
        # Nothing is called from here on: an interrupted pass is repeated whole, and counted once.
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
        report.count = 0

    return classify
