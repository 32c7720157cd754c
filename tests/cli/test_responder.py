"""The demo's responder at full speed: ARP, ping and UDP echo at once, with an account of every frame."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

import pytest
from pyroute2 import IPRoute
from support.run import that_take

import linkrx
from linkrx.cli.responder import ARP, ARP_FIXED, ARP_REPLY, ARP_REQUEST, ECHO_REQUEST, Echo, Responder
from linkrx.kernel.uapi import ETHERTYPE_ARP, SO_RCVBUFFORCE
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.waiting import PATIENCE, running, until

KERNEL, RESPONDER = IPv4Address("10.78.0.1"), IPv4Address("10.78.0.2")
HARDWARE = bytes.fromhex("020000000002")
UDP, PINGS, ASKED = 3000, 1000, 300
BUFFER = 64 * 1024 * 1024
QUEUE = 20_000


def counters(tap: linkrx.TunTap) -> dict[str, int]:
    """The device's counters. `tx` counts frames into the queue, `rx` frames that were written to it."""
    with IPRoute() as route:
        (link,) = route.get_links(socket.if_nametoindex(tap.name))
    stats: dict[str, int] = link.get("stats64")
    return {name: stats[name] for name in ("rx_packets", "tx_packets", "tx_dropped")}


@pytest.fixture
def tap() -> Any:
    """A TAP with an address, on which the kernel learns addresses only from the responder."""
    with linkrx.TunTap() as tap:
        device = Device(tap.name)
        device.set(txqlen=QUEUE)
        with IPRoute() as route:
            route.addr("add", index=device.index, address=str(KERNEL), prefixlen=24)
        device.set_up()
        yield tap


@pytest.mark.superuser
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("tap"))
def test_every_frame_is_accounted_for(backend: str, tap: linkrx.TunTap) -> None:
    """Each frame of the kernel is delivered, or counted as dropped. Each request is answered with its unchanged payload."""
    responder = Responder(HARDWARE, RESPONDER)
    answered = {"arp": 0, "ping": 0, "udp": 0}

    def deliver(remote: bytes | None, _local: object, protocol: int, packet: linkrx.Packet) -> None:
        answer = responder.answer(remote, protocol, packet)
        if answer is not None:
            rx.send(answer)
            kind = (
                "arp" if protocol == ETHERTYPE_ARP else "udp" if packet[23] == socket.IPPROTO_UDP else "ping"
            )
            answered[kind] += 1

    with (
        linkrx.open(tap, deliver, backend=backend) as rx,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger,
        injector_on(tap.name) as asking,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_ARP)) as watcher,
    ):
        before = counters(tap)  # the kernel may have sent its own packets already
        watcher.bind((tap.name, ETHERTYPE_ARP))
        for receiver in (udp, pinger, watcher):
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            receiver.settimeout(PATIENCE)
        udp.connect((str(RESPONDER), 7))
        pinger.connect((str(RESPONDER), 0))
        with running(rx.run):
            udp.send(b"first")  # the kernel first sends an ARP request
            assert udp.recv(100) == b"first"
            ask = ARP.pack(*ARP_FIXED, ARP_REQUEST, b"\x02" * 6, KERNEL.packed, bytes(6), RESPONDER.packed)
            threads = [
                threading.Thread(target=send)
                for send in (
                    lambda: [udp.send(struct.pack("!I", number)) for number in range(UDP)],
                    lambda: [pinger.send(echo(number).message()) for number in range(PINGS)],
                    lambda: [
                        asking.send(b"\xff" * 6 + b"\x02" * 6 + b"\x08\x06" + ask) for _ in range(ASKED)
                    ],
                )
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rx.stop(flush=True)
            until(lambda: rx.end is not None)
        told_by_rx, now = rx.stats(), counters(tap)
        grown = {name: now[name] - before[name] for name in now}
        lost = told_by_rx.kernel_drops or 0
        assert told_by_rx.packets + lost == now["tx_packets"] + now["tx_dropped"]
        assert told_by_rx.sent == sum(answered.values()) == grown["rx_packets"]
        if not lost:
            assert (answered["udp"], answered["ping"]) == (UDP + 1, PINGS)
            assert answered["arp"] >= ASKED
        numbers = [struct.unpack("!I", udp.recv(100))[0] for _ in range(answered["udp"] - 1)]
        assert numbers == sorted(set(numbers))
        echoes = [Echo.parse(pinger.recv(200)) for _ in range(answered["ping"])]
        assert echoes == [echo(one.sequence).reply() for one in echoes if one is not None]
        watcher.setblocking(False)
        replies = 0
        with suppress(BlockingIOError):
            while True:
                frame, (_, _, kind, *_rest) = watcher.recvfrom(100)
                replies += kind != socket.PACKET_OUTGOING and ARP.unpack_from(frame, 14)[4] == ARP_REPLY
        assert replies == answered["arp"]


def echo(number: int) -> Echo:
    """A ping that contains its number."""
    return Echo(KERNEL, RESPONDER, ECHO_REQUEST, os.getpid() & 0xFFFF, number, struct.pack("!I", number))
