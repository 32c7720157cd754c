"""On every backend, protocol, link type and sender of each packet are those that the kernel reports."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

import pytest
from support.run import that_take

import linkrx
from linkrx.kernel.uapi import ETH_P_ALL, IFF_TUN, TUNSETIFF
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

pytestmark = pytest.mark.usefixtures("devices")
backends = pytest.mark.parametrize("backend", that_take("packet"))
IP = bytes.fromhex("4500001c000000004011000001010101020202020007000700080000")
ARPHRD_ETHER, ARPHRD_NONE, ETH_P_802_2 = 1, 0xFFFE, 4


def tagged(*words: int) -> bytes:
    """The end of a frame: these words of VLAN tags, and a payload that begins like IPv4."""
    return struct.pack(f"!{len(words)}H", *words) + b"\x45" + bytes(45)


@backends
@pytest.mark.parametrize(
    ("behind", "protocol"),
    [
        (struct.pack("!H", 38) + b"\x42\x42\x03" + bytes(43), ETH_P_802_2),
        (b"\x88\x47" + struct.pack("!I", 0x450001FF) + bytes(46), 0x8847),
        (b"\x08\x06" + bytes(46), 0x0806),
        (b"\x88\xb5\x45" + bytes(45), 0x88B5),
        (b"\x08\x00" + IP + bytes(20), 0x0800),
        (tagged(0x88A8, 100, 0x8100, 0x4005, 0x0800), 0x8100),
        (tagged(0x88A8, 100, 0x8100, 0x6005, 0x0800), 0x8100),
    ],
    ids=["spanning tree", "MPLS", "ARP", "0x88b5", "IPv4", "two tags, priority 2", "two tags, priority 3"],
)
def test_a_cooked_socket(backend: str, behind: bytes, protocol: int) -> None:
    """On a cooked socket the protocol is the kernel's for any first nibble, also with an inner VLAN tag, and the sender is `remote`."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as cooked,
    ):
        cooked.bind((near, ETH_P_ALL))
        with linkrx.open(cooked, backend=backend) as rx:
            injector.send(LOCAL + REMOTE + behind)
            packet = rx.recv(10)
            assert (packet.protocol, packet.remote, packet.local) == (protocol, REMOTE, None)
            assert (packet.link_type, bytes(packet.link_header)) == (ARPHRD_ETHER, b"")
            assert packet.interface == socket.if_nametoindex(near)


@backends
def test_a_socket_that_sees_several_kinds_of_devices(backend: str) -> None:
    """On an unbound raw socket, frames of a TUN have no link header, and frames of a veth have one."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.TunTap("told0", "tun") as tun,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as everything,
        linkrx.open(everything, backend=backend) as rx,
    ):
        Device("told0").set(state="up")
        os.write(tun.fileno(), IP)
        injector.send(LOCAL + REMOTE + b"\x08\x00" + IP)
        seen: dict[int, tuple[int, bytes | None, bytes | None, int]] = {}
        while len(seen) < 2:
            packet = rx.recv(10)
            if bytes(packet.data) == IP and packet.interface != socket.if_nametoindex(far):
                seen[packet.link_type] = (packet.protocol, packet.remote, packet.local, packet.interface)
        assert seen == {
            ARPHRD_NONE: (0x0800, None, None, socket.if_nametoindex("told0")),
            ARPHRD_ETHER: (0x0800, REMOTE, LOCAL, socket.if_nametoindex(near)),
        }


@pytest.mark.parametrize("backend", that_take("tun"))
def test_a_tun_queue_with_packet_information(backend: str) -> None:
    """struct tun_pi gives the protocol of a packet, also if its first nibble is that of another."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"told1", IFF_TUN))
        Device("told1").set(state="up")
        with (
            linkrx.open(fd, backend=backend) as rx,
            socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sender,
        ):
            sender.sendto(b"\x45 no IP", ("told1", 0x8847))
            packet = rx.recv(10)
            while packet.protocol == 0x86DD:
                packet = rx.recv(10)
            assert (packet.protocol, bytes(packet), packet.link_type) == (0x8847, b"\x45 no IP", ARPHRD_NONE)
    finally:
        os.close(fd)
