"""Frames longer than 64 KiB: TCP over IPv6 on a veth pair whose gso_max_size allows them."""

from __future__ import annotations

import os
import random
import socket
from functools import partial
from pathlib import Path

import pytest
from support.queues import local_route
from support.run import that_take

import linkrx
from linkrx.kernel.namespace import inside, new_network
from linkrx.testing.devices import Device, raised_injector
from linkrx.testing.rigs import veth
from linkrx.testing.waiting import PATIENCE, running, until

pytestmark = pytest.mark.usefixtures("devices")

GSO_MAX_SIZE = 200_000
SOURCE_TEXTS_LARGEST = 65_664  # the sum of the source text's ladder
STREAM = random.Random(6).randbytes(8_000_000)

ETHERTYPE_IPV6 = 0x86DD
HOP_BY_HOP, TCP = 0, 6  # IPPROTO numbers
SYN = 0x02


def give_address(name: str) -> None:
    """Switch IPv6 on, which makes a link-local address, without duplicate address detection."""
    settings = Path("/proc/sys/net/ipv6/conf", name)
    (settings / "accept_dad").write_text("0")
    (settings / "disable_ipv6").write_text("0")


def link_local(name: str) -> str:
    """The link-local address of the interface, when the kernel accepts packets for it."""

    def found() -> list[str]:
        lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
        return [line.split()[0] for line in lines if line.startswith("fe80") and line.split()[-1] == name]

    # The interface has an address when link_watch has seen the carrier. The address becomes local when a worker of the kernel has
    # skipped duplicate address detection.
    until(found)
    (digits,) = found()
    until(partial(local_route, digits, name))
    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


def tcp_of(packet: linkrx.Packet) -> bytes | None:
    """The TCP segment of a packet, if it is one. The kernel puts a jumbo option (RFC 2675) in front of large ones."""
    if packet.protocol != ETHERTYPE_IPV6:
        return None
    data = bytes(packet.data)
    if data[6] == HOP_BY_HOP:
        return data[48:] if data[40] == TCP else None
    return data[40:] if data[6] == TCP else None


@pytest.mark.parametrize("backend", that_take("packet"))
def test_big_tcp_frames_are_whole(backend: str) -> None:
    """IPv6 BIG TCP frames above 65,664 bytes are received whole, with every byte that the sender wrote."""
    namespace = new_network()
    with veth() as (near, far):
        for device in (Device(near, far), Device(far, near)):
            device.set_mtu(1500)
            device.set(gso_max_size=GSO_MAX_SIZE)
        give_address(near)
        Device(far).move(namespace)
        try:
            inside(namespace, lambda: give_address(far))
            inside(namespace, lambda: raised_injector(far)).close()
            here = (link_local(near), 0, 0, socket.if_nametoindex(near))
            there = inside(namespace, lambda: (link_local(far), 0, 0, socket.if_nametoindex(far)))
            with (
                socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener,
                inside(namespace, lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) as sender,
                linkrx.open(near, backend=backend) as rx,
            ):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_000_000)
                listener.bind(here)
                listener.listen()
                sender.settimeout(PATIENCE)
                sender.bind(there)
                sender.connect((here[0], listener.getsockname()[1], 0, there[3]))
                packets = transfer(rx, listener, sender)
                dropped = rx.stats().kernel_drops
        finally:
            os.close(namespace)
    assert rx.capabilities.mtu == 1500
    assert not any(packet.truncated for packet in packets)
    assert max(map(len, packets)) > SOURCE_TEXTS_LARGEST
    first = None
    seen: set[int] = set()
    for packet in packets:
        segment = tcp_of(packet)
        if segment is None:
            continue
        sequence = int.from_bytes(segment[4:8], "big")
        if segment[13] & SYN:
            first = sequence + 1
        elif first is not None:
            body = segment[(segment[12] >> 4) * 4 :]
            at = (sequence - first) % 2**32
            if body:
                assert body == STREAM[at : at + len(body)]
                seen.update(range(at // 1000, -(-(at + len(body)) // 1000)))
    # Compare every thousand bytes, because segments are contiguous. A receiver that does not run for a while has no more room, and
    # then the kernel counts drops.
    assert len(seen) == len(STREAM) // 1000 or dropped


def transfer(rx: linkrx.Dispatcher, listener: socket.socket, sender: socket.socket) -> list[linkrx.Packet]:
    """Send STREAM over a connection, and return the packets that carried it."""
    packets: list[linkrx.Packet] = []
    accepted, _ = listener.accept()
    with accepted:
        accepted.settimeout(PATIENCE)

        def read_all() -> None:
            left = len(STREAM)
            while left:
                got = len(accepted.recv(1 << 20))
                assert got
                left -= got

        with running(read_all) as reading, running(lambda: sender.sendall(STREAM)):
            # Read meanwhile: the ring's timer closes a block each millisecond, so a ring that is not read has no more room.
            while reading.is_alive():
                for batch in rx.batches(0.01):
                    packets += batch
    rx.stop(flush=True)
    for batch in rx.batches():
        packets += batch
    return packets
