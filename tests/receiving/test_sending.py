"""Sending, beyond the conformance checks: headers in front of frames, refused frames, and concurrent calls."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.pairs import BACKENDS, Pair, frame, pair
from support.run import that_take

import linkrx
from linkrx.kernel.namespace import bring_up
from linkrx.kernel.uapi import (
    ETH_P_ALL,
    IFF_TAP,
    IFF_TUN,
    IFF_VNET_HDR,
    IFNAMSIZ,
    PACKET_VNET_HDR,
    SOL_PACKET,
    TUNSETIFF,
    TUNSETVNETLE,
)
from linkrx.packets import restore_packet
from linkrx.packets.headers import CHECKSUM_UNFINISHED, VLAN
from linkrx.testing.devices import Device
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.stops import alarmed
from linkrx.testing.waiting import PATIENCE, running, until

TESTS = Path(__file__).parent.parent
ETHERNET = LOCAL + REMOTE + b"\x08\x00"
LITTLE, BIG = 1, 2
# The fields of a virtio-net header: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
TCP = (1, 1, 54, 1448, 34, 16)


def packet(body: bytes, **fields: Any) -> linkrx.Packet:
    """A packet with this frame and metadata."""
    order = fields.get("order", LITTLE) if "vnet" in fields else 0
    vnet = struct.pack(">BBHHHH" if order == BIG else "<BBHHHH", *fields["vnet"]) if order else b""
    tag = fields.get("tag", (0, 0))
    flags = fields.get("flags", 0) | (VLAN if "tag" in fields else 0)
    link_header = fields.get("link_header", 14)
    return restore_packet(
        *(1, body, 0, len(body), 0, fields.get("protocol", 0x0800), flags),
        *(tag[1], tag[0], 1 if link_header else 0xFFFE, b"", link_header, order, vnet, 0),
    )


@pytest.fixture
def ends() -> Iterator[Pair]:
    """A datagram pair."""
    with pair() as found:
        yield found


# Headers in front of a frame, and VLAN tags.


def test_a_packet_is_sent_tagged(ends: Pair) -> None:
    """A packet is sent with the VLAN tag that the kernel took out, behind the addresses, alone and in a batch."""
    one = packet(ETHERNET + b"body", tag=(0x88A8, 0x2005))
    with linkrx.open(ends[0]) as rx:
        rx.send(one)
        assert rx.send_batch([one, bytes(one)]) == 2
        assert [ends[1].recv(100) for _ in range(3)] == [one.tagged(), one.tagged(), bytes(one)]
    assert one.tagged() == LOCAL + REMOTE + b"\x88\xa8\x20\x05\x08\x00body"


def test_without_addresses_there_is_no_tag(ends: Pair) -> None:
    """A packet of a cooked socket has no place for its tag, so `tagged()` is the frame, and it is sent without a tag."""
    one = packet(b"\x45" + bytes(30), link_header=0, tag=(0x8100, 5))
    with linkrx.open(ends[0], ethernet=False) as rx:
        rx.send(one)
        assert ends[1].recv(100) == bytes(one) == one.tagged()


@pytest.mark.parametrize("size", [10, 12, 4096])
@pytest.mark.parametrize("order", [LITTLE, BIG])
def test_a_packet_keeps_its_virtio_net_header(ends: Pair, size: int, order: int) -> None:
    """A packet is sent with its virtio-net header, in the byte order and length of the source, with offsets moved by a tag. The header of `bytes` is all zeroes."""
    one = packet(ETHERNET + bytes(60), vnet=TCP, order=order)
    two = packet(ETHERNET + bytes(60), vnet=TCP, order=order, tag=(0x8100, 5))
    plain = packet(ETHERNET + bytes(60), vnet=(0, 0, 0, 0, 0, 0), order=order, tag=(0x8100, 5))
    native = "=BBHHHH"
    with linkrx.open(ends[0], vnet_header=size) as rx:
        assert rx.send_batch([one, two, plain, bytes(one)]) == 4
        got = [ends[1].recv(8192) for _ in range(4)]
    assert got[0] == struct.pack(native, *TCP).ljust(size, b"\0") + one.tagged()
    assert got[1] == struct.pack(native, 1, 1, 58, 1448, 38, 16).ljust(size, b"\0") + two.tagged()
    assert got[2] == bytes(size) + plain.tagged()
    assert got[3] == bytes(size) + bytes(one)


def test_packets_that_need_a_virtio_net_header(ends: Pair) -> None:
    """On a source without virtio-net header, super-packets and unfinished checksums raise ValueError, and other packets are sent."""
    unsendable = {
        "super-packet": packet(ETHERNET + bytes(60), vnet=TCP),
        "checksum is unfinished": packet(ETHERNET + bytes(60), vnet=(1, 0, 0, 0, 34, 16)),
        "the packet's checksum": packet(ETHERNET, flags=CHECKSUM_UNFINISHED),
    }
    with linkrx.open(ends[0]) as rx:
        for why, one in unsendable.items():
            with pytest.raises(ValueError, match=f"{why}.* has no virtio-net header"):
                rx.send(one)
            assert rx.send_batch([frame(1), one, frame(2)]) == 1
            with pytest.raises(ValueError, match=why):
                rx.send_batch([one, frame(2)])
            assert ends[1].recv(100) == frame(1)
        rx.send(packet(ETHERNET, vnet=(2, 0x80, 0, 0, 0, 0)))  # a valid checksum, and no kind of super-packet
        assert rx.stats().sent == 4
    with linkrx.open(ends[0], vnet_header=True) as rx, pytest.raises(ValueError, match="unfinished"):
        rx.send(packet(ETHERNET, flags=CHECKSUM_UNFINISHED))  # no header has the checksum's offset


def queue(mode: int, flags: int = 0) -> tuple[int, str]:
    """The queue of a new device, with packet information by default."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    answer = fcntl.ioctl(fd, TUNSETIFF, struct.pack(f"{IFNAMSIZ}sH22x", b"", mode | flags))
    name = os.fsdecode(answer[:IFNAMSIZ].rstrip(b"\0"))
    Device(name).set_up()
    return fd, name


def seen_on(name: str) -> socket.socket:
    """A cooked socket, which reports each packet's protocol."""
    seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    seen.bind((name, ETH_P_ALL))
    seen.settimeout(PATIENCE)
    return seen


def incoming(seen: socket.socket, ending: bytes) -> tuple[bytes, int]:
    """The next packet that ends with these bytes, and its protocol."""
    while True:
        data, (_, protocol, *_rest) = seen.recvfrom(2000)
        if data.endswith(ending):
            return data, protocol


@pytest.mark.usefixtures("devices")
def test_packet_information() -> None:
    """struct tun_pi in front of a TUN packet has the packet's EtherType, or that of the IP version for bytes. Other bytes raise an error."""
    fd, name = queue(IFF_TUN)
    with os.fdopen(fd, "r+b", buffering=0), seen_on(name) as seen, linkrx.open(fd, packet_info=True) as rx:
        rx.send(b"\x45" + b"four")
        assert incoming(seen, b"four") == (b"\x45four", 0x0800)
        assert rx.send_batch([b"\x60" + b"six", packet(b"\x45MPLS", protocol=0x8847, link_header=0)]) == 2
        assert incoming(seen, b"six") == (b"\x60six", 0x86DD)
        assert incoming(seen, b"MPLS") == (b"\x45MPLS", 0x8847)
        for neither in (b"\x00", b""):
            with pytest.raises(ValueError, match=r"neither IPv4 nor IPv6.*struct tun_pi"):
                rx.send(neither)
        assert rx.stats().sent == 3


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("little", [False, True])
def test_packet_information_and_a_virtio_net_header(little: bool) -> None:
    """Packet information and virtio-net header are sent in front of a TAP frame, in the byte order of the queue."""
    fd, name = queue(IFF_TAP, IFF_VNET_HDR)
    with os.fdopen(fd, "r+b", buffering=0), seen_on(name) as seen:
        if little:
            fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
        with linkrx.open(fd, packet_info=True) as rx:
            udp = struct.pack("!HHHH", 9, 9, 12, 0xFFFF)  # a checksum to finish
            ip = struct.pack("!BBHHHBBH8x", 0x45, 0, 32, 0, 0, 64, 17, 0)
            body = ETHERNET + ip + udp + b"body"
            rx.send(packet(body, vnet=(1, 0, 0, 0, 34, 6), order=LITTLE))
            assert incoming(seen, b"body")[1] == 0x0800
            rx.send(ETHERNET + b"plain")
            assert incoming(seen, b"plain") == (b"plain", 0x0800)


@pytest.mark.usefixtures("devices")
def test_a_super_packet_goes_through_packet_sockets() -> None:
    """A super-packet that was received with a virtio-net header is sent with it, and the peer's TCP receives it whole."""
    with veth() as (near, far), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as seen:
        seen.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        seen.bind((far, ETH_P_ALL))
        seen.settimeout(PATIENCE)
        body = (
            ETHERNET + b"\x45" + bytes(8) + b"\x06" + bytes(10) + bytes(12) + b"\x50" + bytes(7) + bytes(4000)
        )
        body = body[:16] + (len(body) - 14).to_bytes(2, "big") + body[18:]
        with linkrx.open(near, vnet_header=True) as rx:
            rx.send(packet(body, vnet=TCP))
            wire = b""
            while wire[10:] != body:
                wire = seen.recv(65536)
            assert struct.unpack_from("=BBHHHH", wire)[1::2][:2] == (1, 1448)


# Sources that cannot send.


@pytest.mark.usefixtures("devices")
def test_sources_that_send_nothing() -> None:
    """Each source that cannot send raises UnsupportedSource with its own reason."""
    with veth() as (near, _):

        def refused(source: Any) -> str:
            with linkrx.open(source) as rx:
                with pytest.raises(linkrx.UnsupportedSource) as one:
                    rx.send(bytes(60))
                with pytest.raises(linkrx.UnsupportedSource) as many:
                    rx.send_batch([bytes(60)])
                assert str(one.value) == str(many.value)
                assert rx.stats().sent == 0
            return str(one.value)

        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as cooked:
            cooked.bind((near, ETH_P_ALL))
            assert "without a link header" in refused(cooked)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as unbound:
            assert "is bound to no interface" in refused(unbound)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            assert "has no peer" in refused(udp)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            assert "has no peer" in refused(unix)
        reading, writing = os.pipe2(os.O_DIRECT)
        with os.fdopen(reading), os.fdopen(writing):
            assert "is the end to read from" in refused(reading)


def test_a_socket_that_is_connected_later(ends: Pair) -> None:
    """A UDP socket sends once its owner has connected it."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        bring_up("lo", udp)
        peer.bind(("127.0.0.1", 0))
        with linkrx.open(udp) as rx:
            with pytest.raises(linkrx.UnsupportedSource, match="connect"):
                rx.send(frame(1))
            udp.connect(peer.getsockname())
            rx.send(frame(1))
            assert rx.send_batch([b"", frame(2)]) == 2
            assert [peer.recv(100) for _ in range(3)] == [frame(1), b"", frame(2)]


def test_a_peer_that_has_closed() -> None:
    """Sending to a peer that has closed raises the kernel's error, and no SIGPIPE."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, linkrx.open(receiver) as rx:
        sender.close()
        with pytest.raises(BrokenPipeError, match="sending 18 bytes on the AF_UNIX seqpacket socket"):
            rx.send(frame(1))
        with pytest.raises(BrokenPipeError):
            rx.send_batch([frame(1), frame(2)])


# Objects that are no frame.


@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_that_are_no_buffer(ends: Pair, backend: str) -> None:
    """An object that is no buffer raises TypeError. If frames before it were sent, the next call raises."""
    with linkrx.open(ends[0], backend=backend) as rx:
        for wrong in ("frame", 5, None, [frame(1)]):
            with pytest.raises(TypeError):
                rx.send(wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                rx.send_batch([wrong, frame(1)])  # type: ignore[list-item]
            frames = [frame(number) for number in range(70)]
            assert rx.send_batch([*frames, wrong, frame(2)]) == 70  # type: ignore[list-item]
            assert [ends[1].recv(100) for _ in frames] == frames
        for none in (5, None, frame(1)):
            with pytest.raises(TypeError):
                rx.send_batch(none)  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            rx.send(memoryview(bytes(20))[::2])
        assert rx.stats().sent == 4 * 70


def test_an_iterable_that_raises_sends_nothing(ends: Pair) -> None:
    """If an iterable raises before the first frame is sent, the exception propagates and no frame is sent."""

    def frames() -> Iterator[bytes]:
        yield frame(1)
        raise ZeroDivisionError

    with linkrx.open(ends[0]) as rx:
        with pytest.raises(ZeroDivisionError):
            rx.send_batch(frames())
        assert rx.stats().sent == 0
        assert rx.send_batch(iter([frame(1), frame(2)])) == 2


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_a_frame_that_is_refused_among_others(backend: str) -> None:
    """Frames before a refused frame are sent. The next call raises its error, and the frames after it are not sent."""
    with veth() as (near, far), seen_on(far) as seen:
        Device(near).set(mtu=1500)
        with linkrx.open(near, backend=backend) as rx:
            good, long = ETHERNET + bytes(46), ETHERNET + bytes(1600)
            assert rx.send_batch([good, good, long, good]) == 2
            with pytest.raises(OSError, match="longer than its MTU allows; that was 1500") as caught:
                rx.send_batch([long, good])
            assert caught.value.errno == errno.EMSGSIZE
            assert rx.send_batch([good]) == 1
            rx.send(ETHERNET + b"mark")
            got: list[bytes] = []
            while not got or got[-1] != b"mark":
                data, (_, protocol, *_rest) = seen.recvfrom(2000)
                got += [data] if protocol == 0x0800 else []
            assert got == [bytes(46)] * 3 + [b"mark"]
            assert rx.stats().sent == 4


@pytest.mark.usefixtures("devices")
def test_own_frames_come_back_on_lo_only() -> None:
    """On `lo` each sent frame is received once. On a veth pair the far end receives it, and the near end does not."""
    with socket.socket() as any_socket:
        bring_up("lo", any_socket)
    with linkrx.open("lo", timestamps=False) as rx:
        assert rx.send_batch([ETHERNET + b"one", ETHERNET + b"two"]) == 2
        assert [bytes(rx.recv(PATIENCE).data) for _ in range(2)] == [b"one", b"two"]
        rx.stop(flush=True)
        assert [one for one in rx if bytes(one.data) in (b"one", b"two")] == []


# Concurrent events.


def test_close_in_another_thread(ends: Pair) -> None:
    """A sending thread gets Closed when another one closes, and no frame is written to a file that reuses the descriptor."""
    sent = threading.Event()

    def work() -> None:
        with suppress(linkrx.Closed):
            while True:
                rx.send_batch([frame(1)] * 3)
                sent.set()

    with linkrx.open(ends[0]) as rx, running(work):
        assert sent.wait(PATIENCE)
        rx.close()


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_a_signal_handler_that_raises_during_a_long_batch(backend: str) -> None:
    """An exception of a signal handler propagates out of send_batch() before all frames of a long batch are sent, and those are counted."""

    class Interrupt(Exception):
        pass

    def interrupt(_: object) -> None:
        raise Interrupt

    many = [ETHERNET + bytes(46)] * 300_000  # on a veth pair the queue is never full
    with veth() as (near, far), linkrx.open(near, backend=backend) as rx:
        Device(near, far).wait_for_carrier()
        for _ in range(100):  # the signal may come before the first frame
            before = rx.stats().sent
            with pytest.raises(Interrupt), alarmed(interrupt, first=0.005, interval=0):
                while True:
                    rx.send_batch(many)
            if (rx.stats().sent - before) % len(many) > 0:
                break
        else:
            pytest.fail("no signal came while frames were sent")
        rx.send(many[0])


def test_threads_that_send_at_once(ends: Pair) -> None:
    """Each frame of each thread is sent once and counted once."""
    ends[1].setblocking(True)
    each, threads = 500, 4

    def work(first: int) -> None:
        for number in range(first, first + each):
            while True:
                with suppress(BlockingIOError):
                    rx.send(frame(number))
                    break
                os.sched_yield()

    with linkrx.open(ends[0]) as rx:
        workers = [threading.Thread(target=work, args=(number * each,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        got = [ends[1].recv(100) for _ in range(each * threads)]
        for worker in workers:
            worker.join()
        assert sorted(got) == [frame(number) for number in range(each * threads)]
        assert rx.stats().sent == each * threads


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_a_send_does_not_take_the_news_of_a_flap(backend: str) -> None:
    """If a send gets the kernel's only report that the link went down, the waiting receiver counts it too.

    The frame is sent, and the deletion of the interface still ends reception.
    """
    with veth() as (near, _), linkrx.open(near, lambda *_: None, backend=backend) as rx:
        device = Device(near)
        device.set_down()
        device.set_up()
        rx.send(ETHERNET + bytes(46))
        with running(rx.run):
            until(lambda: rx.stats().link_downs == 1)
            device.set_down()
            until(lambda: rx.stats().link_downs == 2)
            device.delete()
        assert rx.end is linkrx.End.LINK_GONE
        assert rx.stats().sent == 1


REFUSED = """
import errno, os, socket, sys
sys.path.insert(0, {tests!r})
from support.seccomp import deny
import linkrx
from linkrx.kernel.namespace import enter_private_network
enter_private_network()
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
with linkrx.TunTap() as tap, linkrx.open(a) as rx, linkrx.open(tap) as queue:
    from linkrx.testing.devices import Device
    Device(tap.name).set_up()
    deny(errno.{code}, "sendmmsg", "pwritev2")
    print(rx.send_batch([b"1", b"2"]), b.recv(9), b.recv(9), rx.send_batch([b"3"] * 3), rx.stats().sent)
    os.set_blocking(tap.fileno(), True)
    print(queue.send_batch([bytes(60)] * 3), queue.send(bytes(60)), queue.stats().sent)
"""


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("code", ["ENOSYS", "EPERM"])
def test_without_sendmmsg_and_pwritev2(code: str) -> None:
    """If a seccomp filter refuses sendmmsg and pwritev2, frames are sent one by one, and written when poll() reports room."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(tests=str(TESTS), code=code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 b'1' b'2' 3 5\n3 None 4\n"
