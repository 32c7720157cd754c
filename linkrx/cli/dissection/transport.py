"""TCP (RFC 9293) and UDP (RFC 768)."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.dhcp import dhcp, dhcpv6
from linkrx.cli.dissection.dns import dns
from linkrx.cli.dissection.fields import Fields, checksum_state

_PORTS = struct.Struct("!HH")
# Ports, sequence and acknowledgement number, data offset and flags, window, checksum, urgent pointer.
_TCP = struct.Struct("!HHIIHHHH")
_UDP = struct.Struct("!HHHH")
_PAIR = struct.Struct("!II")

# tcpdump's text for each value of the nine flag bits.
FLAGS = tuple(
    "".join(letter for bit, letter in enumerate("FSRP.UEWe") if flags >> bit & 1) or "none"
    for flags in range(512)
)

DNS_PORTS = frozenset({53, 5353, 5355})  # RFC 1035, 6762 (multicast), 4795 (link-local multicast)
DHCP_PORTS = frozenset({67, 68})
DHCPV6_PORTS = frozenset({546, 547})

# TCP options, and their lengths in bytes, which include kind and length.
_END, _NOP, _MSS, _SCALE, _SACK_OK, _SACK, _TIMES, _MD5, _FAST_OPEN = 0, 1, 2, 3, 4, 5, 8, 19, 34
_LENGTHS = {_MSS: 4, _SCALE: 3, _SACK_OK: 2, _TIMES: 10, _MD5: 18}


def tcp(fields: Fields, frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> None:
    """Header, options, and DNS in the payload. `length`: header and payload, as the IP header says."""
    if end < at + 20:
        _ports(fields, "tcp", frame, at, end)
        return
    source, destination, sequence, acknowledged, control, window, stored, urgent = _TCP.unpack_from(frame, at)
    header = (control >> 12) * 4
    found: Fields = {
        "source_port": source,
        "destination_port": destination,
        "flags": FLAGS[control & 0x1FF],
        "sequence": sequence,
        "acknowledgement": acknowledged,
        "window": window,
        "length": length - header,
    }
    fields["tcp"] = found
    if control & 0x20:
        found["urgent"] = urgent
    if header < 20 or header > length:
        fields["malformed"] = f"a TCP header of {header} bytes in {length}"
        found["length"] = None
        return
    if header > 20:
        # Most segments have the timestamp option only.
        if header == 32 and end >= at + 32 and frame[at + 20 : at + 24] == b"\1\1\x08\x0a":
            value, echoed = _PAIR.unpack_from(frame, at + 24)
            found["options"] = ["nop", "nop", f"TS val {value} ecr {echoed}"]
        else:
            found["options"] = _options(frame[at + 20 : min(end, at + header)], fields, found)
            if end < at + header:
                fields["cut"] = "tcp"
                return
    if pseudo is not None:
        found["checksum"] = stored
        found["checksum_state"] = checksum_state(frame, at, end, length, pseudo)
    at += header
    if (source == 53 or destination == 53) and length - header > 2 and end > at + 2:
        dns(fields, frame, at + 2, end, int.from_bytes(frame[at : at + 2], "big"))


def _options(data: bytes, fields: Fields, segment: Fields) -> list[str]:
    """The options as tcpdump prints them. The blocks of "sack" go into `segment`."""
    found: list[str] = []
    at = 0
    while at < len(data):
        kind = data[at]
        if kind == _NOP:
            found.append("nop")
            at += 1
            continue
        if kind == _END:
            found.append("eol")
            break
        size = data[at + 1] if at + 1 < len(data) else 0
        if size < 2 or at + size > len(data) or size != _LENGTHS.get(kind, size):
            found.append(f"[bad opt {kind}]")
            fields.setdefault("malformed", f"TCP option {kind} of {size} bytes")
            break
        if kind == _SACK and size % 8 == 2:
            found.append("sack")
            segment["sack"] = [list(block) for block in _PAIR.iter_unpack(data[at + 2 : at + size])]
        else:
            found.append(_option(kind, data[at + 2 : at + size]))
        at += size
    return found


def _option(kind: int, value: bytes) -> str:
    if kind == _TIMES:
        sent, echoed = _PAIR.unpack(value)
        return f"TS val {sent} ecr {echoed}"
    if kind in (_MSS, _SCALE):
        return f"{'mss' if kind == _MSS else 'wscale'} {int.from_bytes(value, 'big')}"
    if kind == _SACK_OK:
        return "sackOK"
    if kind == _MD5:
        return f"md5 {value.hex()}"
    if kind == _FAST_OPEN:
        return f"tfo cookie {value.hex()}" if value else "tfo cookiereq"
    return f"unknown-{kind} 0x{value.hex()}" if value else f"unknown-{kind}"


def udp(fields: Fields, frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> None:
    """Header, and DNS or DHCP in the payload. `length`: header and payload, as the IP header says."""
    if end < at + 8:
        _ports(fields, "udp", frame, at, end)
        return
    source, destination, udp_length, stored = _UDP.unpack_from(frame, at)
    found: Fields = {"source_port": source, "destination_port": destination, "length": udp_length - 8}
    fields["udp"] = found
    if udp_length == 0:
        udp_length = length  # a jumbogram (RFC 2675), or a super-packet of more than 65,535 bytes
        found["length"] = length - 8
    if udp_length < 8:
        fields["malformed"] = f"a UDP length of {udp_length}"
        found["length"] = None
        return
    if udp_length > length:
        if not (fields.get("ipv4") or fields["ipv6"]).get("more_fragments"):
            fields["malformed"] = f"a UDP length of {udp_length} in {length} bytes"
    elif pseudo is not None:
        found["checksum"] = stored
        # Over the bytes that the UDP length counts.
        found["checksum_state"] = "none" if not stored else checksum_state(frame, at, end, udp_length, pseudo)
    at += 8
    if end > at + udp_length - 8:
        end = at + udp_length - 8
    if source in DNS_PORTS or destination in DNS_PORTS:
        dns(fields, frame, at, end, udp_length - 8)
    elif source in DHCP_PORTS or destination in DHCP_PORTS:
        dhcp(fields, frame, at, end, udp_length - 8)
    elif source in DHCPV6_PORTS or destination in DHCPV6_PORTS:
        dhcpv6(fields, frame, at, end, udp_length - 8)


def _ports(fields: Fields, name: str, frame: bytes, at: int, end: int) -> None:
    """The ports of a truncated header."""
    fields["cut"] = name
    if end >= at + 4:
        source, destination = _PORTS.unpack_from(frame, at)
        fields[name] = {"source_port": source, "destination_port": destination}
