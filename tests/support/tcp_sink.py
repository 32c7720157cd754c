"""A TCP host in Python. The kernel streams data to it over one connection through a TAP.

It accepts segments in order, checks every byte, and acknowledges once per batch. It drops segments that come out of order, and
the kernel must send them again. On a TAP whose queue is longer than the window, no segment is lost.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

import linkrx
from linkrx.cli.responder import IPV4, checksum
from linkrx.kernel.uapi import ETH_HEADER_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from linkrx.packets.headers import mac
from linkrx.testing.waiting import PATIENCE, running

# How segments are received: split by the kernel, split by linkrx, or whole.
WHOLE = {"vnet_header": True, "offload": True}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kernel": ({}, {}),
    "segment": (WHOLE, {"segment": True}),
    "whole": (WHOLE, {}),
}

HARDWARE = bytes.fromhex("020000000002")
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
KERNEL = {4: "10.77.0.1", 6: "fd77::1"}
SINK = {4: "10.77.0.2", 6: "fd77::2"}
PREFIX_LENGTHS = {4: 24, 6: 64}
IFA_F_NODAD = 0x02  # linux/if_addr.h
PORT = 5001

ETHERTYPES = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}
IP_BYTES = {4: 20, 6: 40}
# The offset of the protocol in the IP header. The kernel sends a stream without options and extension headers.
PROTOCOL_AT = {4: 9, 6: 6}
TCP = socket.IPPROTO_TCP
# RFC 9293: ports, sequence and acknowledgement number, data offset, flags, window, checksum, urgent pointer.
HEADER = struct.Struct("!HHIIBBHHH")
FIN, SYN, ACK = 0x01, 0x02, 0x10
# RFC 7323, as Linux lays it out in every segment but a SYN: two NOPs, kind 8, length 10.
TIMESTAMPS = b"\x01\x01\x08\x0a"
MTU = 1500
# A megabyte of frames of that size: less than the 1000 that a TAP's queue holds.
WINDOW, WINDOW_SCALE = 0xFFFF, 4

PATTERN_BYTES = 1_000_003
LONGEST = 65_536


@cache
def pattern() -> bytes:
    """The repeated part of the stream, PATTERN_BYTES long, followed by its first LONGEST bytes."""
    noise = random.Random(5001).randbytes(PATTERN_BYTES)
    return noise + noise[:LONGEST]


class Sink:
    """Receives one connection.

    `received` counts bytes of the stream. `ahead` and `repeated` count segments out of order. `finished` is true after the
    kernel closed its end and was answered. `pattern` is the expected stream.
    """

    def __init__(self, tap: linkrx.TunTap, version: int, *, timestamps: bool = False) -> None:
        """Listen for a connection over IPv4 or IPv6."""
        self.received = self.ahead = self.repeated = self.acknowledgements = 0
        self.finished = False
        self._fd = tap.fileno()
        self._timestamps = timestamps
        self._prefix = bytes(linkrx.probe(tap).vnet_header_size)  # no checksum offload, no segmentation
        self._version = version
        self._addresses = [socket.inet_pton(FAMILIES[version], ends[version]) for ends in (SINK, KERNEL)]
        self._transport = ETH_HEADER_BYTES + IP_BYTES[version]
        self._link = b""
        self._port = 0  # the kernel's
        self._first = 0  # the sequence number of the first byte of the stream
        self._sent = 0  # our sequence number: a SYN takes one, a FIN another
        self._echo = bytes(4)  # the kernel's last timestamp
        self.pattern = pattern()

    def take(self, batch: linkrx.Batch) -> None:
        """Process all packets of a batch, and send one acknowledgement."""
        memory, protocol, transport = batch.memory, ETHERTYPES[self._version], self._transport
        at = ETH_HEADER_BYTES + PROTOCOL_AT[self._version]
        answer = False
        for start, length, found in zip(
            batch.starts.tolist(), batch.lengths.tolist(), batch.protocols.tolist(), strict=True
        ):
            if found == protocol and memory[start + at] == TCP:
                if not self._link:
                    self._link = (
                        bytes(memory[start + 6 : start + 12]) + HARDWARE + memory[start + 12 : start + 14]
                    )
                answer |= self._segment(memory[start + transport : start + length])
        if answer:
            self._send(FIN | ACK if self.finished else ACK)
            self.acknowledgements += 1

    def _segment(self, segment: memoryview) -> bool:
        """Process one segment or super-packet. Returns whether it must be acknowledged."""
        port, _, sequence, _, offset, flags, *_ = HEADER.unpack_from(segment)
        payload = segment[(offset >> 4) * 4 :]
        if flags & SYN:
            self._port, self._first = port, sequence + 1
            self._accept(segment[HEADER.size : -len(payload) or None])
            return False
        if self._timestamps and segment[HEADER.size : HEADER.size + 4] == TIMESTAMPS:
            self._echo = bytes(segment[HEADER.size + 4 : HEADER.size + 8])
        ahead = (sequence - self._first - self.received) & 0xFFFFFFFF
        if 0 < ahead < 1 << 31:
            self.ahead += 1
            return True
        known = -ahead & 0xFFFFFFFF
        if known and known >= len(payload) and not flags & FIN:
            self.repeated += 1
            return len(payload) > 0
        fresh = payload[known:] if known else payload
        if not self.pattern.startswith(fresh, self.received % PATTERN_BYTES):
            raise AssertionError(f"wrong byte in the {len(fresh)} bytes after byte {self.received}")
        self.received += len(fresh)
        self.finished |= bool(flags & FIN)
        return len(fresh) > 0 or self.finished

    def _accept(self, asked: memoryview) -> None:
        self._timestamps = self._timestamps and b"\x08\x0a" in bytes(asked)
        mss = MTU - IP_BYTES[self._version] - HEADER.size
        self._sent = 0
        self._send(SYN | ACK, struct.pack("!BBHBBBB", 2, 4, mss, 1, 3, 3, WINDOW_SCALE))
        self._sent = 1

    def _send(self, flags: int, options: bytes = b"") -> None:
        if self._timestamps:
            options += (
                TIMESTAMPS + struct.pack("!I", time.monotonic_ns() // 1_000_000 & 0xFFFFFFFF) + self._echo
            )
        following = (self._first + self.received + self.finished) & 0xFFFFFFFF
        offset = (HEADER.size + len(options)) // 4 << 4
        tcp = HEADER.pack(PORT, self._port, self._sent, following, offset, flags, WINDOW, 0, 0) + options
        source, target = self._addresses
        total = checksum(source + target + struct.pack("!II", len(tcp), TCP) + tcp)
        tcp = tcp[:16] + total.to_bytes(2, "big") + tcp[18:]
        if self._version == 4:
            ip = IPV4.pack(0x45, 0, IPV4.size + len(tcp), 0, 0x4000, 64, TCP, 0, source, target)
            ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
        else:
            ip = struct.pack("!IHBB", 6 << 28, len(tcp), TCP, 64) + source + target
        os.write(self._fd, self._prefix + self._link + ip + tcp)


def send(version: int, total: int) -> None:
    """The kernel's end: connect, send `total` bytes of the pattern, close, and wait for the other end to close."""
    piece = memoryview(pattern())[:PATTERN_BYTES]
    with socket.socket(FAMILIES[version], socket.SOCK_STREAM) as sender:
        sender.settimeout(PATIENCE)
        sender.bind((KERNEL[version], 0))
        sender.connect((SINK[version], PORT))
        for sent in range(0, total, PATTERN_BYTES):
            sender.sendall(piece[: total - sent])
        sender.shutdown(socket.SHUT_WR)
        assert sender.recv(1) == b""


@contextmanager
def stream(
    mode: str, version: int, total: int, *, timestamps: bool = False
) -> Iterator[tuple[linkrx.Dispatcher, Sink]]:
    """A connection on a new TAP, over which the kernel sends `total` bytes.

    The caller passes batches of the dispatcher to the sink until the sink is finished.
    """
    queue, options = MODES[mode]
    with linkrx.TunTap(**queue) as tap:
        _give_addresses(tap.name)
        with linkrx.open(tap, **options) as rx, running(lambda: send(version, total)):
            yield rx, Sink(tap, version, timestamps=timestamps)


def _give_addresses(name: str) -> None:
    """Give the kernel its addresses on the TAP, and the link address of the sink."""
    Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("0")
    index = socket.if_nametoindex(name)
    with IPRoute() as route:
        route.link("set", index=index, state="up")
        for version, address in KERNEL.items():
            # Without IFA_F_NODAD the kernel cannot send from an IPv6 address until duplicate address detection has ended.
            flags = IFA_F_NODAD if version == 6 else 0
            route.addr("add", index=index, address=address, prefixlen=PREFIX_LENGTHS[version], flags=flags)
            route.neigh("add", dst=SINK[version], lladdr=mac(HARDWARE), ifindex=index, state="permanent")
