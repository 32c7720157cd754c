"""DNS (RFC 1035)."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.fields import Fields, ipv4_address, ipv6_address, printable

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_SERVICE = struct.Struct("!HHH")

NAME_MOST = 255  # bytes of a name (RFC 1035, 2.3.4)
LABEL_MOST = 63
RECORDS_MOST = 64  # questions and answers that are read of a message

TYPES = {
    1: "A",
    2: "NS",
    5: "CNAME",
    6: "SOA",
    12: "PTR",
    13: "HINFO",
    15: "MX",
    16: "TXT",
    28: "AAAA",
    33: "SRV",
    35: "NAPTR",
    41: "OPT",
    43: "DS",
    46: "RRSIG",
    47: "NSEC",
    48: "DNSKEY",
    50: "NSEC3",
    64: "SVCB",
    65: "HTTPS",
    251: "IXFR",
    252: "AXFR",
    255: "ANY",
    257: "CAA",
}
_A, _AAAA, _MX, _TXT, _SRV = 1, 28, 15, 16, 33
_NAMES = frozenset({2, 5, 12})  # types whose data is a name


class _Cut(Exception):
    """The message is truncated."""


def dns(fields: Fields, frame: bytes, at: int, end: int, length: int) -> None:
    """Header, questions and answers. Of a truncated message, those that are whole. `length`: as the transport header says."""
    if end < at + 12:
        fields["cut"] = "dns"
        return
    identifier, flags, questions, answers, authorities, additional = _HEADER.unpack_from(frame, at)
    found: Fields = {
        "id": identifier,
        "response": flags & 0x8000 != 0,
        "opcode": flags >> 11 & 0xF,
        "rcode": flags & 0xF,
        "flags": [
            name
            for name, bit in (
                ("aa", 0x400),
                ("tc", 0x200),
                ("rd", 0x100),
                ("ra", 0x80),
                ("ad", 0x20),
                ("cd", 0x10),
            )
            if flags & bit
        ],
        "counts": [questions, answers, authorities, additional],
        "questions": [],
        "answers": [],
        "length": length,
    }
    fields["dns"] = found
    message = frame[at:end]
    place = 12
    try:
        for _ in range(min(questions, RECORDS_MOST)):
            question, place = _question(message, place)
            found["questions"].append(question)
        for _ in range(min(answers, RECORDS_MOST)):
            record, place = _record(message, place)
            found["answers"].append(record)
    except _Cut:
        fields["cut"] = "dns"
    except ValueError as error:
        fields["malformed"] = str(error)


def _question(message: bytes, place: int) -> tuple[Fields, int]:
    name, place = _name(message, place)
    if place + 4 > len(message):
        raise _Cut
    kind, _class = _QUESTION.unpack_from(message, place)
    return {"name": name, "type": TYPES.get(kind, f"Type{kind}")}, place + 4


def _record(message: bytes, place: int) -> tuple[Fields, int]:
    name, place = _name(message, place)
    if place + 10 > len(message):
        raise _Cut
    kind, _class, life, size = _RECORD.unpack_from(message, place)
    place += 10
    if place + size > len(message):
        raise _Cut
    record: Fields = {"name": name, "type": TYPES.get(kind, f"Type{kind}"), "ttl": life}
    data = message[place : place + size]
    if kind == _A and size == 4:
        record["data"] = ipv4_address(data)
    elif kind == _AAAA and size == 16:
        record["data"] = ipv6_address(data)
    elif kind in _NAMES:
        record["data"] = _name(message, place)[0]
    elif kind == _MX and size > 2:
        record["data"] = f"{_name(message, place + 2)[0]} {int.from_bytes(data[:2], 'big')}"
    elif kind == _SRV and size > 6:
        priority, weight, port = _SERVICE.unpack_from(data)
        record["data"] = f"{_name(message, place + 6)[0]}:{port} {priority} {weight}"
    elif kind == _TXT:
        record["data"] = _texts(data)
    else:
        record["data"] = data.hex()
    return record, place + size


def _texts(data: bytes) -> str:
    """The character strings of a TXT record. Each follows a byte with its length."""
    found = []
    at = 0
    while at < len(data):
        size = data[at]
        quoted = printable(data[at + 1 : at + 1 + size]).replace('"', '\\"')
        found.append(f'"{quoted}"')
        at += 1 + size
    return " ".join(found)


def _name(message: bytes, place: int) -> tuple[str, int]:
    """A domain name with a final dot, and the offset after it. Follows compression pointers backwards only, so it always ends."""
    labels: list[str] = []
    following = -1  # the offset after the first pointer
    limit = place
    total = 0
    while True:
        if place >= len(message):
            raise _Cut
        size = message[place]
        if size > LABEL_MOST:
            if size < 0xC0:
                raise ValueError(f"a DNS label of type 0x{size >> 6:x}")
            if place + 2 > len(message):
                raise _Cut
            target = (size & 0x3F) << 8 | message[place + 1]
            if following < 0:
                following = place + 2
            if target >= limit:
                raise ValueError("a DNS name that points forward")
            place = limit = target
            continue
        place += 1
        if not size:
            break
        if place + size > len(message):
            raise _Cut
        total += size + 1
        if total > NAME_MOST:
            raise ValueError("a DNS name of more than 255 bytes")
        labels.append(printable(message[place : place + size]).replace(" ", "\\x20"))
        place += size
    return ".".join(labels) + ".", place if following < 0 else following
