"""TAP and TUN queues of new devices, with and without super-packets. A mark ends the frames of one injection."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

from linkrx import TunTap, _core
from linkrx.kernel.uapi import PACKET_VNET_HDR, SOL_PACKET, VNET_HEADER_BYTES
from linkrx.stages import segmentation as segment
from linkrx.testing.devices import Device
from support.super_packets import LOCAL, REMOTE, SOURCES

PATIENCE_MS = 30_000
LONGEST = 200_000
RTF_LOCAL = 0x80000000  # linux/ipv6_route.h
QUEUE = 20_000  # packets: more than the smallest segments of the largest super-packet

MAKES = [segment.PythonSegmenter] + ([segment.CSegmenter] if _core.lib else [])

# The frame that ends the frames of one injection.
MARKS = {"tap": LOCAL + REMOTE + b"\x88\xb5" + bytes(50), "tun": b"\x45" + bytes(8) + b"\xfd" + bytes(10)}


class Queue:
    """The queue of a new device, and a packet socket that sends frames through the device into the queue."""

    def __init__(self, mode: str, *, offload: bool) -> None:
        self.tap = TunTap(mode=mode, vnet_header=offload, offload=offload)
        self.prefix = VNET_HEADER_BYTES if offload else 0
        self.mark = MARKS[mode]
        self.mode = mode
        Device(self.tap.name).set(txqlen=QUEUE)
        Device(self.tap.name).set_up()
        self.sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.sender.bind((self.tap.name, 0))

    def close(self) -> None:
        self.sender.close()
        self.tap.close()

    def leaving(self, vnet: bytes, frame: bytes) -> list[bytes]:
        """Send a frame through the device. Returns the frames in the queue, with their prefixes."""
        self.sender.send(vnet + frame)
        return self.until_mark()

    def until_mark(self) -> list[bytes]:
        """The frames in the queue up to the mark, which is sent now."""
        self.sender.send(bytes(VNET_HEADER_BYTES) + self.mark)
        return list(self._read())

    def _read(self) -> Iterator[bytes]:
        poll = select.poll()
        poll.register(self.tap.fileno(), select.POLLIN)
        while True:
            try:
                data = os.read(self.tap.fileno(), LONGEST)
            except BlockingIOError:
                assert poll.poll(PATIENCE_MS), "the mark did not arrive"
                continue
            if data[self.prefix :] == self.mark:
                return
            if self.ours(data[self.prefix :]):
                yield data

    def ours(self, frame: bytes) -> bool:
        """Whether a frame is the test's own. The kernel also sends packets, for neighbour discovery."""
        if self.mode == "tap":
            return frame[6:12] == REMOTE
        return frame[12:16] == SOURCES[4] or frame[8:24] == SOURCES[6]


def local_route(address: str, name: str) -> bool:
    """Whether the kernel has a local route for an IPv6 address."""
    routes = [line.split() for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()]
    return any(
        route[:2] == [address, "80"] and int(route[8], 16) & RTF_LOCAL and route[9] == name
        for route in routes
    )
