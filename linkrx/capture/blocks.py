"""Headers and blocks of capture files: pcap-savefile(5), draft-ietf-opsawg-pcapng. In host byte order, which both formats allow."""

from __future__ import annotations

import struct

PCAP_NANOSECONDS = 0xA1B23C4D
LONGEST = 262_144  # MAXIMUM_SNAPLEN of libpcap; the snaplen in the header of a pcap file

SECTION, INTERFACE, STATISTICS, ENHANCED = 0x0A0D0D0A, 1, 5, 6
BYTE_ORDER_MAGIC = 0x1A2B3C4D
COMMENT = 1
SHB_USERAPPL = 4
IF_NAME, IF_TSRESOL = 2, 9
ISB_IFDROP = 5
NANOSECONDS = b"\x09"  # if_tsresol: 10^-9 seconds

RECORD_HEAD = struct.Struct("=IIII")  # pcap: seconds, nanoseconds, captured length, original length
BLOCK_HEAD = struct.Struct("=II")  # pcapng: type and length


def padded(data: bytes) -> bytes:
    """The data, padded with zeroes to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes, options: dict[int, bytes]) -> bytes:
    for code, value in options.items():
        body += struct.pack("=HH", code, len(value)) + padded(value)
    if options:
        body += bytes(4)  # opt_endofopt
    length = struct.pack("=I", 12 + len(body))
    return struct.pack("=I", kind) + length + body + length


def section(application: str) -> bytes:
    """The section header block, with a section length of -1: not specified."""
    return _block(
        SECTION, struct.pack("=IHHq", BYTE_ORDER_MAGIC, 1, 0, -1), {SHB_USERAPPL: application.encode()}
    )


def interface(link_type: int, name: str | None) -> bytes:
    """An interface description block, with timestamps in nanoseconds and no limit on packet length (snaplen 0)."""
    named = {IF_NAME: name.encode(errors="surrogateescape")} if name else {}
    return _block(INTERFACE, struct.pack("=HHI", link_type, 0, 0), {**named, IF_TSRESOL: NANOSECONDS})


def statistics(number: int, now: int, drops: int, comment: str | None) -> bytes:
    """An interface statistics block: the packets dropped by `now`, in nanoseconds since 1970."""
    options = {COMMENT: comment.encode()} if comment else {}
    body = struct.pack("=III", number, now >> 32, now & 0xFFFFFFFF)
    return _block(STATISTICS, body, {**options, ISB_IFDROP: struct.pack("=Q", drops)})


def pcap_header(link_type: int) -> bytes:
    """The header of a pcap file."""
    return struct.pack("=IHHiIII", PCAP_NANOSECONDS, 2, 4, 0, 0, LONGEST, link_type)


def whole_packets(memory: bytearray, end: int, *, pcapng: bool) -> tuple[int, int]:
    """Count whole packets, and the bytes of whole records, in the first `end` bytes of a buffer of records."""
    at = packets = 0
    while at < end:
        if pcapng:
            kind, length = BLOCK_HEAD.unpack_from(memory, at)
        else:
            kind, length = ENHANCED, RECORD_HEAD.size + RECORD_HEAD.unpack_from(memory, at)[2]
        if at + length > end:
            break
        packets += kind == ENHANCED
        at += length
    return packets, at
