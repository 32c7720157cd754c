"""`segment=True` on every backend, and every kind of source with super-packets."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from support.run import that_take
from support.super_packets import LOCAL, REMOTE, UDP, Super

import linkrx
from linkrx.backends.os_readv import OsReadv
from linkrx.kernel.uapi import ETH_P_ALL, PACKET_VNET_HDR, PACKET_VNET_HDR_SZ, SOL_PACKET
from linkrx.packets import Owner
from linkrx.stages import segmenting
from linkrx.testing import rigs
from linkrx.testing.devices import Device
from linkrx.testing.waiting import PATIENCE

PACKET_RX_RING = 5

pytestmark = pytest.mark.usefixtures("devices")

BACKENDS = that_take("packet")

Send = Callable[[bytes], object]


def sender_on(interface: str) -> socket.socket:
    """A packet socket that sends frames with a virtio-net header."""
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sender.bind((interface, 0))
    return sender


@contextmanager
def queue(mode: str) -> Iterator[tuple[Any, Send]]:
    """A queue with super-packets, and a function that sends to it."""
    with linkrx.TunTap(mode=mode, vnet_header=True, offload=True) as opened:
        Device(opened.name).set_up()
        with sender_on(opened.name) as sender:
            yield opened, sender.send


@contextmanager
def interface() -> Iterator[tuple[Any, Send]]:
    """An interface by name, and a function that sends to it."""
    with rigs.veth() as (near, far), sender_on(far) as sender:
        yield near, sender.send


@contextmanager
def packet() -> Iterator[tuple[Any, Send]]:
    """A borrowed packet socket, and a function that sends to it."""
    with (
        rigs.veth() as (near, far),
        sender_on(far) as sender,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed,
    ):
        borrowed.bind((near, ETH_P_ALL))
        yield borrowed, sender.send


@contextmanager
def datagrams() -> Iterator[tuple[Any, Send]]:
    """A datagram socket whose peer sends a virtio-net header in front of each frame."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        sender.setblocking(False)
        yield receiver, sender.send


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tap": (lambda: queue("tap"), {}),
    "tun": (lambda: queue("tun"), {}),
    "interface": (interface, {}),
    "packet": (packet, {}),
    "unix_dgram": (datagrams, {"vnet_header": True}),
}
CELLS = [
    pytest.param(kind, backend, id=f"{backend}-{kind}")
    for kind in SOURCES
    for backend in BACKENDS
    if backend in ("readv", "os_readv")
    or (backend == "recvmmsg" and kind in ("interface", "packet", "unix_dgram"))
    or (backend == "packet_mmap" and kind in ("interface", "packet"))
]

# Super-packets of TCP and UDP, a packet with an unfinished checksum, and the shortest packet of each.
CASES = [
    Super(),
    Super(version=6, payload=20_000),
    Super(protocol=UDP, size=1200, payload=7000),
    Super(version=6, protocol=UDP, size=500, payload=1100),
    Super(size=0, payload=1),
    Super(protocol=UDP, size=0, payload=900),
    Super(payload=60_000, size=536),
]


def frames_of(rx: linkrx.Dispatcher, wanted: int) -> list[bytes]:
    """Receive `wanted` frames of the tests. The kernel also sends packets, for neighbour discovery."""
    found: list[bytes] = []
    for batch in rx.batches(PATIENCE):
        found += [bytes(got) for got in batch if is_ours(got)]
        if len(found) >= wanted:
            break
    return found


def is_ours(got: linkrx.Packet) -> bool:
    """Whether a packet is of `CASES`."""
    if got.remote is not None:
        return got.remote == REMOTE
    return bytes(got.data[12:16]) == bytes([198, 51, 100, 1]) or bytes(got.data[8:12]) == bytes.fromhex(
        "20010db8"
    )


@contextmanager
def opened(kind: str, backend: str, **options: Any) -> Iterator[tuple[linkrx.Dispatcher, Send]]:
    """A dispatcher with segment=True, and a function that sends to it."""
    make, needed = SOURCES[kind]
    with (
        make() as (source, send),
        linkrx.open(source, backend=backend, segment=True, **needed, **options) as rx,
    ):
        yield rx, send


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_frames(kind: str, backend: str) -> None:
    """Super-packets are received as their frames, in order with other packets, and all checksums are complete."""
    cases = [replace(case, ethernet=kind != "tun") for case in CASES]
    with opened(kind, backend) as (rx, send):
        for case in cases:
            send(case.vnet() + case.frame())
        expected = [frame for case in cases for frame in case.frames()]
        assert frames_of(rx, len(expected)) == expected
        stats = rx.stats()
        assert (stats.malformed, stats.truncated, stats.runts, stats.empty) == (0, 0, 0, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_a_super_packet_larger_than_a_batch(kind: str, backend: str, batch_size: int) -> None:
    """Frames that do not fit into a batch are in the next batches, and no frame is lost."""
    cases = [replace(case, ethernet=kind != "tun") for case in (CASES[4], CASES[0], CASES[3], CASES[4])]
    with opened(kind, backend, batch_size=batch_size) as (rx, send):
        for case in cases:
            send(case.vnet() + case.frame())
        expected = [frame for case in cases for frame in case.frames()]
        sizes = []
        found: list[bytes] = []
        while len(found) < len(expected):
            batch = next(rx.batches(PATIENCE))
            sizes.append(len(batch))
            found += [bytes(got) for got in batch if is_ours(got)]
        assert found == expected
        assert max(sizes) <= batch_size


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_small_packets_come_together(backend: str) -> None:
    """Small packets come in large batches, and each receive is counted once."""
    with opened("unix_dgram", backend) as (rx, send):
        for _ in range(50):
            send(CASES[4].vnet() + CASES[4].frame())
        sizes: list[int] = []
        while sum(sizes) < 50:
            sizes.append(len(next(rx.batches(PATIENCE))))
        assert len(sizes) <= 3  # os_readv finds the stride with its first
        at_once = segmenting.AT_ONCE if backend == "recvmmsg" else 1
        assert rx.stats().receives == 50 / at_once


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_malformed(backend: str) -> None:
    """A packet with a wrong virtio-net header is counted and skipped, and its neighbours are received whole."""
    good = CASES[0]
    bad = [
        good.vnet(csum_start=5000) + good.frame(),
        good.vnet(gso_size=0) + good.frame(),
        good.vnet(gso_type=4) + good.frame(),
        good.vnet(gso_type=3) + good.frame(),
        good.vnet() + good.frame()[:40],
        CASES[4].vnet(csum_offset=60_000) + CASES[4].frame(),
    ]
    with opened("unix_dgram", backend) as (rx, send):
        for datagram in bad:
            send(datagram)
            send(good.vnet() + good.frame())
        expected = good.frames() * len(bad)
        assert frames_of(rx, len(expected)) == expected
        stats = rx.stats()
        assert (stats.malformed, stats.packets) == (len(bad), len(expected))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_malformed_before_the_end(backend: str) -> None:
    """If the peer closes after a malformed packet, the packet is counted and reception ends."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, sender, linkrx.open(receiver, backend=backend, vnet_header=True, segment=True) as rx:
        sender.send(CASES[0].vnet(gso_size=0) + CASES[0].frame())
        sender.close()
        assert list(rx.batches(PATIENCE)) == []
        assert rx.end is linkrx.End.EOF
        assert rx.stats().malformed == 1


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_deliver_and_the_vnet_header(backend: str) -> None:
    """Each frame is delivered separately, with addresses and a virtio-net header of zeroes."""
    got: list[linkrx.Packet] = []
    message: set[tuple[bytes | None, bytes | None, int]] = set()

    def deliver(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
        message.add((remote, local, protocol))
        got.append(packet)

    make, needed = SOURCES["unix_dgram"]
    with (
        make() as (source, send),
        linkrx.open(source, deliver, backend=backend, segment=True, **needed) as rx,
    ):
        send(CASES[0].vnet() + CASES[0].frame())
        send(CASES[4].vnet() + CASES[4].frame())
        while len(got) < len(CASES[0].frames()) + 1:
            assert rx.dispatch(PATIENCE)
    assert [bytes(packet) for packet in got] == CASES[0].frames() + CASES[4].frames()
    assert {packet.vnet for packet in got} == {linkrx.VnetHeader(0, 0, 0, 0, 0, 0)}
    assert message == {(REMOTE, LOCAL, 0x0800)}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_stop_within_a_super_packet(backend: str) -> None:
    """After a stop, received packets that were not delivered are counted: each frame of the batch, and a super-packet as one."""
    with opened("unix_dgram", backend, batch_size=2) as (rx, send):
        send(CASES[1].vnet() + CASES[1].frame())
        assert bytes(rx.recv(PATIENCE)) == CASES[1].frames()[0]
        rx.stop()
        assert list(rx.batches()) == []
        stats = rx.stats()
        assert (stats.packets, stats.undelivered) == (1, 2)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])
def test_polling_within_a_super_packet(backend: str) -> None:
    """fileno() is readable until the last frame of a super-packet was delivered, and not longer."""
    with opened("unix_dgram", backend, batch_size=1) as (rx, send):
        fd = rx.fileno()
        send(CASES[0].vnet() + CASES[0].frame())
        for frame in CASES[0].frames():
            assert readable(fd)
            assert bytes(rx.recv(0)) == frame
        with pytest.raises(TimeoutError):
            rx.recv(0)
        assert not readable(fd)


def readable(fd: int) -> bool:
    """Whether fileno() is readable."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


# Super-packets that are delivered whole.


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_whole(kind: str, backend: str) -> None:
    """Without segment=True a super-packet is one packet, and `vnet` has its kind, sizes and unfinished checksum."""
    case = replace(CASES[0], ethernet=kind != "tun", ecn=True)
    make, _ = SOURCES[kind]
    vnet_header = None if kind in ("tap", "tun") else True
    with make() as (source, send), linkrx.open(source, backend=backend, vnet_header=vnet_header) as rx:
        send(case.vnet(hdr_len=0 if kind == "unix_dgram" else case.headers) + case.frame())
        while not is_ours(got := rx.recv(PATIENCE)):
            pass
        assert bytes(got) == case.frame()
        assert got.vnet is not None
        assert (got.vnet.gso, got.vnet.ecn, got.vnet.gso_size) == (linkrx.Gso.TCPV4, True, case.size)
        assert got.vnet.hdr_len == case.headers
        assert got.vnet.needs_checksum
        assert (got.vnet.csum_start, got.vnet.csum_offset) == (case.transport, case.checksum_offset)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("recvmmsg", "packet_mmap")])
def test_a_tag_goes_with_every_frame(backend: str) -> None:
    """Each frame of a super-packet on a packet socket has its VLAN tag and timestamp."""
    case = replace(CASES[0], tags=(0x8100,))
    with opened("interface", backend, timestamps=True) as (rx, send):
        send(case.vnet() + case.frame())
        got: list[linkrx.Packet] = []
        while len(got) < len(case.frames()):
            got += [p for p in next(rx.batches(PATIENCE)) if is_ours(p)]
        assert {p.vlan for p in got} == {linkrx.Vlan(0x8100, 0x2005)}
        assert len({p.timestamp_ns for p in got}) == 1
        assert not any(p.checksum_unfinished for p in got)
        untagged = [frame[:12] + frame[16:] for frame in case.frames()]
        assert [bytes(p) for p in got] == untagged


# The virtio-net header of a packet socket.


def vnet_of(sock: socket.socket) -> int:
    """The size of the virtio-net header of a packet socket."""
    return sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 0),
        ({"segment": True}, 10),
        ({"vnet_header": True}, 10),
        ({"vnet_header": 10}, 10),
        ({"vnet_header": 12}, 12),
    ],
)
def test_a_borrowed_socket_is_set_back(options: dict[str, Any], size: int) -> None:
    """A borrowed packet socket has a virtio-net header while a dispatcher needs it, and its old setting after close."""
    with packet() as (borrowed, _):
        with linkrx.open(borrowed, backend=BACKENDS[-1], **options) as rx:
            assert vnet_of(borrowed) == size
            assert (rx.capabilities.vnet_header_size, rx.capabilities.hardware_gso) == (size, size > 0)
        assert vnet_of(borrowed) == 0


def test_a_socket_that_has_a_header_keeps_it() -> None:
    """A virtio-net header that the owner of a packet socket set is used, and not removed."""
    with packet() as (borrowed, send):
        borrowed.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, 12)
        with linkrx.open(borrowed, backend=BACKENDS[-1], segment=True) as rx:
            send(CASES[0].vnet() + CASES[0].frame())
            assert frames_of(rx, 3) == CASES[0].frames()
        assert vnet_of(borrowed) == 12


def test_a_socket_with_a_ring() -> None:
    """A packet socket that has a ring is refused with segment=True too, with the reason."""
    with packet() as (borrowed, _):
        borrowed.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("4I", 4096, 2, 2048, 4))
        with pytest.raises(linkrx.UnsupportedSource, match="has a ring"):
            linkrx.open(borrowed, segment=True)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": True}, "segment=True needs .* AF_UNIX datagram socket has none: pass vnet_header=True"),
        ({"segment": True, "vnet_header": True, "buffer_sizes": (2048,)}, "segment=True and buffer_sizes="),
    ],
)
def test_refused_on_datagrams(options: dict[str, Any], message: str) -> None:
    """An option that excludes segment=True raises an error that names it."""
    with datagrams() as (source, _), pytest.raises(linkrx.UnsupportedOption, match=message):
        linkrx.open(source, **options)


def test_refused_where_the_caller_denies_the_header() -> None:
    """vnet_header=False with segment=True on a queue with a header raises an error that names the contradiction."""
    with (
        queue("tap") as (tap, _),
        pytest.raises(linkrx.UnsupportedOption, match=r"vnet_header=False .* Leave out"),
    ):
        linkrx.open(tap, segment=True, vnet_header=False)


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_refused_on_a_queue_without_header(mode: str) -> None:
    """A queue without virtio-net header is refused with an error that shows how to open it with one."""
    with (
        linkrx.TunTap(mode=mode) as opened_queue,
        pytest.raises(
            linkrx.UnsupportedOption, match=f"TunTap.'{opened_queue.name}', '{mode}', vnet_header=True"
        ),
    ):
        linkrx.open(opened_queue, segment=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vnet_header": False}, "vnet_header=False .* Leave out vnet_header"),
        ({"buffer_sizes": (2048,)}, "exclude each other"),
    ],
)
def test_refused_on_an_interface(options: dict[str, Any], message: str) -> None:
    """On an interface too, an option that excludes segment=True raises an error that names it."""
    with interface() as (near, _), pytest.raises(linkrx.UnsupportedOption, match=message):
        linkrx.open(near, segment=True, **options)


def test_refused_on_a_cooked_socket() -> None:
    """A cooked packet socket is refused, and the error says which sources have a virtio-net header."""
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as cooked,
        pytest.raises(linkrx.UnsupportedOption, match="SOCK_RAW"),
    ):
        linkrx.open(cooked, segment=True, ethernet=False)


# Packets that a virtio-net header cannot describe.


class Refusing(OsReadv):
    """A source that drops every second packet with EINVAL, like the kernel if it cannot make the virtio-net header."""

    name = "refusing"
    rank = 5
    calls = 0

    def fill(self, arena: Owner, room: int) -> int:
        Refusing.calls += 1
        if Refusing.calls % 2:
            os.read(self._fd, 100_000)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().fill(arena, room)


def test_packets_that_the_kernel_cannot_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a virtio-net header, EINVAL of a read means one dropped packet, which is counted, and reception continues."""
    monkeypatch.setattr("linkrx.registry.classes", lambda: (Refusing,))
    Refusing.calls = 0
    with datagrams() as (source, send):
        source.setblocking(False)
        for _ in range(3):
            send(CASES[5].vnet() + CASES[5].frame())
        with linkrx.open(source, backend="refusing", vnet_header=True, batch_size=1) as rx:
            assert bytes(rx.recv(PATIENCE)) == CASES[5].frame()
            assert rx.stats().malformed == 1
