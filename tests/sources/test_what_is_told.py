"""Tests each sentence of docs/sources.md about the kernel's metadata of a packet."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
from support.paths import ROOT
from support.queues import Queue
from support.run import that_take
from support.super_packets import NOISE, TCP, UDP, Super, ones_complement

import linkrx
from linkrx.kernel.uapi import PACKET_VNET_HDR, SOL_PACKET
from linkrx.testing.devices import Device, delete_if_there, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("devices")
backends = pytest.mark.parametrize("backend", that_take("packet"))

OURS = b"\x88\xb5"
OTHER = bytes.fromhex("020000000099")  # not the address of any device
VXLAN_PORT = 4789
CUT_TO = 40
RETURN = 0x06  # BPF_RET | BPF_K


def test_the_sentences() -> None:
    """docs/sources.md has exactly the sentences that are tested here."""
    text = (ROOT / "docs" / "sources.md").read_text()
    part = text.partition("### What the kernel tells of a packet")[2].partition("\n### ")[0]
    said = [" ".join(line.split()) for line in re.findall(r"^\* (.*(?:\n  .*)*)", part, re.MULTILINE)]
    assert [line.split(":")[0] for line in said] == [
        "Every backend tells VLAN tags, unfinished checksums and cuts by a socket filter of packet sockets.",
        "`promiscuous=False` asks for nothing",
        "Frames of an `ifb` device count as outgoing",
        "Constant IPv4 identifiers of a super-packet come counted up with `segment=True`",
        "Super-packets of tunnels are not taken",
    ]


def ours(rx: linkrx.Dispatcher, count: int) -> list[linkrx.Packet]:
    """Receive `count` packets of a test. The kernel sends others."""
    got: list[linkrx.Packet] = []
    while len(got) < count:
        got += [packet for packet in [rx.recv(PATIENCE)] if packet.protocol == 0x88B5]
    return got


@backends
def test_tags(backend: str) -> None:
    """Every backend gives the VLAN tag that the kernel took out of a frame, also a tag of 0, and tagged() puts it back."""
    tags = [(0x8100, 0x2005), (0x8100, 0), (0x88A8, 7)]
    with veth() as (near, far), injector_on(far) as injector, linkrx.open(near, backend=backend) as rx:
        sent = [LOCAL + REMOTE + struct.pack("!HH", *tag) + OURS + bytes(46) for tag in tags]
        for frame in (*sent, LOCAL + REMOTE + OURS + bytes(46)):
            injector.send(frame)
        got = ours(rx, 4)
        assert [packet.vlan for packet in got] == [*(linkrx.Vlan(*tag) for tag in tags), None]
        assert [packet.tagged() for packet in got[:3]] == sent


@backends
def test_unfinished_checksums(backend: str) -> None:
    """Every backend marks an unfinished checksum, as over veth, and no finished one."""
    with (
        veth() as (near, far),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender,
        linkrx.open(near, backend=backend) as rx,
    ):
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.bind((far, 0))
        case = Super(4, UDP, 100, 0)
        sender.send(case.vnet() + case.frame())
        sender.send(bytes(10) + case.frame())
        unfinished: list[int] = []
        for batch in rx.batches(PATIENCE):
            unfinished += [
                flags & linkrx.Flags.CHECKSUM_UNFINISHED
                for flags, protocol in zip(batch.flags, batch.protocols, strict=True)
                if protocol == 0x0800
            ]
            if len(unfinished) == 2:
                break
        assert unfinished == [linkrx.Flags.CHECKSUM_UNFINISHED, 0]


@backends
def test_cuts_by_a_filter(backend: str) -> None:
    """Every backend flags a packet that a socket filter has cut, with its true length."""
    with veth() as (near, far), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        borrowed.bind((near, 0x0003))
        with (
            injector_on(far) as injector,
            linkrx.open(borrowed, backend=backend, filter=[(RETURN, 0, 0, CUT_TO)]) as rx,
        ):
            injector.send(LOCAL + REMOTE + OURS + bytes(186))
            (packet,) = ours(rx, 1)
            assert (len(packet), packet.wire_length, packet.truncated) == (CUT_TO, 200, True)


@backends
def test_a_device_that_is_promiscuous(backend: str) -> None:
    """With promiscuous=False frames for other addresses are received only if the device is promiscuous already."""
    with veth() as (near, far), injector_on(far) as injector, ExitStack() as stack:
        name = near + "b"  # a bridge checks the destination address of a frame, and a veth does not
        subprocess.run(["ip", "link", "add", name, "type", "bridge", "forward_delay", "0"], check=True)
        stack.callback(delete_if_there, name)
        subprocess.run(["ip", "link", "set", near, "master", name], check=True)
        Device(name).set_up()
        with linkrx.open(name, backend=backend) as rx:
            mine = next(one.address for one in linkrx.interfaces() if one.name == name)

            def send(mark: int) -> None:
                for to in (OTHER, mine):
                    injector.send(to + REMOTE + OURS + bytes([mark]) * 46)

            send(1)
            assert [packet.local for packet in ours(rx, 1)] == [mine]
            subprocess.run(["ip", "link", "set", name, "promisc", "on"], check=True)
            send(2)
            assert [(packet.local, packet.data[0]) for packet in ours(rx, 2)] == [(OTHER, 2), (mine, 2)]
            subprocess.run(["ip", "link", "set", name, "promisc", "off"], check=True)
            send(3)
            assert [(packet.local, packet.data[0]) for packet in ours(rx, 1)] == [(mine, 3)]
        # promiscuous=True is undone by close().
        if backend == that_take("packet")[0]:
            with linkrx.open(name, promiscuous=True) as rx:
                send(4)
                assert [packet.local for packet in ours(rx, 2)] == [OTHER, mine]


@contextmanager
def redirected(near: str) -> Iterator[str]:
    """An ifb device to which the incoming frames of an interface are redirected."""
    name = near + "i"
    made = subprocess.run(
        ["ip", "link", "add", name, "type", "ifb"], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"this kernel makes no ifb device: {made.stderr}")
    try:
        Device(name).set(state="up")
        parent = ["dev", near, "parent", "ffff:"]
        everything = ["protocol", "all", "u32", "match", "u32", "0", "0"]
        subprocess.run(["tc", "qdisc", "add", "dev", near, "ingress"], check=True)
        action = ["action", "mirred", "egress", "redirect", "dev", name]
        subprocess.run(["tc", "filter", "add", *parent, *everything, *action], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@pytest.mark.parametrize("source", ["by name", "any"])
@pytest.mark.parametrize(
    "backend",
    [info.name for info in linkrx.backends() if info.supported and "outgoing" in info.honours],
)
def test_frames_of_an_ifb(backend: str, source: str) -> None:
    """An ifb's frames count as outgoing: they are received only with outgoing=True, and marked."""
    with veth() as (near, far), redirected(near) as ifb, injector_on(far) as injector:
        index = socket.if_nametoindex(ifb)
        given = ifb if source == "by name" else "any"
        for outgoing in (False, True):
            with linkrx.open(given, backend=backend, outgoing=outgoing) as rx:
                for number in range(3):
                    injector.send(LOCAL + REMOTE + OURS + bytes([number]) * 46)
                rx.stop(flush=True)
                got = [packet for packet in rx if packet.interface == index and packet.protocol == 0x88B5]
                assert [(packet.data[0], packet.outgoing) for packet in got] == [
                    (number, True) for number in range(3) if outgoing
                ]


@backends
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_constant_identifiers(backend: str, protocol: int) -> None:
    """The frames of one super-packet have increasing identifiers, because its header has no field for constant ones, and valid checksums."""
    with (
        veth() as (near, far),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender,
        linkrx.open(near, backend=backend, segment=True) as rx,
    ):
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.bind((far, 0))
        case = Super(4, protocol, 4000, 1000, identification=0)
        sender.send(case.vnet() + case.frame())
        got: list[bytes] = []
        while len(got) < 4:
            got += [bytes(packet) for packet in [rx.recv(PATIENCE)] if packet.protocol == 0x0800]
        assert [int.from_bytes(frame[18:20], "big") for frame in got] == [0, 1, 2, 3]
        assert {ones_complement(frame[14:34]) for frame in got} == {0xFFFF}


@contextmanager
def tunnel(far: str) -> Iterator[socket.socket]:
    """A socket that sends super-packets into a VXLAN tunnel through an interface."""
    name = far + "v"
    run = ["ip", "addr", "add", "192.0.2.1/24", "dev", far]
    subprocess.run(run, check=True)
    add = ["ip", "link", "add", name, "type", "vxlan", "id", "7", "remote", "192.0.2.2"]
    subprocess.run([*add, "local", "192.0.2.1", "dstport", str(VXLAN_PORT), "dev", far], check=True)
    neighbour = ["192.0.2.2", "lladdr", LOCAL.hex(":"), "dev", far, "nud", "permanent"]
    subprocess.run(["ip", "neigh", "add", *neighbour], check=True)
    try:
        Device(name).set_up()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            sender.bind((name, 0))
            yield sender
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


def is_tunnelled(packet: linkrx.Packet) -> bool:
    """Whether a packet is of the VXLAN tunnel."""
    return packet.protocol == 0x0800 and packet.data[9] == UDP and packet.u16(14 + 22) == VXLAN_PORT


@backends
def test_super_packets_of_tunnels_on_packet_sockets(backend: str) -> None:
    """With a virtio-net header, which cannot describe super-packets of tunnels, they count as malformed, or as dropped on a ring.

    Later packets are received whole. Without a virtio-net header these super-packets are received unchanged.
    """
    case = Super(4, TCP, 5000, 1000)
    with veth() as (near, far), tunnel(far) as sender, injector_on(far) as injector:
        Device(near, far).set_mtu(1500)
        with linkrx.open(near, backend=backend, segment=True) as rx:
            sender.send(case.vnet() + case.frame())
            injector.send(LOCAL + REMOTE + OURS + bytes(46))
            assert len(ours(rx, 1)) == 1
            stats = rx.stats()
            assert stats.malformed + (stats.kernel_drops or 0) == 1
            assert rx.end is None
        with linkrx.open(near, backend=backend) as rx:
            sender.send(case.vnet() + case.frame())
            got: list[linkrx.Packet] = []
            while not got:
                got += [packet for packet in [rx.recv(PATIENCE)] if is_tunnelled(packet)]
            assert len(got[0]) > 5000
            assert not got[0].truncated


@pytest.mark.parametrize("backend", that_take("tap"))
def test_super_packets_of_tunnels_on_tap(backend: str) -> None:
    """For a TAP queue with offloads the kernel segments super-packets of tunnels, so their frames are received and none is malformed."""
    case = Super(4, TCP, 5000, 1000, data=NOISE)
    with (
        closing(Queue("tap", offload=True)) as queue,
        tunnel(queue.tap.name) as sender,
        linkrx.open(queue.tap, backend=backend, segment=True) as rx,
    ):
        sender.send(case.vnet() + case.frame())
        got: list[bytes] = []
        while len(got) < 5:
            got += [bytes(packet) for packet in [rx.recv(PATIENCE)] if is_tunnelled(packet)]
        # Ethernet, IPv4, UDP and VXLAN around each frame.
        assert [len(frame) for frame in got] == [50 + len(frame) for frame in case.frames()]
        assert [frame[-1000:] for frame in got] == [NOISE[n : n + 1000] for n in range(0, 5000, 1000)]
        assert rx.stats().malformed == 0
