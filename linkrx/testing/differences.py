"""Formats packets for the message of a failing test: one line each, and the bytes in which two differ."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from linkrx.kernel.uapi import (
    ARPHRD_ETHER,
    ETH_ADDRESS_BYTES,
    ETH_HEADER_BYTES,
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
)

ROW = 16  # bytes in a row of a hex dump
ROWS_MOST = 8  # rows that are shown of a difference
PACKETS_MOST = 10  # packets that are listed

# Protocols with two ports in the first four bytes: RFC 9293, RFC 768.
_WITH_PORTS = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP"}
_NAMES = {socket.IPPROTO_ICMP: "ICMP", socket.IPPROTO_ICMPV6: "ICMPv6"}


def line_of(frame: bytes, ethernet: bool = True) -> str:
    """A frame in a line: addresses, protocol and length."""
    if not ethernet:
        return f"{_packet(_ip_protocol(frame), frame)}, {len(frame)} bytes"
    if len(frame) < ETH_HEADER_BYTES:
        return f"{len(frame)} bytes, too short for an Ethernet header: {frame.hex(' ')}"
    local, remote = frame[:ETH_ADDRESS_BYTES], frame[ETH_ADDRESS_BYTES : 2 * ETH_ADDRESS_BYTES]
    protocol = int.from_bytes(frame[12:14], "big")
    packet = _packet(protocol, frame[ETH_HEADER_BYTES:])
    return f"{remote.hex(':')} > {local.hex(':')}, {packet}, {len(frame)} bytes"


def _ip_protocol(packet: bytes) -> int:
    return {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(packet[0] >> 4 if packet else 0, 0)


def _packet(protocol: int, data: bytes) -> str:
    """A packet without its link header: addresses and protocol."""
    if protocol == ETHERTYPE_ARP and len(data) >= 28 and int.from_bytes(data[:2], "big") == ARPHRD_ETHER:
        sender, target = socket.inet_ntoa(data[14:18]), socket.inet_ntoa(data[24:28])
        kind = {1: "request", 2: "reply"}.get(data[7], f"operation {data[7]}")
        return f"ARP {kind} of {sender} ({data[8:14].hex(':')}) to {target}"
    if protocol == ETHERTYPE_IPV4 and len(data) >= 20:
        ends = (socket.inet_ntoa(data[12:16]), socket.inet_ntoa(data[16:20]))
        return f"IPv4 {_transport(data[9], data[(data[0] & 15) * 4 :], *ends)}"
    if protocol == ETHERTYPE_IPV6 and len(data) >= 40:
        ends = (
            socket.inet_ntop(socket.AF_INET6, data[8:24]),
            socket.inet_ntop(socket.AF_INET6, data[24:40]),
        )
        return f"IPv6 {_transport(data[6], data[40:], *ends)}"
    return f"protocol {protocol:#06x}"


def _transport(protocol: int, data: bytes, source: str, destination: str) -> str:
    if protocol in _WITH_PORTS and len(data) >= 4:
        ports = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
        return f"{source} > {destination}, {_WITH_PORTS[protocol]} {ports[0]} > {ports[1]}"
    name = _NAMES.get(protocol, f"protocol {protocol}")
    return f"{source} > {destination}, {name}"


def listed(frames: Sequence[bytes], ethernet: bool = True) -> Iterator[str]:
    """A numbered line for each of the first PACKETS_MOST frames, and the number of the others."""
    for number, frame in enumerate(frames[:PACKETS_MOST], 1):
        yield f"  {number}. {line_of(frame, ethernet)}"
    if len(frames) > PACKETS_MOST:
        yield f"  ... and {len(frames) - PACKETS_MOST} more"


def most_similar(expected: bytes, frames: Sequence[bytes]) -> int:
    """The index of the first frame that differs from the expected one in the fewest bytes."""

    def distance(frame: bytes) -> int:
        differing = sum(one != other for one, other in zip(expected, frame, strict=False))
        return differing + abs(len(expected) - len(frame))

    return min(range(len(frames)), key=lambda index: distance(frames[index]))


def difference(expected: bytes, came: bytes) -> Iterator[str]:
    """A hex dump of the rows in which two frames differ: - is expected, + came, ^ marks the differences."""
    rows = range(0, max(len(expected), len(came)), ROW)
    differing = [row for row in rows if expected[row : row + ROW] != came[row : row + ROW]]
    for row in differing[:ROWS_MOST]:
        one, other = expected[row : row + ROW], came[row : row + ROW]
        marks = " ".join("^^" if one[i : i + 1] != other[i : i + 1] else "  " for i in range(ROW))
        yield f"  - {row:04x}  {one.hex(' ')}".rstrip()
        yield f"  + {row:04x}  {other.hex(' ')}".rstrip()
        yield f"          {marks}".rstrip()
    if len(differing) > ROWS_MOST:
        yield f"  ... and {len(differing) - ROWS_MOST} rows more"
