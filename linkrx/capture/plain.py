"""_core/types/record.c in Python, for where there is no core."""

from __future__ import annotations

from array import array
from struct import pack
from typing import TYPE_CHECKING

from linkrx.capture.blocks import BLOCK_HEAD, ENHANCED, RECORD_HEAD, padded

if TYPE_CHECKING:
    from linkrx.packets import Batch, Packet

ETHERNET, RAW = 1, 101  # LINKTYPE_*

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
    """Records for packets, from the first-th on: see lrx_record() in _core/types/types.h."""
    from linkrx.packets import Packet

    rows = [packets] if isinstance(packets, Packet) else packets
    for index in range(first, len(rows)):
        packet = rows[index]
        key = (ETHERNET if len(packet.link_header) else RAW) << 32 | packet.interface
        if key not in keys:
            return index, at, key
        frame = packet.tagged() if len(packet.link_header) else packet.tobytes()
        true = packet.wire_length + len(frame) - len(packet)
        when = clock if packet.timestamp_ns is None else packet.timestamp_ns
        if pcapng:
            body = pack(
                "=IIIII", keys.index(key), when >> 32 & 0xFFFFFFFF, when & 0xFFFFFFFF, len(frame), true
            )
            body += padded(frame) + (_OUTBOUND if packet.outgoing else b"")
            length = BLOCK_HEAD.size + len(body) + 4
            made = BLOCK_HEAD.pack(ENHANCED, length) + body + pack("=I", length)
        else:
            made = RECORD_HEAD.pack(when // _SECOND & 0xFFFFFFFF, when % _SECOND, len(frame), true) + frame
        if at + len(made) > len(out):
            return index, at, 0
        out[at : at + len(made)] = made
        at += len(made)
    return len(rows), at, 0
