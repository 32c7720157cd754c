"""Frames of several protocols and filter expressions about them, made by a seeded generator."""

from __future__ import annotations

import random
import struct

from linkrx.testing.rigs import LOCAL, REMOTE

_ADDRESSES = ("10.0.0.1", "10.0.0.2", "192.168.7.9")
_PORTS = (53, 67, 68, 80, 547)


def ip_bytes(address: str) -> bytes:
    """The four bytes of an IPv4 address."""
    return bytes(int(part) for part in address.split("."))


def ipv4(
    protocol: int, body: bytes, *, source: str = "10.0.0.1", target: str = "10.0.0.2", fragment: int = 0
) -> bytes:
    """An IPv4 packet."""
    size = 20 + len(body)
    addresses = ip_bytes(source) + ip_bytes(target)
    return struct.pack("!BBHHHBBH", 0x45, 0, size, 1, fragment, 64, protocol, 0) + addresses + body


def ports(source: int, target: int, body: bytes = b"") -> bytes:
    """A UDP header and its payload. A TCP header also begins with the ports."""
    return struct.pack("!HHHH", source, target, 8 + len(body), 0) + body


def udp(target: int, size: int = 60, source: int = 1000) -> bytes:
    """An Ethernet frame of `size` bytes to a UDP port."""
    return LOCAL + REMOTE + b"\x08\x00" + ipv4(17, ports(source, target, bytes(size - 42)))


def tagged(frame: bytes, tci: int, tpid: int = 0x8100) -> bytes:
    """The frame with a VLAN tag."""
    return frame[:12] + struct.pack("!HH", tpid, tci) + frame[12:]


def any_frame(chosen: random.Random) -> bytes:
    """An Ethernet frame of one of the protocols in the expressions. One frame in eight is cut at a random length."""
    local = chosen.choice((LOCAL, b"\xff" * 6, bytes.fromhex("01005e000001")))
    source, target = chosen.choice(_PORTS), chosen.choice(_PORTS)
    body = ports(source, target, chosen.randbytes(chosen.randrange(12, 60)))
    kind = chosen.randrange(6)
    if kind < 3:
        protocol = chosen.choice((1, 6, 17, 17, 132))
        fragment = chosen.choice((0, 0, 0, 0x2000, 0x0010))
        addresses = {"source": chosen.choice(_ADDRESSES), "target": chosen.choice(_ADDRESSES)}
        frame = local + REMOTE + b"\x08\x00" + ipv4(protocol, body, fragment=fragment, **addresses)
    elif kind == 3:
        protocol = chosen.choice((6, 17, 58))
        frame = local + REMOTE + b"\x86\xdd"
        frame += struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + chosen.randbytes(32) + body
    elif kind == 4:
        frame = local + REMOTE + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, chosen.choice((1, 2)))
        frame += chosen.randbytes(20)
    else:
        frame = local + REMOTE + chosen.choice((b"\x88\xb5", b"\x00\x26")) + chosen.randbytes(40)
    return frame[: chosen.randrange(15, len(frame))] if chosen.randrange(8) == 0 else frame


def any_expression(chosen: random.Random, *, link: bool = True, depth: int = 2) -> str:
    """An expression in tcpdump's language. `link`: whether it may read the link header."""
    if depth and chosen.randrange(3):
        left, right = (any_expression(chosen, link=link, depth=depth - 1) for _ in range(2))
        return chosen.choice((f"({left}) and ({right})", f"({left}) or ({right})", f"not ({left})"))
    simple = [
        "arp",
        "ip",
        "ip6",
        "tcp",
        "udp",
        "icmp",
        f"port {chosen.choice(_PORTS)}",
        f"udp port {chosen.choice(_PORTS)}",
        f"tcp src port {chosen.choice(_PORTS)}",
        f"udp portrange 60-{chosen.choice(_PORTS)}",
        f"host {chosen.choice(_ADDRESSES)}",
        f"src net {chosen.choice(('10.0.0.0/8', '192.168.0.0/16'))}",
        f"ip[8] = {chosen.choice((64, 3))}",
        f"udp[4:2] > {chosen.randrange(20, 70)}",
        "ip[6:2] & 0x1fff != 0",
        "ip proto 132",
        f"greater {chosen.randrange(50, 100)}",
        f"ip[2:2] - 20 < {chosen.randrange(20, 80)}",
        f"ip[{chosen.randrange(20, 70)}] & 1 = 1",
    ]
    if link:
        simple += [
            "ether broadcast",
            f"ether dst {LOCAL.hex(':')}",
            "ether proto 0x88b5",
            "ether multicast",
            "ether[12:2] < 1500",
        ]
    return chosen.choice(simple)
