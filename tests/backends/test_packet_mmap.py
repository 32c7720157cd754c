"""The ring: each packet is received exactly once, with any size, link events, interruptions and forked children."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import pytest
from pyroute2 import IPRoute
from support import ring
from support.children import child

import linkrx
from linkrx import _core
from linkrx.backend import ReceiveConfig
from linkrx.backends import packet_mmap
from linkrx.kernel.uapi import ETH_P_ALL, PACKET_VNET_HDR, SOL_PACKET
from linkrx.sources.capabilities import LARGEST_MESSAGE
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.exceptions import is_inside
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.waiting import patiently

pytestmark = [
    pytest.mark.usefixtures("devices"),
    pytest.mark.skipif(_core.lib is None, reason="the C core was not built"),
]

# linux/if_packet.h
PACKET_RX_RING = 5
PACKET_VERSION = 10
PACKET_RESERVE = 12
TPACKET_V1, TPACKET_V3 = 0, 2
# struct tpacket3_hdr
NEXT, SNAPLEN, MAC = 0, 12, 24

# 16 blocks, which 6000 frames of 60 to 1460 bytes fill twice. The kernel closes one every 20 ms, so a sender may take
# 250 ms for TURN frames before all blocks are full.
SEVERAL_LAPS: dict[str, Any] = {"receive_buffer": 2 * 2**20, "latency": 0.02}
TURN = 250

# Longer than any test, so that frames close blocks, not the timer.
NO_TIMER = 600.0

HEADER = LOCAL + REMOTE + b"\x88\xb5"
Wire = tuple[str, str, socket.socket]


def frame(number: int, size: int = 60) -> bytes:
    """A frame that contains its number."""
    return (HEADER + number.to_bytes(4, "big")).ljust(size, b"\xa5")


def number_of(packet: linkrx.Packet) -> int:
    """The number in a frame of `frame`."""
    return int.from_bytes(packet.data[:4], "big")


def ring_on(source: Any, *deliver: Any, **options: Any) -> linkrx.Dispatcher:
    """Open a dispatcher on a ring."""
    return linkrx.open(source, *deliver, backend="packet_mmap", **options)


def packet_socket(near: str, kind: socket.SocketKind = socket.SOCK_RAW) -> socket.socket:
    """A packet socket of another owner."""
    found = socket.socket(socket.AF_PACKET, kind, 0)
    found.bind((near, ETH_P_ALL))
    return found


# The choice.


def test_auto_takes_a_ring_for_an_interface(wire: Wire) -> None:
    """auto takes a ring for an interface by name, and not for a borrowed socket."""
    with linkrx.open(wire[0]) as rx:
        assert rx.backend == "packet_mmap"
    with packet_socket(wire[0]) as borrowed:
        with linkrx.open(borrowed) as rx:
            assert rx.backend == "recvmmsg"
            assert "packet_mmap   accepted  only when named: a ring takes the place" in rx.choice.explain()
        with ring_on(borrowed) as rx:
            assert rx.backend == "packet_mmap"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOMEM, errno.EINVAL, errno.ENOPROTOOPT])
def test_a_ring_that_is_refused(
    wire: Wire, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the kernel refuses a ring, auto warns and continues with recvmmsg without a loss. A named ring raises an error with the kernel's reason."""

    def refused(_state: object, _receive: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(packet_mmap, "_open_ring", refused)
    said = os.strerror(code)
    with linkrx.open(wire[0]) as rx:
        wire[2].send(frame(1))
        assert number_of(rx.recv(10)) == 1
        assert (rx.backend, rx.stats().demotions, rx.stats().ring_freezes) == ("recvmmsg", 1, None)
    assert caplog.messages == [
        f"packet_mmap on the AF_PACKET socket on {wire[0]}: the kernel answers {said}; going on with recvmmsg"
    ]
    with pytest.raises(linkrx.BackendUnavailable, match=said):
        ring_on(wire[0])


# Sizes.


@pytest.mark.parametrize(
    ("size", "largest", "block", "blocks"),
    [
        (1, 65_536, 128 * 1024, 2),
        (2**20, 65_536, 128 * 1024, 8),
        (packet_mmap.RING_BYTES, 0, 128 * 1024, 512),
        (packet_mmap.RING_BYTES, 65_536, 128 * 1024, 512),
        (packet_mmap.RING_BYTES, 200_000, 256 * 1024, 256),
        (packet_mmap.RING_BYTES, 524_280, 2**20, 64),
        (2**31 - 1, 65_536, 512 * 1024, 4095),
    ],
)
def test_shape(size: int, largest: int, block: int, blocks: int) -> None:
    """Blocks are as small as the interface's super-packets allow, and the ring is no larger than asked for."""
    assert packet_mmap.shape(size, largest) == (block, blocks)
    assert blocks == packet_mmap.BLOCKS_LEAST or block * blocks <= size


def test_the_most_that_a_block_is_holds_any_frame() -> None:
    """The largest frame of Linux fits into the largest block, with the kernel's headers in front of it."""
    assert packet_mmap.BLOCK_MOST > LARGEST_MESSAGE + 4096


def test_frames_of_all_sizes_come_whole(wire: Wire) -> None:
    """Frames of up to 64 KiB are not cut in a ring of any size."""
    sizes = [14, 60, 1514, 9014, 32_768, 65_000, 65_014]
    for receive_buffer in (1, None):
        with ring_on(wire[0], receive_buffer=receive_buffer) as rx:
            for size in sizes:
                sent = frame(size, size)[:size]
                wire[2].send(sent)
                packet = rx.recv(10)
                assert (bytes(packet), packet.truncated) == (sent, False)


def test_a_frame_longer_than_a_block_is_cut_and_says_so(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that does not fit into a block is cut and flagged, and wire_length is its true length."""
    monkeypatch.setattr(packet_mmap, "BLOCK_LEAST", 8192)
    monkeypatch.setattr(packet_mmap, "_largest", lambda _: 0)
    with ring_on(wire[0], receive_buffer=4 * 8192) as rx:
        wire[2].send(frame(1, 9000))
        wire[2].send(frame(2, 8000))
        cut, whole = rx.recv(10), rx.recv(10)
        assert (cut.truncated, cut.wire_length) == (True, 9000)
        assert 8000 < len(cut) < 8192
        assert bytes(cut) == frame(1, 9000)[: len(cut)]
        assert bytes(whole) == frame(2, 8000)
        assert rx.stats().truncated == 1


def test_a_ring_with_headroom_of_its_owner(wire: Wire) -> None:
    """PACKET_RESERVE on a borrowed socket moves the frames in the ring, and does not change the received packets."""
    with packet_socket(wire[0]) as borrowed:
        borrowed.setsockopt(SOL_PACKET, PACKET_RESERVE, 40_000)
        with ring_on(borrowed, receive_buffer=1) as rx:
            wire[2].send(frame(1, 65_000))
            assert bytes(rx.recv(10)) == frame(1, 65_000)


def test_memory_that_is_refused_makes_a_smaller_ring() -> None:
    """If a large ring cannot be mapped, one warning has the smaller size, and the ring receives."""
    program = """
import logging, resource, sys
import linkrx
from linkrx.kernel.namespace import enter_private_network
from linkrx.testing.rigs import interface
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
enter_private_network()
with interface() as rig:
    import pathlib
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (24 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with rig.open("packet_mmap") as rx:
        rig.send(rig.frame(100))
        print(len(rx.recv(10)), rx.capabilities.interface)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    warned, received = done.stdout.splitlines()
    size, interface = received.split()
    assert size == "100"
    assert warned == (
        f"WARNING packet_mmap on the AF_PACKET socket on {interface}: no memory for a ring of 67108864 bytes; it has "
        "16777216. receive_buffer= asks for less"
    )


def test_the_latency_is_the_retire_time(wire: Wire) -> None:
    """A packet waits in the open block for the latency. A latency below the kernel's minimum is refused."""
    with ring_on(wire[0], latency=60.0) as rx:
        wire[2].send(frame(1))
        assert not list(rx.batches(0.05))
    for latency in (0.05, 10**300):
        with ring_on(wire[0], latency=latency) as rx:
            if latency < 1:
                wire[2].send(frame(2))
                assert number_of(rx.recv(10)) == 2
    with pytest.raises(
        linkrx.UnsupportedOption, match=r"packet_mmap cannot honour latency=0.0005: .* 0.001 s"
    ):
        ring_on(wire[0], latency=0.0005)


@pytest.mark.parametrize("latency", [0, 0.0005])
def test_a_latency_below_the_least_of_a_ring(wire: Wire, latency: float) -> None:
    """For a latency that no ring can keep, "auto" chooses a backend that holds packets back for that time or not at all."""
    with linkrx.open(wire[0], latency=latency) as rx:
        assert rx.backend == "recvmmsg"
        assert f"packet_mmap cannot honour latency={latency}" in rx.choice.explain()
        wire[2].send(frame(1))
        assert number_of(rx.recv(10)) == 1


def test_the_buffer_of_the_socket_stays_as_it_is(wire: Wire) -> None:
    """receive_buffer= is the size of the ring, and is not set on the socket."""
    with packet_socket(wire[0]) as borrowed:
        before = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        with ring_on(borrowed, receive_buffer=3 * 2**20):
            assert [size for _, size in ring.mapped()] == [3 * 2**20]
            assert borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


def test_a_block_is_a_batch_unless_asked_otherwise(wire: Wire) -> None:
    """By default a batch has all packets of a block, and with batch_size= at most that many."""
    for batch_size in (None, 128):
        with ring_on(wire[0], batch_size=batch_size, latency=NO_TIMER) as rx:
            for number in range(1000):
                wire[2].send(frame(number))
            (inside,) = ring.waiting()
            most = batch_size or inside
            full, rest = divmod(inside, most)
            assert [len(batch) for batch in rx.batches(0)] == [most] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("end", [0, 1], ids=["interface", "peer"])
def test_blocks_fit_the_interface_and_its_peer(wire: Wire, end: int) -> None:
    """Blocks are larger if the super-packet limit of an interface, or of its veth peer, is larger."""
    Device(str(wire[end])).set(gso_max_size=200_000)
    with ring_on(wire[0]) as rx:
        assert packet_mmap._largest(rx._config) == 200_000


def test_blocks_of_an_interface_with_an_alternative_name(wire: Wire) -> None:
    """An interface that is opened by an alternative name has the same blocks as by its own."""
    Device(wire[0]).set(gso_max_size=200_000)
    name = "alternative_" + "n" * 100
    with IPRoute() as route:
        route.link("property_add", index=socket.if_nametoindex(wire[0]), altname=name)
    with packet_socket(wire[0]) as borrowed, ring_on(borrowed) as rx:
        assert packet_mmap._largest(rx._config) == 200_000


@pytest.mark.parametrize("mtu", [0, 200_000])
def test_nothing_is_cut_on_lo(mtu: int, devices: None) -> None:
    """A frame on lo is not cut, also if lo's MTU is raised after open."""
    with ring_on("lo") as rx, injector_on("lo") as injector, ExitStack() as stack:
        if mtu:
            stack.callback(Device("lo").set, mtu=65536)  # as other tests find it
            Device("lo").set(mtu=mtu)
        sent = frame(1, (mtu or 65536) + 14)
        injector.send(sent)
        packet = rx.recv(10)
        while bytes(packet[12:14]) != sent[12:14]:
            packet = rx.recv(10)
        assert (packet.truncated, packet.tobytes() == sent) == (False, True)


# Accounting.


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1024])
def test_all_that_was_sent_comes_once_and_in_order(wire: Wire, batch_size: int) -> None:
    """All sent frames are received once and in order, over several laps of the ring, although a block holds more than a batch."""
    total = 6_000
    got: list[int] = []
    with ring_on(wire[0], batch_size=batch_size, **SEVERAL_LAPS) as rx:
        for start in range(0, total, TURN):
            for number in range(start, start + TURN):
                wire[2].send(frame(number, 60 + number % 1400))
            while len(got) < start + TURN:
                got += [number_of(packet) for packet in next(rx.batches(10))]
        counted = rx.stats()
    assert got == list(range(total))
    assert (counted.kernel_drops, counted.ring_freezes, counted.truncated) == (0, 0, 0)


def test_drops_of_an_overrun_are_counted_exactly(wire: Wire) -> None:
    """After an overrun, sent equals delivered plus kernel_drops, with statistics read at any time, and the ring still receives."""
    sent = delivered = 0
    with ring_on(wire[0], receive_buffer=1) as rx:
        for turn in range(3):
            for _ in range(8_000):
                wire[2].send(frame(sent))
                sent += 1
            for _ in range(turn):
                rx.stats()
            while sent > delivered + (rx.stats().kernel_drops or 0):
                delivered += len(next(rx.batches(10)))
            assert list(rx.batches(0.01)) == []
            counted = rx.stats()
            assert counted.kernel_drops is not None
            assert sent == delivered + counted.kernel_drops
            assert counted.ring_freezes == turn + 1
        assert sent > delivered
        wire[2].send(frame(sent))
        assert number_of(rx.recv(10)) == sent


def test_earlier_drops_of_a_socket_are_not_counted(wire: Wire) -> None:
    """On a borrowed socket kernel_drops starts at 0 with the ring."""
    with packet_socket(wire[0]) as borrowed:
        borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5_000)
        for number in range(100):
            wire[2].send(frame(number))
        with ring_on(borrowed) as rx:
            wire[2].send(frame(7))
            assert number_of(rx.recv(10)) == 7
            assert rx.stats().kernel_drops == 0


def test_held_packets_do_not_keep_the_ring_full(wire: Wire) -> None:
    """If every packet of many laps is kept, none is lost, and each shows its sent bytes."""
    kept: list[linkrx.Packet] = []
    total = 6_000
    with ring_on(wire[0], **SEVERAL_LAPS) as rx:
        while len(kept) < total:
            for number in range(len(kept), len(kept) + TURN):
                wire[2].send(frame(number, 60 + number % 1400))
            want = len(kept) + TURN
            while len(kept) < want:
                kept += next(rx.batches(10))
        assert rx.stats().kernel_drops == 0
    assert [bytes(packet) for packet in kept] == [
        frame(number, 60 + number % 1400) for number in range(total)
    ]


def test_a_stop_counts_what_was_left_in_the_block(wire: Wire) -> None:
    """After a stop, the packets of the block that was begun count as undelivered."""

    def stop(*_: object) -> None:
        rx.stop()

    rx = ring_on(wire[0], stop, batch_size=4, latency=NO_TIMER)
    with rx:
        for number in range(11):
            wire[2].send(frame(number, ring.filling(10)))
        assert rx.run() is linkrx.End.STOPPED
        counted = rx.stats()
        assert (counted.packets, counted.undelivered) == (1, 9)


def test_interrupts_lose_nothing(wire: Wire) -> None:
    """Exceptions of a signal handler at any point of the loop neither lose nor repeat a packet of the ring."""

    class Interrupt(Exception):
        pass

    here = sys._getframe()
    at_once, total = 2000, 0
    got: list[int] = []
    interrupts = 0

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))

    def interrupt(_signal: int, interrupted: FrameType | None) -> None:
        nonlocal interrupts
        in_c = interrupted is here and rx._thread == threading.get_ident()
        if in_c or is_inside(rx, interrupted, deliver.__code__):
            interrupts += 1
            raise Interrupt

    with ring_on(wire[0], deliver, batch_size=7, latency=0.05) as rx:
        # Most signals come while `deliver` or this test runs. The loop ends when enough came elsewhere.
        for _ in patiently(lambda: interrupts >= 10):
            for number in range(total, total + at_once):
                wire[2].send(frame(number))
            total += at_once
            before = signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
            try:
                while len(got) < total:
                    with suppress(Interrupt):
                        rx.dispatch(10)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        assert got == list(range(total))
        assert rx.stats().packets == total


# Metadata.


def test_metadata(wire: Wire) -> None:
    """Tag, direction and timestamp are the same from the ring as from recvmmsg."""
    near, _, injector = wire
    tagged = LOCAL + REMOTE + struct.pack("!HHHHH", 0x88A8, 7, 0x8100, 9, 0x88B5) + bytes(50)
    for backend in ("packet_mmap", "recvmmsg"):
        with (
            linkrx.open(near, backend=backend, outgoing=True, timestamps=True) as rx,
            injector_on(near) as own,
        ):
            own.send(frame(1))
            injector.send(tagged)
            injector.send(LOCAL + REMOTE + struct.pack("!HHH", 0x8100, 0, 0x88B5) + bytes(50))
            got = [rx.recv(10) for _ in range(3)]
            assert [packet.outgoing for packet in got] == [True, False, False]
            assert [packet.vlan for packet in got] == [
                None,
                linkrx.Vlan(0x88A8, 7),
                linkrx.Vlan(0x8100, 0),
            ]
            assert [packet.protocol for packet in got] == [0x88B5, 0x8100, 0x88B5]
            assert [len(packet) for packet in got] == [60, len(tagged) - 4, 64]
            stamps = [packet.timestamp_ns for packet in got]
            assert None not in stamps
            assert stamps == sorted(stamps)  # type: ignore[type-var]


@pytest.mark.parametrize("size", [10, 12])
def test_the_virtio_net_header_is_kept(wire: Wire, size: int) -> None:
    """A ring on a socket with PACKET_VNET_HDR gives each frame's header, with any header size of the socket."""
    from linkrx.kernel.uapi import PACKET_VNET_HDR_SZ

    near, far, _ = wire
    with IPRoute() as route:
        index = socket.if_nametoindex(far)
        route.addr("add", index=index, address="10.79.0.1", prefixlen=24)
        route.neigh("add", dst="10.79.0.2", lladdr="02:00:00:00:00:02", ifindex=index, state=0x80)
    with packet_socket(near) as borrowed, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            borrowed.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, size)
        except OSError:  # Linux before 6.6
            if size != 10:
                pytest.skip("this kernel knows no size for PACKET_VNET_HDR")
            borrowed.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        with ring_on(borrowed) as rx:
            assert rx.capabilities.vnet_header_size == size
            sender.sendto(b"x" * 100, ("10.79.0.2", 9))
            packet = next(packet for packet in rx if packet.protocol == 0x0800)
            assert packet.vnet is not None
            assert packet.vnet.needs_checksum
            assert (packet.vnet.csum_start, packet.vnet.csum_offset) == (34, 6)
            assert packet.checksum_unfinished
            assert len(packet) == packet.wire_length == 14 + 20 + 8 + 100
            assert bytes(packet.data[-100:]) == b"x" * 100


# The link.


def test_packets_in_the_ring_come_before_link_down(wire: Wire) -> None:
    """Packets in a block that is open when the link goes down are delivered before the link counts as down."""
    near, far, injector = wire
    with ring_on(near, latency=0.2) as rx:
        for number in range(5):
            injector.send(frame(number))
        Device(near).set_down()
        assert [number_of(rx.recv(10)) for _ in range(5)] == list(range(5))
        assert rx.stats().link_downs == 0
        with pytest.raises(TimeoutError):
            rx.recv(0.01)
        assert rx.stats().link_downs == 1
        Device(near, far).set_up()
        injector.send(frame(5))
        assert number_of(rx.recv(10)) == 5


def test_packets_in_the_ring_come_before_a_deletion(wire: Wire) -> None:
    """Packets in a block that is open when the interface is deleted are delivered before the end."""
    near, _, injector = wire
    with ring_on(near, latency=0.2) as rx:
        for number in range(5):
            injector.send(frame(number))
        Device(near).delete()
        assert [number_of(packet) for packet in rx] == list(range(5))
        assert rx.end is linkrx.End.LINK_GONE


def test_a_full_ring_and_a_link_that_goes(wire: Wire) -> None:
    """A ring that was full when its interface was deleted is emptied, and then reception ends."""
    near, _, injector = wire
    with ring_on(near, receive_buffer=1) as rx:
        for number in range(6_000):
            injector.send(frame(number))
        Device(near).delete()
        got = [number_of(packet) for packet in rx]
        # The received packets are not the first ones: while the timer closes a block on another processor, the kernel has no
        # room for a moment, and then uses the next block.
        assert got == sorted(set(got))
        assert rx.end is linkrx.End.LINK_GONE
        assert 0 < len(got) < 6_000
        assert rx.stats().kernel_drops == 6_000 - len(got)


# Borrowed sockets.


def test_a_borrowed_socket_gets_its_queue_back(wire: Wire) -> None:
    """After close a borrowed socket has its old version and no ring, and its owner receives with recv as before."""
    near, _, injector = wire
    with packet_socket(near) as borrowed:
        for _ in range(2):
            with ring_on(borrowed) as rx:
                assert borrowed.getsockopt(SOL_PACKET, PACKET_VERSION) == TPACKET_V3
                injector.send(frame(1))
                assert number_of(rx.recv(10)) == 1
            # EBUSY while there is a ring.
            borrowed.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V1)
            injector.send(frame(2))
            borrowed.settimeout(10)
            assert borrowed.recv(100) == frame(2)
            borrowed.setblocking(True)


def test_a_socket_that_has_a_ring_already(wire: Wire) -> None:
    """A borrowed socket that has a ring is refused with a remedy, and keeps its ring."""
    with packet_socket(wire[0]) as borrowed:
        borrowed.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("=4I", 4096, 2, 2048, 4))
        with pytest.raises(
            linkrx.UnsupportedSource, match=r"has a ring, .* Give linkrx a socket without a ring"
        ):
            ring_on(borrowed)
        assert borrowed.getsockopt(SOL_PACKET, PACKET_VERSION) == TPACKET_V1
        with pytest.raises(OSError, match="busy"):
            borrowed.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)


def test_a_ring_of_a_reused_descriptor_is_kept(wire: Wire) -> None:
    """If the owner closed its socket and another socket with a ring reuses the number, close does not change that socket."""
    borrowed = packet_socket(wire[0])
    number = borrowed.fileno()
    with packet_socket(wire[0]) as other:
        other.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("=4I", 4096, 2, 2048, 4))
        rx = ring_on(borrowed)
        borrowed.close()
        os.dup2(other.fileno(), number)
        rx.close()
    with socket.socket(fileno=number) as reused, pytest.raises(OSError, match="busy"):
        reused.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)


def test_a_forked_child_leaves_the_ring_alone(wire: Wire) -> None:
    """A child that closes or ends takes no packet from its parent, and does not have the ring mapped."""
    near, _, injector = wire
    with packet_socket(near) as borrowed:
        with ring_on(borrowed, latency=0.05) as rx:
            for turn in range(4):
                injector.send(frame(turn))
                with child() as forked:
                    if forked:
                        assert len(ring.mapped()) == 0
                        if turn % 2:
                            rx.close()
                assert number_of(rx.recv(10)) == turn
            with ExitStack() as stack:
                reader, writer = os.pipe()
                stack.callback(os.close, reader)
                pid = os.fork()
                if not pid:  # alive while the parent closes
                    os.close(writer)
                    os.read(reader, 1)
                    os._exit(0)
                rx.close()
                borrowed.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V1)  # EBUSY if the ring were left
                os.close(writer)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(ring.mapped()) == 0


def test_nothing_is_mapped_after_close(wire: Wire) -> None:
    """After open and close, also if open fails, no ring is mapped."""
    for _ in range(3):
        with ring_on(wire[0]):
            assert len(ring.mapped()) == 1
        assert len(ring.mapped()) == 0
    with IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(wire[0]), state="down")
    ring_on(wire[0]).close()
    assert len(ring.mapped()) == 0


def test_an_interface_that_goes_before_bind(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the interface is deleted while the ring is made, open fails with ENODEV and leaves nothing."""
    open_ring = packet_mmap._open_ring

    def open_and_delete(state: object, receive: ReceiveConfig) -> int:
        blocks = open_ring(state, receive)
        Device(wire[0]).delete()
        return blocks

    monkeypatch.setattr(packet_mmap, "_open_ring", open_and_delete)
    with pytest.raises(OSError, match=f"binding a packet socket to '{wire[0]}'"):
        ring_on(wire[0])
    assert len(ring.mapped()) == 0


# Invalid numbers in blocks.


@pytest.mark.parametrize(
    ("what", "at", "form", "value"),
    [
        ("offset_to_first_pkt behind the block", ring.FIRST, "I", 1 << 17),
        ("offset_to_first_pkt that wraps", ring.FIRST, "I", 2**32 - 8),
        ("offset_to_first_pkt that is odd", ring.FIRST, "I", 49),
        ("num_pkts without number", ring.PACKETS, "I", 2**32 - 1),
        ("tp_next_offset behind the block", 48 + NEXT, "I", 2**32 - 16),
        ("tp_next_offset of 0", 48 + NEXT, "I", 0),
        ("tp_snaplen behind the block", 48 + SNAPLEN, "I", 2**31),
        ("tp_mac inside the header", 48 + MAC, "H", 3),
    ],
)
def test_a_damaged_block(wire: Wire, what: str, at: int, form: str, value: int) -> None:
    """If an offset or length in a block is invalid, the rest of the block is skipped with an error, and the next block is read."""
    near, _, injector = wire
    # Two blocks of three frames. The seventh frame has no room, so the kernel closes the second block.
    with ring_on(near, receive_buffer=1, latency=NO_TIMER) as rx:
        for number in range(7):
            injector.send(frame(number, ring.filling(3)))
        assert ring.waiting() == [3, 3]
        ctypes.memmove(ring.block() + at, struct.pack(f"={form}", value), struct.calcsize(form))
        got = []
        with pytest.raises(OSError, match="Input/output error"):
            while True:
                got.append(number_of(rx.recv(10)))
        assert got == sorted(set(got)), what
        assert len(got) <= 6
        assert got[-3:] == [3, 4, 5], "the next block comes before the error"
        for number in range(9, 13):
            injector.send(frame(number, ring.filling(3)))
        assert number_of(rx.recv(10)) == 9
