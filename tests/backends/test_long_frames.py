"""Frames longer than a block of a ring: the limit of a veth pair is raised after the ring was made."""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.received import needs_core

import linkrx
from linkrx.kernel.uapi import PACKET_VNET_HDR, SOL_PACKET
from linkrx.testing.devices import Device
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import PATIENCE, patiently

pytestmark = [pytest.mark.usefixtures("devices"), needs_core]

HEADERS = 14 + 40 + 20
LONG = 200_000  # bytes of TCP payload: more than a block of 128 KiB
SIZE = 1400  # bytes of payload in each segment
NEEDS_CSUM, TCPV6 = 1, 4  # linux/virtio_net.h
HEADER = struct.pack("=BBHHHH", NEEDS_CSUM, TCPV6, HEADERS, SIZE, 54, 16)


def super_packet(payload: int, sequence: int = 1) -> bytes:
    """TCP over IPv6. If the length does not fit into the length field, the field is 0, as in BIG TCP."""
    length = 20 + payload
    ip = struct.pack("!IHBB", 6 << 28, length if length < 65536 else 0, socket.IPPROTO_TCP, 64) + bytes(32)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, sequence, 1, 0x50, 0x10, 1000, 0, 0)
    return LOCAL + REMOTE + b"\x86\xdd" + ip + tcp + bytes(range(200)) * (payload // 200)


@contextmanager
def pair() -> Iterator[tuple[str, Device, socket.socket]]:
    """The near end, the far end, and a socket that sends super-packets on it."""
    with veth() as (near, far), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_000_000)  # as much as the kernel allows
        sender.bind((far, 0))
        yield near, Device(far), sender


def given_up(rx: linkrx.Dispatcher) -> int:
    """Receive until another backend has taken over from the ring. Returns the number of packets."""
    got = 0
    for _ in patiently(lambda: rx.backend == "recvmmsg"):
        got += sum(map(len, rx.batches(0.01)))
    return got


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of linkrx."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_limit_is_raised_after_open(caplog: pytest.LogCaptureFixture) -> None:
    """One frame is cut and flagged. Then recvmmsg takes over, no other frame is cut, and none is lost in between."""
    with pair() as (near, far, sender), linkrx.open(near) as rx:
        sender.send(HEADER + super_packet(60_000))
        assert bytes(rx.recv(PATIENCE)) == super_packet(60_000)
        far.set(gso_max_size=300_000)
        sender.send(HEADER + super_packet(LONG))
        cut = rx.recv(PATIENCE)
        assert (cut.truncated, cut.wire_length) == (True, LONG + HEADERS)
        assert bytes(cut) == super_packet(LONG)[: len(cut)]
        assert rx.backend == "packet_mmap"
        # Frames that came before the next receive are in the ring, and are received first.
        sender.send(HEADER + super_packet(1000, 2))
        assert bytes(rx.recv(PATIENCE)) == super_packet(1000, 2)
        assert given_up(rx) == 0
        for sequence in range(5):
            sender.send(HEADER + super_packet(LONG, sequence))
            whole = rx.recv(PATIENCE)
            assert (whole.truncated, bytes(whole)) == (False, super_packet(LONG, sequence))
        stats = rx.stats()
        assert (stats.truncated, stats.demotions, stats.packets) == (1, 1, 8)
        assert "packet_mmap   refused   refused at run time: a frame was cut" in rx.choice.explain()
    assert messages(caplog) == [
        f"packet_mmap on the AF_PACKET socket on {near}: a frame was cut that is longer than a block of the ring; going on "
        "with recvmmsg"
    ]


@pytest.mark.parametrize("options", [{"backend": "packet_mmap"}, {"fanout": 7}], ids=["named", "fanout"])
def test_no_other_backend_may_take_over(caplog: pytest.LogCaptureFixture, options: dict[str, Any]) -> None:
    """A ring that was named, or that an option needs, is kept. Each cut is flagged, and one warning says what to do."""
    with pair() as (near, far, sender), linkrx.open(near, **options) as rx:
        far.set(gso_max_size=300_000)
        for sequence in range(3):
            sender.send(HEADER + super_packet(LONG, sequence))
            cut = rx.recv(PATIENCE)
            assert (cut.truncated, cut.wire_length) == (True, LONG + HEADERS)
            assert list(rx.batches(0.01)) == []
        assert (rx.backend, rx.stats().truncated) == ("packet_mmap", 3)
        (said,) = messages(caplog)
        assert "Open it again" in said
    with pair() as (near, far, sender):
        far.set(gso_max_size=300_000)
        with linkrx.open(near, **options) as rx:
            sender.send(HEADER + super_packet(LONG))
            assert bytes(rx.recv(PATIENCE)) == super_packet(LONG)


@pytest.mark.parametrize(
    "options", [{"snaplen": 200}, {"buffer_sizes": (100, 100)}], ids=["snaplen", "ladder"]
)
def test_the_ring_is_kept_if_snaplen_fits(options: dict[str, Any]) -> None:
    """If `snaplen` fits into a block, nothing that was asked for is missing, and no other backend takes over."""
    with pair() as (near, far, sender), linkrx.open(near, **options) as rx:
        far.set(gso_max_size=300_000)
        for sequence in range(3):
            sender.send(HEADER + super_packet(LONG, sequence))
            packet = rx.recv(PATIENCE)
            assert (len(packet), packet.truncated, packet.wire_length) == (200, True, LONG + HEADERS)
            assert list(rx.batches(0.01)) == []
        assert (rx.backend, rx.stats().demotions) == ("packet_mmap", 0)


def test_super_packets_that_are_to_be_split() -> None:
    """With segment=True a cut super-packet counts as malformed or gives fewer frames, and later ones are split whole."""
    with pair() as (near, far, sender), linkrx.open(near, segment=True) as rx:
        far.set(gso_max_size=300_000)
        sender.send(HEADER + super_packet(LONG))
        before = given_up(rx)
        stats = rx.stats()
        assert stats.truncated > 0
        assert stats.malformed or before
        sender.send(HEADER + super_packet(LONG))
        frames = [rx.recv(PATIENCE).tobytes() for _ in range(-(-LONG // SIZE))]
        assert b"".join(frame[HEADERS:] for frame in frames) == super_packet(LONG)[HEADERS:]
        assert {len(frame) for frame in frames[:-1]} == {SIZE + HEADERS}
        assert rx.stats().truncated == stats.truncated


def test_the_drops_of_a_ring_that_is_given_up_stay_counted() -> None:
    """kernel_drops continues from the ring's count, so the sent packets equal the received and dropped ones."""
    with pair() as (near, far, sender), linkrx.open(near, receive_buffer=1) as rx:
        for sequence in range(3000):
            sender.send(HEADER + super_packet(1000, sequence))
        for _ in patiently(lambda: rx.stats().packets + (rx.stats().kernel_drops or 0) == 3000):
            for _batch in rx.batches(0.01):
                pass
        drops = rx.stats().kernel_drops
        assert drops
        far.set(gso_max_size=300_000)
        sender.send(HEADER + super_packet(LONG))
        given_up(rx)
        sender.send(HEADER + super_packet(1000))
        rx.recv(PATIENCE)
        assert rx.stats().packets == 3000 - drops + 2
        assert rx.stats().kernel_drops == drops


@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_devices_above_a_pair(kind: str) -> None:
    """A ring on a device above one end of a pair has blocks for the other end's limit, so no frame is cut."""
    with pair() as (near, far, sender):
        far.set(gso_max_size=300_000)
        name = near + "m"  # deleted with the device below
        add = ["ip", "link", "add", name, "link", near, "type", kind, "mode", "passthru"]
        subprocess.run(add, check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        with linkrx.open(name) as rx:
            sender.send(HEADER + super_packet(LONG))
            packet = rx.recv(PATIENCE)
            assert (packet.truncated, packet.wire_length) == (False, LONG + HEADERS)
            assert bytes(packet) == super_packet(LONG)
            assert rx.backend == "packet_mmap"
