"""DHCP messages of clients: RFC 2131 and RFC 2132."""

from __future__ import annotations

import socket
import struct

from linkrx.testing.rigs import LOCAL, REMOTE

REQUEST = 3  # DHCP message type


def frame(source: int, target: int, body: bytes, address: str = "0.0.0.0") -> bytes:
    """An Ethernet frame with a UDP packet over IPv4, from one port to another."""
    udp = struct.pack("!HHHH", source, target, 8 + len(body), 0) + body
    addresses = socket.inet_aton(address) + socket.inet_aton("255.255.255.255")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    return LOCAL + REMOTE + b"\x08\x00" + ip + udp


def request(
    kind: int = REQUEST,
    wanted: str | None = "10.0.0.9",
    hostname: bytes | None = b"phone",
    source: str = "0.0.0.0",
) -> bytes:
    """A DHCP message of a client, with this type, requested address and host name."""
    options = bytes([53, 1, kind])
    if wanted is not None:
        options += bytes([50, 4]) + socket.inet_aton(wanted)
    if hostname is not None:
        options += bytes([12, len(hostname)]) + hostname
    head = struct.pack("!4B3I", 1, 1, 6, 0, 1, 0, 0).ljust(28, b"\0") + REMOTE
    return frame(68, 67, head.ljust(236, b"\0") + b"\x63\x82\x53\x63" + options + b"\xff" + bytes(60), source)
