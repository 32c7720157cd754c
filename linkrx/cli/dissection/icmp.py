"""ICMP (RFC 792) and ICMPv6 (RFC 4443, 4861, 3810)."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.fields import Fields, checksum_state, ipv4_address, ipv6_address

_ICMP = struct.Struct("!BBH")
_ECHO = struct.Struct("!HH")

_ECHO_REPLY, _UNREACHABLE, _REDIRECT, _ECHO_REQUEST, _TIME_EXCEEDED = 0, 3, 5, 8, 11
_FRAGMENTATION_NEEDED = 4

TYPES = {
    _ECHO_REPLY: "echo reply",
    _UNREACHABLE: "unreachable",
    4: "source quench",
    _REDIRECT: "redirect",
    _ECHO_REQUEST: "echo request",
    9: "router advertisement",
    10: "router solicitation",
    _TIME_EXCEEDED: "time exceeded",
    12: "parameter problem",
    13: "time stamp query",
    14: "time stamp reply",
    17: "address mask request",
    18: "address mask reply",
}

_UNREACHABLE6, _TOO_BIG, _TIME_EXCEEDED6, _PARAMETER6, _ECHO_REQUEST6, _ECHO_REPLY6 = 1, 2, 3, 4, 128, 129
_SOLICITATION, _ADVERTISEMENT, _REDIRECT6, _REPORT2 = 135, 136, 137, 143

TYPES6 = {
    _UNREACHABLE6: "unreachable",
    _TOO_BIG: "packet too big",
    _TIME_EXCEEDED6: "time exceeded",
    _PARAMETER6: "parameter problem",
    _ECHO_REQUEST6: "echo request",
    _ECHO_REPLY6: "echo reply",
    130: "multicast listener query",
    131: "multicast listener report",
    132: "multicast listener done",
    133: "router solicitation",
    134: "router advertisement",
    _SOLICITATION: "neighbor solicitation",
    _ADVERTISEMENT: "neighbor advertisement",
    _REDIRECT6: "redirect",
    _REPORT2: "multicast listener report v2",
}

_IPV4_LEAST, _IPV6_LEAST = 20, 40


def icmp(fields: Fields, frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> None:
    """Type and code. An error also quotes the packet that caused it."""
    found = _begin(fields, "icmp", TYPES, frame, at, end, length)
    if found is None:
        return
    kind, code = found["type"], found["code"]
    if pseudo is not None:
        found["checksum_state"] = checksum_state(frame, at, end, length, b"")  # ICMP has no pseudo-header
    if kind in (_ECHO_REQUEST, _ECHO_REPLY):
        _echo(fields, found, "icmp", frame, at, end)
    elif kind in (_UNREACHABLE, _REDIRECT, _TIME_EXCEEDED, 4, 12):
        if end < at + 8:
            fields["cut"] = "icmp"
            return
        if kind == _UNREACHABLE and code == _FRAGMENTATION_NEEDED:
            found["mtu"] = int.from_bytes(frame[at + 6 : at + 8], "big")
        elif kind == _REDIRECT:
            found["gateway"] = ipv4_address(frame[at + 4 : at + 8])
        _quote(found, frame, at + 8, end)


def icmpv6(fields: Fields, frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> None:
    """Type and code. An error also quotes the packet that caused it; neighbor discovery has a target address."""
    found = _begin(fields, "icmpv6", TYPES6, frame, at, end, length)
    if found is None:
        return
    kind = found["type"]
    if pseudo is not None:
        found["checksum_state"] = checksum_state(frame, at, end, length, pseudo)
    if kind in (_ECHO_REQUEST6, _ECHO_REPLY6):
        _echo(fields, found, "icmpv6", frame, at, end)
    elif kind in (_UNREACHABLE6, _TOO_BIG, _TIME_EXCEEDED6, _PARAMETER6):
        if end < at + 8:
            fields["cut"] = "icmpv6"
            return
        if kind == _TOO_BIG:
            found["mtu"] = int.from_bytes(frame[at + 4 : at + 8], "big")
        _quote(found, frame, at + 8, end)
    elif kind in (_SOLICITATION, _ADVERTISEMENT, _REDIRECT6, 130, 131, 132):
        if end < at + 24:
            fields["cut"] = "icmpv6"
            return
        found["target"] = ipv6_address(frame[at + 8 : at + 24])
    elif kind == _REPORT2:
        if end < at + 8:
            fields["cut"] = "icmpv6"
            return
        found["records"] = int.from_bytes(frame[at + 6 : at + 8], "big")


def _begin(
    fields: Fields, name: str, types: dict[int, str], frame: bytes, at: int, end: int, length: int
) -> Fields | None:
    if end < at + 4:
        fields["cut"] = name
        return None
    kind, code, stored = _ICMP.unpack_from(frame, at)
    found: Fields = {"type": kind, "code": code, "length": length, "checksum": stored}
    if kind in types:
        found["name"] = types[kind]
    fields[name] = found
    return found


def _echo(fields: Fields, found: Fields, name: str, frame: bytes, at: int, end: int) -> None:
    if end < at + 8:
        fields["cut"] = name
        return
    found["id"], found["sequence"] = _ECHO.unpack_from(frame, at + 4)


def _quote(found: Fields, frame: bytes, at: int, end: int) -> None:
    """Addresses, protocol and ports of the packet that an error quotes, as far as they were captured."""
    version = frame[at] >> 4 if at < end else 0
    if version == 4 and end >= at + _IPV4_LEAST:
        quoted: Fields = {
            "source": ipv4_address(frame[at + 12 : at + 16]),
            "destination": ipv4_address(frame[at + 16 : at + 20]),
            "protocol": frame[at + 9],
        }
        ports = at + (frame[at] & 0xF) * 4
        later = int.from_bytes(frame[at + 6 : at + 8], "big") & 0x1FFF
    elif version == 6 and end >= at + _IPV6_LEAST:
        quoted = {
            "source": ipv6_address(frame[at + 8 : at + 24]),
            "destination": ipv6_address(frame[at + 24 : at + 40]),
            "protocol": frame[at + 6],
        }
        ports, later = at + _IPV6_LEAST, 0
    else:
        return
    if quoted["protocol"] in (6, 17) and not later and end >= ports + 4:
        quoted["source_port"], quoted["destination_port"] = _ECHO.unpack_from(frame, ports)
    found["quoted"] = quoted
