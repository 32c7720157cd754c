"""IPv4 (RFC 791) and IPv6 (RFC 8200)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from linkrx.cli.dissection.fields import ALL, CHECKED, Fields, checksum, ipv4_address, ipv6_address
from linkrx.cli.dissection.icmp import icmp, icmpv6
from linkrx.cli.dissection.transport import tcp, udp

# Version and header length, service, total length, identification, flags and fragment offset, time to live, protocol, checksum,
# source, destination.
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
# Version, traffic class and flow label; payload length, next header, hop limit, source, destination.
_IPV6 = struct.Struct("!IHBB16s16s")
_FRAGMENT = struct.Struct("!BxHI")  # next header, offset and flags, identification

TCP, UDP = 6, 17
Transport = Callable[[Fields, bytes, int, int, int, bytes | None], None]
_OVER_IPV4: dict[int, Transport] = {1: icmp, TCP: tcp, UDP: udp}
_OVER_IPV6: dict[int, Transport] = {58: icmpv6, TCP: tcp, UDP: udp}

USUAL = 0x45  # version 4, and a header of 20 bytes

# IPv6 extension headers. The authentication header counts its length in 4 bytes, the others in 8.
_HOP_BY_HOP, _ROUTING, _FRAGMENT_HEADER, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS = {
    _HOP_BY_HOP: "hop-by-hop",
    _ROUTING: "routing",
    _FRAGMENT_HEADER: "fragment",
    _AUTHENTICATION: "authentication",
    _DESTINATION: "destination",
    135: "mobility",
    139: "host identity",
    140: "shim6",
}
NO_NEXT_HEADER = 59


def ipv4(fields: Fields, frame: bytes, at: int, end: int, length: int, depth: int) -> None:
    """The header, and the transport header unless this is a later fragment."""
    if end < at + 20:
        fields["cut"] = "ipv4"
        return
    first, service, total, identifier, fragment, hops, protocol, stored, source, destination = (
        _IPV4.unpack_from(frame, at)
    )
    header = (first & 0xF) * 4
    found: Fields = {
        "source": ipv4_address(source),
        "destination": ipv4_address(destination),
    }
    fields["ipv4"] = found
    if depth:
        found |= {
            "protocol": protocol,
            "length": total,
            "ttl": hops,
            "tos": service,
            "id": identifier,
            "dont_fragment": fragment & 0x4000 != 0,
        }
    if first != USUAL:
        if first >> 4 != 4:
            fields["malformed"] = f"IP version {first >> 4}"
            return
        if header < 20:
            fields["malformed"] = f"an IPv4 header of {header} bytes"
            return
    if not total:
        total = length  # a super-packet of more than 65,535 bytes, or one whose length the device writes
    elif total < header:
        fields["malformed"] = f"an IPv4 packet of {total} bytes with a header of {header}"
        return
    elif total > length:
        found["missing"] = total - length
    if end > at + total:
        end = at + total  # the rest of the frame is padding
    if header > 20:
        found["options"] = frame[at + 20 : min(end, at + header)].hex()
        if end < at + header:
            fields["cut"] = "ipv4"
            return
    if depth == CHECKED:
        found["checksum"] = stored
        found["checksum_state"] = "wrong" if checksum(frame[at : at + header]) else "ok"
    at += header
    rest = total - header
    if fragment & 0x3FFF:
        offset = found["fragment_offset"] = (fragment & 0x1FFF) * 8
        found["more_fragments"] = fragment & 0x2000 != 0
        depth = ALL
        if offset:
            fields["payload"] = {"protocol": protocol, "length": rest}
            return
    transport = _OVER_IPV4.get(protocol)
    if transport is None:
        fields["payload"] = {"protocol": protocol, "length": rest}
        return
    pseudo = source + destination + struct.pack("!xBH", protocol, rest & 0xFFFF) if depth == CHECKED else None
    transport(fields, frame, at, end, rest, pseudo)


def ipv6(fields: Fields, frame: bytes, at: int, end: int, length: int, depth: int) -> None:
    """The header and extension headers, and the transport header unless this is a later fragment."""
    if end < at + 40:
        fields["cut"] = "ipv6"
        return
    first, payload, following, hops, source, destination = _IPV6.unpack_from(frame, at)
    found: Fields = {
        "source": ipv6_address(source),
        "destination": ipv6_address(destination),
    }
    fields["ipv6"] = found
    if depth:
        found |= {
            "next_header": following,
            "length": payload,
            "hop_limit": hops,
            "traffic_class": first >> 20 & 0xFF,
            "flow_label": first & 0xFFFFF,
        }
    if first >> 28 != 6:
        fields["malformed"] = f"IP version {first >> 28}"
        return
    at += 40
    rest = payload
    if not payload:
        rest = max(length - 40, 0)  # a jumbogram (RFC 2675), or no payload
    elif payload > length - 40:
        found["missing"] = payload - (length - 40)
    if end > at + rest:
        end = at + rest
    if following in _EXTENSIONS:
        passed: list[str] = []
        found["extensions"] = passed
        while following in _EXTENSIONS:
            if end < at + 8:
                fields["cut"] = _EXTENSIONS[following]
                return
            passed.append(_EXTENSIONS[following])
            size = 8 + frame[at + 1] * 8
            if following == _AUTHENTICATION:
                size = 8 + frame[at + 1] * 4
            if following == _FRAGMENT_HEADER:
                size = 8
                following, where, found["id"] = _FRAGMENT.unpack_from(frame, at)
                found["fragment_offset"] = where & 0xFFF8
                found["more_fragments"] = where & 1 != 0
                if where & 0xFFF9:
                    depth = ALL
            else:
                following = frame[at]
            if size > rest:
                fields["malformed"] = f"an extension header of {size} bytes in {rest}"
                return
            at += size
            rest -= size
            if found.get("fragment_offset"):
                fields["payload"] = {"protocol": following, "length": rest}
                return
            if end < at:
                fields["cut"] = passed[-1]
                return
        found["protocol"] = following
    transport = _OVER_IPV6.get(following)
    if transport is None:
        fields["payload"] = {"protocol": following, "length": rest}
        return
    pseudo = source + destination + struct.pack("!I3xB", rest, following) if depth == CHECKED else None
    transport(fields, frame, at, end, rest, pseudo)
