"""Super-packets that sockets of this host send become valid frames."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.queues import MAKES, PATIENCE_MS, Queue, local_route
from support.super_packets import (
    ACK,
    LOCAL,
    NOISE,
    REMOTE,
    SOURCES,
    TARGETS,
    TCP,
    UDP,
    Bench,
    Row,
    ones_complement,
)

from linkrx.kernel.uapi import VNET_HEADER_BYTES
from linkrx.memory.framing import Framing
from linkrx.testing.devices import Device
from linkrx.testing.waiting import until

pytestmark = pytest.mark.usefixtures("devices")

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
UDP_SEGMENT = 103  # linux/udp.h
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2  # linux/in.h
IPV6_AUTOFLOWLABEL = 70  # linux/in6.h
IFA_F_NODAD = 0x02
SYN = 0x02
MSS = 1300


class SenderQueue(Queue):
    """The queue of a device with addresses. Packets of neighbour discovery and group membership are skipped."""

    def ours(self, frame: bytes) -> bool:
        ip = frame[14:] if self.mode == "tap" else frame
        if ip[0] >> 4 == 4:
            return ip[9] in (TCP, UDP) and ip[12:16] == SOURCES[4]
        return ip[0] >> 4 == 6 and ip[6] in (TCP, UDP) and ip[8:24] == SOURCES[6]


@contextmanager
def connected(mode: str, *, offload: bool) -> Iterator[Queue]:
    """A queue whose device has the addresses of SOURCES, and permanent neighbours for those of TARGETS."""
    from pyroute2 import IPRoute

    queue = SenderQueue(mode, offload=offload)
    try:
        device = Device(queue.tap.name)
        if mode == "tap":
            device.set(address=REMOTE.hex(":"))
        settings = Path("/proc/sys/net/ipv6/conf", queue.tap.name)
        (settings / "accept_dad").write_text("0")
        (settings / "disable_ipv6").write_text("0")
        with IPRoute() as route:
            for version, length in ((4, 24), (6, 64)):
                address = socket.inet_ntop(FAMILIES[version], SOURCES[version])
                route.addr("add", index=device.index, address=address, prefixlen=length, flags=IFA_F_NODAD)
                if mode == "tap":
                    peer = socket.inet_ntop(FAMILIES[version], TARGETS[version])
                    route.neigh(
                        "replace", ifindex=device.index, dst=peer, lladdr=LOCAL.hex(":"), state="permanent"
                    )
        # The IPv6 addresses become local when a worker of the kernel has skipped duplicate address detection.
        address = SOURCES[6].hex()
        until(lambda: local_route(address, queue.tap.name))
        yield queue
    finally:
        queue.close()


def frames_of(queue: Queue, taken: list[bytes]) -> list[bytes]:
    """The frames of a queue. With a virtio-net header they are split by C and by Python."""
    if not queue.prefix:
        return taken
    framing = Framing(queue.mode == "tap", VNET_HEADER_BYTES)
    rows = [Row(data) for data in taken]
    split = [Bench(make, framing).all(rows) for make in MAKES]
    assert split[0] == split[-1]
    return [row.data[VNET_HEADER_BYTES:] for row in split[0]]


@pytest.mark.parametrize("size", [100, 1000, 1400])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_udp_segment(mode: str, version: int, size: int) -> None:
    """Datagrams that a socket sends with UDP_SEGMENT equal those that the kernel makes for a device without offloads."""
    sent = []
    for offload in (True, False):
        with (
            connected(mode, offload=offload) as queue,
            socket.socket(FAMILIES[version], socket.SOCK_DGRAM) as sender,
        ):
            sender.setsockopt(UDP, UDP_SEGMENT, size)
            if version == 4:
                # Without a connection, and with DF, the first identification is 0.
                sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
            else:
                sender.setsockopt(socket.IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, 0)
            sender.bind((socket.inet_ntop(FAMILIES[version], SOURCES[version]), 4000))
            peer = socket.inet_ntop(FAMILIES[version], TARGETS[version])
            for length in (size + 1, 5 * size, 5 * size + 1, 1, 40 * size):
                sender.sendto(NOISE[:length], (peer, 5000))
            taken = queue.until_mark()
            assert len(taken) == 5 or not offload
            sent.append(frames_of(queue, taken))
    assert sent[0] == sent[1]
    assert len(sent[0]) == 2 + 5 + 6 + 1 + 40


class Connection:
    """The far end of a TCP connection, implemented over a queue."""

    def __init__(self, queue: Queue, version: int) -> None:
        self.queue, self.version = queue, version
        self.link = 14 if queue.mode == "tap" else 0
        self.transport = self.link + (20 if version == 4 else 40)
        self.received = b""
        self.super_packets = 0
        self.first = 0
        self.ports = (0, 0)

    def segments(self) -> Iterator[bytes]:
        """TCP segments from the kernel, with verified checksums."""
        poll = select.poll()
        poll.register(self.queue.tap.fileno(), select.POLLIN)
        while True:
            assert poll.poll(PATIENCE_MS), "nothing came"
            with contextlib.suppress(BlockingIOError):
                data = os.read(self.queue.tap.fileno(), 70_000)
                if not self.queue.ours(data[self.queue.prefix :]):
                    continue
                self.super_packets += data[1] != 0
                for frame in frames_of(self.queue, [data]):
                    yield self._verified(frame)

    def _verified(self, frame: bytes) -> bytes:
        ip, l4 = frame[self.link : self.transport], frame[self.transport :]
        if self.version == 4:
            assert ones_complement(ip) == 0xFFFF
            assert int.from_bytes(ip[2:4], "big") == len(ip) + len(l4)
            addresses = ip[12:]
        else:
            assert int.from_bytes(ip[4:6], "big") == len(l4)
            addresses = ip[8:]
        assert ones_complement(addresses + struct.pack("!II", len(l4), TCP) + l4) == 0xFFFF
        return l4

    def answer(self, flags: int, number: int, acknowledged: int, options: bytes = b"") -> None:
        """Write a segment without payload."""
        source, target = TARGETS[self.version], SOURCES[self.version]
        size = 20 + len(options)
        head = struct.pack(
            "!HHIIBBHHH", *self.ports, number, acknowledged, size // 4 << 4, flags, 65_535, 0, 0
        )
        l4 = head + options
        checksum = 0xFFFF ^ ones_complement(source + target + struct.pack("!II", size, TCP) + l4)
        l4 = l4[:16] + checksum.to_bytes(2, "big") + l4[18:]
        if self.version == 4:
            ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, TCP, 0) + source + target
            ip = ip[:10] + (0xFFFF ^ ones_complement(ip)).to_bytes(2, "big") + ip[12:]
            link = REMOTE + LOCAL + b"\x08\x00"
        else:
            ip = struct.pack("!IHBB", 0x60000000, size, TCP, 64) + source + target
            link = REMOTE + LOCAL + b"\x86\xdd"
        os.write(self.queue.tap.fileno(), bytes(self.queue.prefix) + link[: self.link] + ip + l4)

    def receive(self, sender: socket.socket, stream: bytes) -> None:
        """Accept the connection of `sender`, let it send `stream`, and receive the whole of it."""
        sent = False
        for l4 in self.segments():
            source, target, number = struct.unpack_from("!HHI", l4)
            self.ports = (target, source)
            if l4[13] & SYN:
                self.first = number + 1
                self.answer(SYN | ACK, 1000, self.first, struct.pack("!BBHBBBB", 2, 4, MSS, 1, 3, 3, 7))
                sender.settimeout(PATIENCE_MS / 1000)
                if not sent:  # the kernel repeats a SYN that is not answered within a second
                    sender.sendall(stream)  # fits into its buffer
                    sent = True
                continue
            body = l4[(l4[12] >> 4) * 4 :]
            assert len(body) <= MSS
            if number == (self.first + len(self.received)) % 2**32:
                self.received += body
            self.answer(ACK, 1001, (self.first + len(self.received)) % 2**32)
            if len(self.received) == len(stream):
                break
        assert self.received == stream


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_tcp(mode: str, version: int) -> None:
    """A stream that a socket sends is received whole, in super-packets, and every segment has correct checksums."""
    stream = NOISE[:60_000]
    with connected(mode, offload=True) as queue, socket.socket(FAMILIES[version]) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        # Close with a reset, so that no more of its packets reach later tests.
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.setblocking(False)
        sender.bind((socket.inet_ntop(FAMILIES[version], SOURCES[version]), 0))
        with contextlib.suppress(BlockingIOError):
            sender.connect((socket.inet_ntop(FAMILIES[version], TARGETS[version]), 80))
        far = Connection(queue, version)
        far.receive(sender, stream)
    assert far.super_packets  # how many is a matter of when the answers came
