"""The ends of a test's network: sending, expecting, failure messages, and changes to an interface."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.children import child

import linkrx
from linkrx import _core
from linkrx.backends.packet_mmap import BLOCK_LEAST
from linkrx.kernel.ethtool import takes_super_packets
from linkrx.sources import libpcap
from linkrx.testing import differences, ends
from linkrx.testing.network import End, Network, Tap
from linkrx.testing.waiting import PATIENCE, patiently, running

pytestmark = pytest.mark.usefixtures("devices")

Pair = tuple[End, End]
HEADER = bytes.fromhex("02005e000002 02005e000001")


def frame(number: int = 0, size: int = 60) -> bytes:
    """A frame that contains its number."""
    return (HEADER + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(size, b".")


def arp(wanted: str) -> bytes:
    """An ARP request of 10.0.0.1."""
    fixed = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    asks = HEADER[6:] + socket.inet_aton("10.0.0.1")
    return HEADER + b"\x08\x06" + fixed + asks + bytes(6) + socket.inet_aton(wanted)


def failure(call: Any, *arguments: Any, **options: Any) -> list[str]:
    """The lines of the AssertionError that a call raises."""
    with pytest.raises(AssertionError) as caught:
        call(*arguments, **options)
    return str(caught.value).splitlines()


def arrived(end: End, count: int) -> None:
    """Wait until `count` packets have come that no `expect` took. A ring delivers them when its timer expires."""
    for _ in patiently(lambda: len(end._came) >= count):
        end.record_the_rest()


# Expected packets.


def test_frames_in_any_form(linkrx_veth: Pair) -> None:
    """inject and expect accept one frame or several, as bytes or as an object that bytes() converts."""
    scapy: Any = pytest.importorskip("scapy.layers.l2")
    packet = scapy.Ether(frame())
    near, far = linkrx_veth
    near.inject(packet)
    near.inject([bytearray(frame(1)), memoryview(frame(2)), frame(3), packet])
    came = far.expect(packet)
    near.inject(came)
    for wanted in (came, bytearray(frame(1)), memoryview(frame(2)), frame(3), packet):
        assert isinstance(far.expect(wanted), linkrx.Packet)
    far.expect_nothing(0)
    for wrong in (5, None):
        with pytest.raises(TypeError):
            near.inject(wrong)  # type: ignore[arg-type]


def test_packets_that_were_not_expected_are_kept(linkrx_veth: Pair) -> None:
    """`expect` takes packets in any order. Packets that it did not take stay for the next `expect` and for `collect`."""
    near, far = linkrx_veth
    near.inject(frame(number) for number in range(5))
    assert far.expect(frame(3)) == frame(3)
    assert far.expect(lambda packet: packet.u32(14) == 1) == frame(1)
    assert far.collect(2) == [frame(0), frame(2)]
    arrived(far, 1)
    assert failure(far.expect_nothing, 0)[0] == "veth1 should have got nothing within 0 s, but got:"
    far.expect_nothing(0, frame(2))
    far.expect_nothing(0, lambda packet: packet.u32(14) < 4)
    assert far.collect(1) == [frame(4)]
    far.expect_nothing(0)


needs_metadata = pytest.mark.skipif(
    _core.reason is not None, reason=f"os_readv tells neither direction, tags nor checksums: {_core.reason}"
)


@needs_metadata
def test_tagged_frames(linkrx_veth: Pair) -> None:
    """A frame with a VLAN tag is expected as on the wire, although the kernel takes the tag out."""
    near, far = linkrx_veth
    tagged = HEADER + struct.pack("!HH", 0x8100, 42) + frame()[12:]
    near.inject(tagged)
    packet = far.expect(tagged)
    assert packet.vlan == linkrx.Vlan(0x8100, 42)


needs_libpcap = pytest.mark.skipif(
    isinstance(libpcap._library(), str), reason=f"compiles expressions: {libpcap._library()}"
)


@needs_libpcap
def test_expressions(linkrx_veth: Pair) -> None:
    """`expect` accepts an expression in tcpdump's language. A failure shows the expression, and an invalid one raises at once."""
    near, far = linkrx_veth
    tagged = HEADER + struct.pack("!HH", 0x8100, 42) + arp("10.0.0.3")[12:]
    near.inject([frame(), arp("10.0.0.2"), tagged])
    if _core.reason is None:  # os_readv does not get tags
        assert far.expect("vlan 42 and arp") == arp("10.0.0.3")
    assert far.expect("arp dst host 10.0.0.2") == arp("10.0.0.2")
    far.expect_nothing(0, "udp")
    assert failure(far.expect, "udp port 53", timeout=0)[:2] == [
        "veth1 did not get a packet that passes 'udp port 53' within 0 s.",
        "What came instead:",
    ]
    assert failure(far.expect_nothing, 0, "ether proto 0x88b5")[0] == (
        "veth1 should have got no packet that passes 'ether proto 0x88b5' within 0 s, but got:"
    )
    for wrong in ("arp and not", "udp port fifty"):
        with pytest.raises(ValueError, match="libpcap says: "):
            far.expect(wrong)


@needs_libpcap
def test_expressions_of_ip_packets(linkrx_tun: Tap) -> None:
    """On a TUN device an expression applies to IP packets."""
    packet = bytes.fromhex("4500001c00000000401100000a0000010a000002 00350043 0008 0000")
    os.write(linkrx_tun.queue.fileno(), packet)
    linkrx_tun.expect("udp src port 53 and dst host 10.0.0.2")
    with pytest.raises(ValueError, match="libpcap says: "):
        linkrx_tun.expect("ether host 02:00:00:00:00:01")


def test_many_frames(linkrx_veth: Pair) -> None:
    """An end queues a thousand frames of an ordinary MTU, also without privileges."""
    near, far = linkrx_veth
    near.inject(frame(number, 1514) for number in range(1000))
    assert far.collect(1000, timeout=PATIENCE) == [frame(number, 1514) for number in range(1000)]


@pytest.mark.parametrize("calls", ["one call", "many calls"])
def test_frames_that_are_sent_slowly(linkrx_veth: Pair, calls: str) -> None:
    """An end keeps all frames of a slow sender. In a ring each takes a block of its own."""
    near, far = linkrx_veth
    slowest = ends.RING_BYTES // BLOCK_LEAST + 50

    def slowly() -> Iterator[bytes]:
        for number in range(slowest):
            time.sleep(0.003)  # longer than the latency of a ring; any time will do
            yield frame(number)

    for some in [slowly()] if calls == "one call" else slowly():
        near.inject(some)
    assert far.collect(slowest, timeout=PATIENCE) == [frame(number) for number in range(slowest)]


def test_frames_that_are_sent_while_another_thread_waits(linkrx_veth: Pair) -> None:
    """A thread that waits on an end gets every frame, however the frames are sent meanwhile."""
    near, far = linkrx_veth
    got: list[linkrx.Packet] = []

    def take() -> None:
        got.extend(far.expect(frame(number), timeout=PATIENCE) for number in range(200))

    with running(take):
        for number in range(200):
            near.inject(frame(number))
    assert got == [frame(number) for number in range(200)]


def test_a_forked_child_sends(linkrx_veth: Pair) -> None:
    """A child that was forked inside the network sends out of its ends."""
    near, far = linkrx_veth
    with child() as inside:
        if inside:
            near.inject(frame())
    far.expect(frame(), timeout=PATIENCE)


@needs_metadata
def test_both_directions_are_recorded() -> None:
    """A recording network keeps every packet of every end. A packet that an end sent does not count as received by it."""
    with Network(records=True) as network:
        near, far = network.veth()
        near.inject(frame(1))
        far.expect(frame(1))
        far.inject(frame(2))
        arrived(near, 1)
        near.expect(frame(2), timeout=0)
        near.expect_nothing(0)
        for _ in patiently(lambda: len(far.recorded) == 2):
            far.record_the_rest()
    assert [(packet.outgoing, bytes(packet)) for packet in near.recorded] == [
        (True, frame(1)),
        (False, frame(2)),
    ]
    assert [(packet.outgoing, bytes(packet)) for packet in far.recorded] == [
        (False, frame(1)),
        (True, frame(2)),
    ]


# Messages of a failing test.


def test_a_frame_that_did_not_come(linkrx_veth: Pair) -> None:
    """The failure shows the expected frame, the received frames, and the bytes in which the most similar one differs."""
    near, far = linkrx_veth
    near.inject([frame(), arp("10.0.0.3")])
    arrived(far, 2)
    assert failure(far.expect, arp("10.0.0.2"), timeout=0.05) == [
        "veth1 did not get this frame within 0.05 s:",
        "  02:00:5e:00:00:01 > 02:00:5e:00:00:02, ARP request of 10.0.0.1 (02:00:5e:00:00:01) to 10.0.0.2, 42 bytes",
        "What came instead:",
        "  1. 02:00:5e:00:00:01 > 02:00:5e:00:00:02, protocol 0x88b5, 60 bytes",
        "  2. 02:00:5e:00:00:01 > 02:00:5e:00:00:02, ARP request of 10.0.0.1 (02:00:5e:00:00:01) to 10.0.0.3, 42 bytes",
        "Where number 2 (+) is not what was expected (-):",
        "  - 0020  00 00 00 00 00 00 0a 00 00 02",
        "  + 0020  00 00 00 00 00 00 0a 00 00 03",
        "                                     ^^",
    ]


def test_a_predicate_that_was_never_true(linkrx_veth: Pair) -> None:
    """The failure of a predicate shows its name and the received packets."""

    def is_arp(packet: linkrx.Packet) -> bool:
        return packet.protocol == 0x0806

    near, far = linkrx_veth
    assert failure(far.expect, is_arp, timeout=0) == [
        "veth1 did not get a packet for which is_arp is true within 0 s.",
        "Nothing came at all.",
    ]
    near.inject(frame(number) for number in range(12))
    arrived(far, 12)
    lines = failure(far.expect, is_arp, timeout=0.05)
    assert lines[1] == "What came instead:"
    assert lines[-1] == "  ... and 2 more"


def test_too_few(linkrx_veth: Pair) -> None:
    """The failure of `collect` shows how many packets came, and which."""
    near, far = linkrx_veth
    near.inject(frame())
    arrived(far, 1)
    assert failure(far.collect, 2, timeout=0.05) == [
        "1 of 2 packets came in on veth1 within 0.05 s:",
        "  1. 02:00:5e:00:00:01 > 02:00:5e:00:00:02, protocol 0x88b5, 60 bytes",
    ]
    near.down()
    far.collect(1)
    assert failure(far.collect, 1, timeout=0)[-1] == "veth1 has no carrier: its other end is down."


def test_something_where_nothing_should_come(linkrx_veth: Pair) -> None:
    """`expect_nothing` fails at the first packet that matches, and shows it."""
    near, far = linkrx_veth
    near.inject([frame(), arp("10.0.0.2")])
    assert failure(far.expect_nothing, 30, arp("10.0.0.2")) == [
        "veth1 should have got no frame like the one given within 30 s, but got:",
        "  1. 02:00:5e:00:00:01 > 02:00:5e:00:00:02, ARP request of 10.0.0.1 (02:00:5e:00:00:01) to 10.0.0.2, 42 bytes",
    ]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "0 bytes, too short for an Ethernet header: "),
        (bytes(13), "13 bytes, too short for an Ethernet header: " + " ".join(["00"] * 13)),
        (bytes(14), "00:00:00:00:00:00 > 00:00:00:00:00:00, protocol 0x0000, 14 bytes"),
    ],
)
def test_lines(data: bytes, line: str) -> None:
    """A frame of any length gives a line."""
    assert differences.line_of(data) == line


def test_lines_of_ip() -> None:
    """The line of an IP packet has addresses, protocol and ports. A packet that is cut anywhere gives a line too."""
    udp = struct.pack("!HHHH", 68, 67, 8, 0)
    four = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2") + udp
    six = struct.pack("!IHBB16s16s", 6 << 28, 8, 58, 64, bytes(15) + b"\1", bytes(15) + b"\2") + udp
    assert differences.line_of(four, ethernet=False) == "IPv4 10.0.0.1 > 10.0.0.2, UDP 68 > 67, 28 bytes"
    assert differences.line_of(six, ethernet=False) == "IPv6 ::1 > ::2, ICMPv6, 48 bytes"
    for packet in (HEADER + b"\x08\x00" + four, HEADER + b"\x86\xdd" + six, arp("10.0.0.2")):
        for size in range(len(packet)):
            assert differences.line_of(packet[:size]).count("\n") == 0
            assert differences.line_of(packet[:size], ethernet=False).count("\n") == 0


def test_long_differences() -> None:
    """Only the first rows of a long difference are shown. Frames of different lengths differ after the end of the shorter one."""
    assert list(differences.difference(bytes(1000), b"\1" * 1000))[-1] == "  ... and 55 rows more"
    assert list(differences.difference(b"ab", b"a")) == [
        "  - 0000  61 62",
        "  + 0000  61",
        "             ^^",
    ]


# Changes to an interface.


def test_down_and_up(linkrx_veth: Pair) -> None:
    """An end that is down refuses to send. When it is up again it works, and earlier packets are kept."""
    near, far = linkrx_veth
    near.inject(frame(1))
    near.down()
    assert failure(near.inject, frame()) == ["veth0 is down: up() sets it up"]
    assert failure(far.inject, frame(), timeout=0) == [
        "veth1 got no carrier within 0 s: its other end is down"
    ]
    near.up()
    near.inject(frame(2))
    assert far.collect(2) == [frame(1), frame(2)]


def test_another_name(linkrx_veth: Pair) -> None:
    """A renamed end is the same end."""
    near, far = linkrx_veth
    index = near.index
    near.rename("other")
    assert (near.name, near.index) == ("other", index)
    near.inject(frame())
    far.expect(frame())
    assert repr(near) == "<End other>"


def test_deleted(linkrx_veth: Pair) -> None:
    """Deleting an end ends both. Received packets are kept, and a waiting call fails at once."""
    near, far = linkrx_veth
    near.inject(frame())
    near.delete()
    far.expect(frame())
    assert failure(far.expect, frame(), timeout=60)[-1] == "The interface is gone."
    assert "is gone" in failure(far.inject, frame())[0]
    assert repr(far) == "<End gone>"
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


def test_mtu(linkrx_veth: Pair) -> None:
    """A frame longer than the MTU is refused, and the error says how to raise the MTU."""
    near, far = linkrx_veth
    assert near.mtu == 1500
    with pytest.raises(
        ValueError, match=r"a frame of 3000 bytes is too long for veth0, whose MTU is 1500: set_mtu"
    ):
        near.inject(frame(0, 3000))
    near.set_mtu(9000)
    far.set_mtu(9000)
    near.inject(frame(0, 9014))
    far.expect(frame(0, 9014))


def test_addresses(linkrx_veth: Pair) -> None:
    """Link and IP addresses can be set and read. An IPv6 address switches IPv6 on for that interface."""
    near, _ = linkrx_veth
    near.set_mac(HEADER[:6])
    assert near.mac == HEADER[:6]
    assert near.addresses == []
    near.add_address("10.0.0.1/24")
    near.add_address("fd00::1/64")
    assert near.addresses == [
        ipaddress.IPv4Interface("10.0.0.1/24"),
        ipaddress.IPv6Interface("fd00::1/64"),
    ]
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as bound:
        bound.bind(("fd00::1", 0))


def udp_through(near: End, far: End) -> linkrx.Packet:
    """A UDP packet of the kernel, as an end receives it."""
    near.add_address("10.0.0.1/24")
    subprocess.run(
        ["ip", "neighbour", "add", "10.0.0.2", "lladdr", far.mac.hex(":"), "dev", near.name], check=True
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", ("10.0.0.2", 9))
    return far.expect(lambda packet: packet.protocol == 0x0800)


@needs_metadata
@pytest.mark.parametrize("on", [False, True])
def test_offloads(linkrx_veth: Pair, on: bool) -> None:
    """By default ends have no offloads, so the kernel finishes checksums and segments packets."""
    near, far = linkrx_veth
    if on:
        near.set_offloads(True)
    assert takes_super_packets(near.name) == on
    packet = udp_through(near, far)
    assert packet.checksum_unfinished == on
    if on:
        wanted = bytes(packet)[:-1] + b"O"
        assert any("set_offloads(False)" in line for line in failure(_again, far, packet, wanted))


def _again(far: End, packet: linkrx.Packet, wanted: bytes) -> None:
    """Fail an `expect` with this packet received."""
    far._came.append(packet)
    far.expect(wanted, timeout=0)


# TAP, TUN, bridge, and existing interfaces.


@pytest.fixture
def network(linkrx_network: Network) -> Network:
    """The network."""
    return linkrx_network


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_a_queue(network: Network, mode: str) -> None:
    """Injected frames are read from the queue, and frames that are written to the queue are received."""
    end = network.tap() if mode == "tap" else network.tun()
    packet = (
        frame()
        if mode == "tap"
        else bytes.fromhex("45000014000000004011000" + "00a0000010a000002") + bytes(1)
    )
    assert failure(end.inject, packet, timeout=0) == [
        f"{end.name} got no carrier within 0 s: no program has its queue open; `.queue` opens it, and so does "
        f"TunTap('{end.name}', '{mode}')"
    ]
    with linkrx.open(end.queue) as rx:
        end.inject(packet)
        assert rx.recv(30) == packet
    os.write(end.queue.fileno(), packet)
    assert end.expect(packet) == packet
    assert end.queue is end.queue


def test_a_queue_that_is_not_read(network: Network) -> None:
    """Frames for which the queue has no room are lost, and the message of a failing test has their number."""
    end = network.tap()
    assert end.queue
    end.inject(frame(number) for number in range(3000))
    assert any(
        line.endswith("frames that were sent out of tap0 were dropped: nobody read them in time.")
        for line in failure(end.expect, frame(), timeout=0)
    )


def test_several_queues_with_headers(network: Network) -> None:
    """A TAP device can have several queues, virtio-net headers and offloads."""
    with pytest.raises(TypeError, match=r"tap\(\) has no option 'offloads'"):
        network.tap(offloads=True)  # type: ignore[call-arg]
    end = network.tap("multi", multi_queue=True, vnet_header=True, offload=True)
    one, other = end.queue, end.open_queue()
    assert one.name == other.name == "multi"
    assert one.offload & linkrx.Offload.TSO4
    os.write(other.fileno(), bytes(10) + frame())
    end.expect(frame())


def test_a_bridge(network: Network) -> None:
    """Each port of a bridge receives a broadcast of another port once, also with an invalid IP packet."""
    bridge = network.bridge()
    one, other, third = (bridge.port() for _ in range(3))
    wrong = b"\xff" * 6 + one.mac + b"\x08\x00" + b"not an IP packet".ljust(46)
    one.inject(wrong)
    for end in (other, third, bridge):
        end.expect(wrong)
        end.expect_nothing(0)
    bridge.inject(wrong)
    one.expect(wrong)
    third.inject(one.mac + third.mac + wrong[12:])
    one.expect(one.mac + third.mac + wrong[12:])
    other.expect(wrong)
    other.expect_nothing()


def test_an_existing_interface(network: Network) -> None:
    """`end` makes an end of an existing interface. On lo it receives the frames that it sends."""
    end = network.end("lo")
    end.inject(frame())
    end.expect(frame())
    assert end.mac == bytes(6)


def test_from_any_thread(linkrx_veth: Pair) -> None:
    """Under asyncio, methods that wait can be run in a thread, and the others in the event loop."""

    async def main() -> None:
        near, far = linkrx_veth
        near.set_mtu(1400)
        waiting = asyncio.create_task(asyncio.to_thread(far.expect, frame()))
        near.inject(frame())
        assert await waiting == frame()
        assert near.mtu == 1400

    asyncio.run(main())


def test_back_behind_an_exception() -> None:
    """After the block, also after an exception, the thread is in its old namespace, and no descriptor is left."""
    before = Path("/proc/thread-self/ns/net").readlink()
    for fail in ("veth", "bridge", "tap"):
        with pytest.raises(RuntimeError), Network() as network:
            getattr(network, fail)()
            raise RuntimeError
        assert Path("/proc/thread-self/ns/net").readlink() == before
        assert not network.is_open
    assert network.fileno() == -1


def test_a_kernel_without_such_devices(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of device without a driver in the kernel raises an error that says how to load one."""
    with pytest.raises(
        linkrx.LinkrxError, match=r"no lrxnone devices: load the driver with `sudo modprobe lrxnone`"
    ):
        network._unable = ends_with
        network._make("lrxnone", ifname="x")


def ends_with(error: linkrx.LinkrxError) -> Any:
    """Raise an error, in place of a method."""
    raise error


def test_without_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange of frames works on every backend that a host can have."""
    every = linkrx.backends()
    for lacking in range(3):
        there = [info for info in every if info.supported and info.name != "readv"][lacking:] or every[-1:]
        monkeypatch.setattr(ends, "backends", lambda there=there: there)
        with Network() as network:
            near, far = network.veth()
            assert far._rx.backend == there[0].name
            near.inject(frame())
            far.expect(frame())
