"""Which of the received frames are packets, and what is known about each: in C, or in Python without the core.

Both write the same table; a property test holds them to each other.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable

from linkrx import _core
from linkrx.columns import CLASSIFIED, COUNT, END, ROW_BYTES, ROWS, Descriptors, Table
from linkrx.framing import TUN_PKT_STRIP, Framing
from linkrx.headers import ETH_HEADER_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, MALFORMED, TRUNCATED
from linkrx.packets import Owner
from linkrx.stats import BYTES, CUT, EMPTY, PACKETS, RUNTS, UNKNOWN_PROTOCOL
from linkrx.stats import MALFORMED as COUNT_MALFORMED

_ETHERTYPE = struct.Struct("!H")
_IP_VERSIONS = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}

# Takes the arena and the number of descriptors; writes the batch's table behind the frames, and marks the descriptors as
# classified.
Classify = Callable[[Owner, int], None]


def classifier(
    descriptors: Descriptors,
    framing: Framing,
    counters: array[int],
    *,
    interface: int = 0,
    at_once: bool = False,
) -> Classify:
    """The best way on this host. `interface` is the index of that of every packet, where the backend does not tell it.

    `at_once`: C code that fills may classify in the same call, for nobody has to look at what it received before.
    """
    if _core.lib is None:
        return in_python(descriptors, framing, counters, interface=interface)
    return in_c(descriptors, framing, counters, interface=interface, at_once=at_once)


def in_c(
    descriptors: Descriptors,
    framing: Framing,
    counters: array[int],
    *,
    interface: int = 0,
    at_once: bool = False,
) -> Classify:
    """One call per batch, about 5 ns per packet: for what C code has not filled, which calls the same by itself."""
    described = _core.new(
        "struct lrx_classifier *",
        descriptors=descriptors.address(),
        rows=descriptors.rows,
        prefix=framing.prefix,
        packet_info=framing.packet_info_size,
        link_header=framing.link_header,
        interface=interface,
        counters=_core.address(counters),
    )
    if at_once:
        descriptors.classify_at_once(_core.pointer(described))
    header = descriptors.header
    lrx_classify = _core.lib.lrx_classify

    def classify(arena: Owner, count: int) -> None:
        region = arena.address + arena.cursor
        lrx_classify(described, region, count, region + header[END])

    return classify


def in_python(
    descriptors: Descriptors, framing: Framing, counters: array[int], *, interface: int = 0
) -> Classify:
    """The same, a microsecond per packet."""
    reported, header = descriptors.columns, descriptors.header
    prefix, link_header = framing.prefix, framing.link_header

    def classify(arena: Owner, count: int) -> None:
        region = arena.view[arena.cursor :]
        end = header[END]
        table = Table(region[end : end + ROW_BYTES * count], count)
        row = total = empty = runts = unknown = cut = malformed = 0
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
            if wire_length > length:
                flags |= TRUNCATED
            cut += flags & TRUNCATED
            start, length, wire_length = start + prefix, length - prefix, wire_length - prefix
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
        header[ROWS] = count
        header[CLASSIFIED] = row + 1
        header[COUNT] = 0

    return classify
