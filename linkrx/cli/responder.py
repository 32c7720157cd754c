"""A host in Python, which answers ARP, ICMP echo and UDP echo."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address
from typing import NamedTuple

from linkrx.kernel.uapi import ETHERTYPE_ARP, ETHERTYPE_IPV4
from linkrx.packets import Packet

# RFC 826: hardware (1: Ethernet) and protocol type, their address lengths, operation, sender's and target's addresses.
ARP = struct.Struct("!HHBBH6s4s6s4s")
ARP_FIXED = (1, ETHERTYPE_IPV4, 6, 4)
ARP_REQUEST, ARP_REPLY = 1, 2
# RFC 791: version and header length, service, total length, identification, flags and fragment offset, time to live,
# protocol, checksum, source, destination.
IPV4 = struct.Struct("!BBHHHBBH4s4s")
# RFC 792: type, code, checksum, identifier, sequence number.
ICMP = struct.Struct("!BBHHH")
ECHO_REPLY, ECHO_REQUEST = 0, 8
IPV4_PROTOCOL = 9  # offset in the header
# RFC 768: source and destination port, length, checksum.
UDP = struct.Struct("!HHHH")
ECHO_PORT = 7  # RFC 862


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071). It is 0 for data that includes a correct checksum."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


class Echo(NamedTuple):
    """An ICMP echo request or reply, with its source and destination address."""

    source: IPv4Address
    destination: IPv4Address
    kind: int
    identifier: int
    sequence: int
    payload: bytes

    @classmethod
    def parse(cls, packet: bytes) -> Echo | None:
        """Parse an IPv4 packet. None for any other packet, for a fragment, and if a checksum is wrong."""
        if len(packet) < IPV4.size:
            return None
        first, _, length, _, fragment, _, protocol, _, source, destination = IPV4.unpack_from(packet)
        header, message = packet[: (first & 0xF) * 4], packet[(first & 0xF) * 4 : length]
        whole = fragment & 0x3FFF == 0  # neither "more fragments" nor an offset
        if not whole or protocol != socket.IPPROTO_ICMP or len(message) < ICMP.size:
            return None
        if checksum(header) or checksum(message):
            return None
        kind, _, _, identifier, sequence = ICMP.unpack_from(message)
        if kind not in (ECHO_REPLY, ECHO_REQUEST):
            return None
        return cls(
            IPv4Address(source), IPv4Address(destination), kind, identifier, sequence, message[ICMP.size :]
        )

    def reply(self) -> Echo:
        """The reply to this request."""
        return self._replace(source=self.destination, destination=self.source, kind=ECHO_REPLY)

    def message(self) -> bytes:
        """The ICMP message."""
        unsummed = ICMP.pack(self.kind, 0, 0, self.identifier, self.sequence) + self.payload
        return unsummed[:2] + checksum(unsummed).to_bytes(2, "big") + unsummed[4:]

    def packet(self) -> bytes:
        """The IPv4 packet."""
        message = self.message()
        header = IPV4.pack(
            0x45,  # version 4, five words of header
            0,
            IPV4.size + len(message),
            0,
            0x4000,  # don't fragment
            64,
            socket.IPPROTO_ICMP,
            0,
            self.source.packed,
            self.destination.packed,
        )
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + message


class Responder:
    """Answers ARP, ICMP echo and the UDP echo protocol (RFC 862) for one address."""

    def __init__(self, hardware: bytes, address: IPv4Address) -> None:
        self._hardware = hardware
        self._address = address

    def answer(self, remote: bytes | None, protocol: int, packet: Packet) -> bytes | None:
        """The frame that answers a packet, for `Dispatcher.send`. None for a packet that needs no answer."""
        answer = None
        if protocol == ETHERTYPE_ARP:
            answer = self._answer_arp(bytes(packet.data))
        elif protocol == ETHERTYPE_IPV4:
            data = bytes(packet.data)
            udp = len(data) > IPV4.size and data[IPV4_PROTOCOL] == socket.IPPROTO_UDP
            answer = self._answer_udp(data) if udp else self._answer_echo(data)
        if answer is None or remote is None:
            return None
        return remote + self._hardware + protocol.to_bytes(2, "big") + answer

    def _answer_arp(self, data: bytes) -> bytes | None:
        if len(data) < ARP.size:
            return None
        *fixed, operation, sender_mac, sender, _, target = ARP.unpack_from(data)
        if (*fixed, operation, target) != (*ARP_FIXED, ARP_REQUEST, self._address.packed):
            return None
        return ARP.pack(*ARP_FIXED, ARP_REPLY, self._hardware, target, sender_mac, sender)

    def _answer_echo(self, data: bytes) -> bytes | None:
        echo = Echo.parse(data)
        if echo is None or (echo.kind, echo.destination) != (ECHO_REQUEST, self._address):
            return None
        return echo.reply().packet()

    def _answer_udp(self, data: bytes) -> bytes | None:
        """Swap addresses and ports. Both checksums stay right, because a sum does not depend on the order."""
        start = (data[0] & 0xF) * 4
        _, _, length, _, fragment, *_ = IPV4.unpack_from(data)
        source, destination = data[12:16], data[16:20]
        if (
            destination != self._address.packed
            or fragment & 0x3FFF
            or not start + UDP.size <= length <= len(data)
        ):
            return None
        from_port, to_port, *_ = UDP.unpack_from(data, start)
        if to_port != ECHO_PORT or checksum(data[:start]):
            return None
        ports = struct.pack("!HH", to_port, from_port)
        return data[:12] + destination + source + data[20:start] + ports + data[start + 4 : length]
