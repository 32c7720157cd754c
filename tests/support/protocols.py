"""Frames of every protocol that `linkrx dump` knows, built here with correct lengths and checksums."""

from __future__ import annotations

import socket
import struct

LOCAL, REMOTE, EVERYBODY = (
    bytes.fromhex(digits) for digits in ("020000000001", "020000000002", "ffffffffffff")
)
A, B = "10.0.0.1", "10.0.0.2"
A6, B6 = "fd00::1", "fd00::2"
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ethernet(kind: int, body: bytes, *, to: bytes = LOCAL, source: bytes = REMOTE) -> bytes:
    """An Ethernet frame."""
    return to + source + struct.pack("!H", kind) + body


def vlan(frame: bytes, control: int, kind: int = 0x8100) -> bytes:
    """The frame with a VLAN tag."""
    return frame[:12] + struct.pack("!HH", kind, control) + frame[12:]


def ipv4(
    protocol: int,
    body: bytes,
    *,
    source: str = A,
    target: str = B,
    fragment: int = 0x4000,
    options: bytes = b"",
    total: int | None = None,
) -> bytes:
    """An IPv4 packet. `total` overrides the length field."""
    size = 20 + len(options) + len(body) if total is None else total
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    first = 0x45 + len(options) // 4
    header = struct.pack("!BBHHHBBH", first, 0, size, 7, fragment, 64, protocol, 0) + addresses + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def ipv6(
    following: int, body: bytes, *, source: str = A6, target: str = B6, payload: int | None = None
) -> bytes:
    """An IPv6 packet."""
    size = len(body) if payload is None else payload
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, size, following, 64) + addresses + body


def _summed(protocol: int, body: bytes, at: int, source: str, target: str) -> bytes:
    """The body with its checksum at offset `at`, which covers the pseudo-header too."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    pseudo = socket.inet_pton(family, source) + socket.inet_pton(family, target)
    pseudo += struct.pack("!II", len(body), protocol)
    return body[:at] + struct.pack("!H", checksum(pseudo + body) or 0xFFFF) + body[at + 2 :]


def ip(
    protocol: int, body: bytes, at: int | None, *, six: bool = False, source: str = "", target: str = ""
) -> bytes:
    """An Ethernet frame with an IPv4 or IPv6 packet. `at` is the offset of the checksum in the body."""
    source, target = source or (A6 if six else A), target or (B6 if six else B)
    if at is not None:
        body = _summed(protocol, body, at, source, target)
    if six:
        return ethernet(0x86DD, ipv6(protocol, body, source=source, target=target))
    return ethernet(0x0800, ipv4(protocol, body, source=source, target=target))


def tcp(
    flags: int,
    body: bytes = b"",
    *,
    ports: tuple[int, int] = (1000, 80),
    options: bytes = b"",
    numbers: tuple[int, int] = (1, 2),
    urgent: int = 0,
    six: bool = False,
) -> bytes:
    """A frame with a TCP segment."""
    control = (20 + len(options)) // 4 << 12 | flags
    header = struct.pack("!HHIIHHHH", *ports, *numbers, control, 500, 0, urgent)
    return ip(TCP, header + options + body, 16, six=six)


def udp(
    ports: tuple[int, int], body: bytes = b"", *, six: bool = False, source: str = "", target: str = ""
) -> bytes:
    """A frame with a UDP datagram."""
    header = struct.pack("!HHHH", *ports, 8 + len(body), 0)
    return ip(UDP, header + body, 6, six=six, source=source, target=target)


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """A frame with an ICMP message. `rest` follows the checksum."""
    body = struct.pack("!BBH", kind, code, 0) + rest
    return ip(ICMP, body[:2] + struct.pack("!H", checksum(body)) + body[4:], None)


def icmpv6(kind: int, code: int, rest: bytes) -> bytes:
    """A frame with an ICMPv6 message. `rest` follows the checksum."""
    return ip(ICMPV6, struct.pack("!BBH", kind, code, 0) + rest, 2, six=True)


def arp(operation: int, *, sender: str = A, target: str = B) -> bytes:
    """A frame with an ARP request or reply."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + REMOTE + socket.inet_aton(sender)
    return ethernet(0x0806, body + bytes(6) + socket.inet_aton(target), to=EVERYBODY)


def name(text: str) -> bytes:
    """A domain name, not compressed."""
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def dns(flags: int, questions: list[tuple[str, int]], answers: list[tuple[bytes, int, bytes]]) -> bytes:
    """A DNS message. An answer's name may be a pointer (RFC 1035, 4.1.4)."""
    made = struct.pack("!HHHHHH", 4321, flags, len(questions), len(answers), 0, 0)
    for asked, kind in questions:
        made += name(asked) + struct.pack("!HH", kind, 1)
    for owner, kind, data in answers:
        made += owner + struct.pack("!HHIH", kind, 1, 300, len(data)) + data
    return made


def dhcp(operation: int, options: bytes, *, yours: str = "0.0.0.0") -> bytes:
    """A BOOTP message with DHCP's options."""
    made = struct.pack("!BBBBIHH", operation, 1, 6, 0, 0x1234, 0, 0) + bytes(4) + socket.inet_aton(yours)
    return made + bytes(8) + REMOTE + bytes(10 + 192) + bytes.fromhex("63825363") + options + b"\xff"


_POINTER = b"\xc0\x0c"
_MSS, _SACK_OK, _TIMES = (
    bytes.fromhex("020405b4"),
    bytes.fromhex("0402"),
    bytes.fromhex("080a0000000100000002"),
)
_NOP, _SCALE = b"\1", bytes.fromhex("030307")
_QUOTED = ipv4(UDP, struct.pack("!HHHH", 1234, 53, 8, 0), source=B, target=A)
_QUOTED6 = ipv6(UDP, struct.pack("!HHHH", 1234, 53, 8, 0), source=B6, target=A6)
_TARGET = socket.inet_pton(socket.AF_INET6, "fd00::9")

GOOD: dict[str, bytes] = {
    "tcp syn": tcp(0x02, options=_MSS + _SACK_OK + _TIMES + _NOP + _SCALE),
    "tcp syn ack": tcp(0x12, options=_MSS + _NOP + _NOP + _SACK_OK, ports=(80, 1000)),
    "tcp data": tcp(0x18, b"hello", options=_NOP + _NOP + _TIMES),
    "tcp ack": tcp(0x10, options=_NOP + _NOP + _TIMES, ports=(80, 1000)),
    "tcp sack": tcp(0x10, options=_NOP + _NOP + b"\5\x0a" + struct.pack("!II", 10, 20)),
    "tcp fin": tcp(0x11),
    "tcp reset": tcp(0x04, numbers=(0xFFFFFFFF, 0)),
    "tcp urgent": tcp(0x38, b"x", urgent=1),
    "tcp ecn": tcp(0xC2),
    "tcp no flags": tcp(0),
    "tcp sequence wraps": tcp(0x18, b"hello", numbers=(0xFFFFFFFE, 1)),
    "tcp over ipv6": tcp(0x18, b"hello", six=True),
    "udp": udp((1000, 2000), b"hello"),
    "udp empty": udp((1000, 2000)),
    "udp over ipv6": udp((1000, 2000), b"hello", six=True),
    "dns query": udp((1234, 53), dns(0x0100, [("example.com", 1)], [])),
    "dns answer": udp(
        (53, 1234),
        dns(
            0x8180,
            [("example.com", 1)],
            [(_POINTER, 1, bytes([1, 2, 3, 4])), (_POINTER, 1, bytes([5, 6, 7, 8]))],
        ),
    ),
    "dns names": udp(
        (53, 1234),
        dns(
            0x8580,
            [("www.example.com", 28)],
            [(_POINTER, 5, name("other.example")), (name("other.example"), 28, _TARGET)],
        ),
    ),
    "dns records": udp(
        (53, 1234),
        dns(
            0x8180,
            [("example.com", 255)],
            [
                (_POINTER, 15, b"\0\x0a" + name("mail.example.com")),
                (_POINTER, 2, b"\2ns" + _POINTER),
                (_POINTER, 16, b"\5hello"),
            ],
        ),
    ),
    "dns no such name": udp((53, 1234), dns(0x8183, [("nowhere.example", 1)], []), six=True),
    "dns over tcp": tcp(
        0x18, struct.pack("!H", 29) + dns(0x0100, [("example.com", 1)], []), ports=(1234, 53)
    ),
    "multicast dns": udp((5353, 5353), dns(0, [("box.local", 1)], []), target="224.0.0.251"),
    "dhcp discover": udp(
        (68, 67),
        dhcp(1, b"\x35\1\1\x0c\3box\x32\4" + socket.inet_aton("10.0.0.5")),
        source="0.0.0.0",
        target="255.255.255.255",
    ),
    "dhcp ack": udp((67, 68), dhcp(2, b"\x35\1\5\x36\4" + socket.inet_aton(A), yours="10.0.0.5")),
    "dhcpv6": udp((546, 547), b"\1\0\x12\x34\0\1\0\2ab", six=True),
    "icmp echo request": icmp(8, 0, struct.pack("!HH", 1, 2) + bytes(56)),
    "icmp echo reply": icmp(0, 0, struct.pack("!HH", 1, 2) + bytes(56)),
    "icmp port unreachable": icmp(3, 3, bytes(4) + _QUOTED),
    "icmp host unreachable": icmp(3, 1, bytes(4) + _QUOTED),
    "icmp fragmentation needed": icmp(3, 4, b"\0\0\5\x78" + _QUOTED),
    "icmp time exceeded": icmp(11, 0, bytes(4) + _QUOTED),
    "icmp redirect": icmp(5, 1, socket.inet_aton("10.0.0.9") + _QUOTED),
    "icmpv6 echo": icmpv6(128, 0, struct.pack("!HH", 1, 2) + bytes(56)),
    "icmpv6 solicitation": icmpv6(135, 0, bytes(4) + _TARGET + b"\1\1" + REMOTE),
    "icmpv6 advertisement": icmpv6(136, 0, b"\x60\0\0\0" + _TARGET + b"\2\1" + REMOTE),
    "icmpv6 router solicitation": icmpv6(133, 0, bytes(4)),
    "icmpv6 too big": icmpv6(2, 0, struct.pack("!I", 1280) + _QUOTED6),
    "icmpv6 port unreachable": icmpv6(1, 4, bytes(4) + _QUOTED6),
    "arp request": arp(1),
    "arp reply": arp(2),
    "vlan": vlan(udp((1000, 2000), b"hello"), 0x2005),
    "two vlans": vlan(vlan(arp(1), 7), 0x0009, 0x88A8),
    "first fragment": ethernet(
        0x0800, ipv4(UDP, struct.pack("!HHHH", 1000, 2000, 1008, 0) + bytes(72), fragment=0x2000)
    ),
    "later fragment": ethernet(0x0800, ipv4(UDP, bytes(80), fragment=0x000A)),
    "ipv6 fragment": ethernet(0x86DD, ipv6(44, struct.pack("!BxHI", UDP, 80, 9) + bytes(32))),
    "ipv6 extension": ethernet(
        0x86DD, ipv6(0, bytes([UDP, 0, 1, 4, 0, 0, 0, 0]) + struct.pack("!HHHH", 1000, 2000, 8, 0xFFFF))
    ),
    "ipv4 options": ethernet(
        0x0800, ipv4(UDP, struct.pack("!HHHH", 1000, 2000, 13, 0) + b"hello", options=b"\1\1\1\0")
    ),
    "padding": arp(1) + bytes(18),
    "padding behind udp": udp((1000, 2000), b"hi") + bytes(16),
    "sctp": ethernet(0x0800, ipv4(132, bytes(20))),
    "unknown protocol": ethernet(0x0800, ipv4(253, bytes(20))),
    "lldp": ethernet(0x88CC, bytes.fromhex("0207040200000000010000")),
    "unknown ethertype": ethernet(0x88B5, bytes(range(46))),
    "llc": LOCAL + REMOTE + struct.pack("!H", 6) + bytes.fromhex("424203000000") + bytes(40),
}

# Frames with an invalid field in one header.
BAD: dict[str, bytes] = {
    "ipv4 version": ethernet(0x0800, b"\x55" + ipv4(UDP, bytes(20))[1:]),
    "ipv4 short header": ethernet(0x0800, b"\x42" + ipv4(UDP, bytes(20))[1:]),
    "ipv4 length below header": ethernet(0x0800, ipv4(UDP, bytes(20), total=12)),
    "ipv4 length above frame": ethernet(0x0800, ipv4(UDP, struct.pack("!HHHH", 1, 2, 28, 0), total=48)),
    "ipv4 length zero": ethernet(
        0x0800, ipv4(TCP, struct.pack("!HHIIHHHH", 1, 2, 3, 4, 0x5010, 5, 0, 0), total=0)
    ),
    "ipv6 version": ethernet(0x86DD, b"\x40" + ipv6(UDP, bytes(20))[1:]),
    "ipv6 extension too long": ethernet(0x86DD, ipv6(0, bytes([UDP, 200]) + bytes(30))),
    "tcp short header": ip(TCP, struct.pack("!HHIIHHHH", 1, 2, 3, 4, 0x3010, 5, 0, 0), 16),
    "tcp long header": ip(TCP, struct.pack("!HHIIHHHH", 1, 2, 3, 4, 0xF010, 5, 0, 0), 16),
    "tcp option without length": tcp(0x10, options=b"\1\1\1\x08"),
    "tcp option of length 0": tcp(0x10, options=b"\x08\0\0\0"),
    "udp length below header": ip(UDP, struct.pack("!HHHH", 1, 2, 3, 0) + bytes(8), 6),
    "udp length above packet": ip(UDP, struct.pack("!HHHH", 1, 2, 100, 0) + bytes(8), 6),
    "dns name that loops": udp((1234, 53), dns(0x0100, [], [(_POINTER, 1, bytes(4))])),
    "dns label of another type": udp((1234, 53), struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x41abc"),
    "dns more than there is": udp(
        (53, 1234), dns(0x8180, [("example.com", 1)], [])[:7] + b"\xff" * 5 + b"\0"
    ),
    "dhcp operation": udp((67, 68), dhcp(9, b"")),
    "dhcp option too long": udp((67, 68), dhcp(2, b"\x35\xf0")),
    "terminal escapes": udp((1234, 53), dns(0, [("\x1b[31mred\n", 1)], [])),
}
