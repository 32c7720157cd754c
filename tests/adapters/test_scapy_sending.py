"""scapy's sendp, srp1, answering machines and bridge_and_sniff on linkrx."""

from __future__ import annotations

import gc
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, ARP_am, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.sendrecv import bridge_and_sniff, sendp, srp1
from support.sniffing import scapy_uses_linkrx, sniffing

import linkrx
from linkrx.adapters.scapy import L2Socket
from linkrx.testing import rigs
from linkrx.testing.devices import Device
from linkrx.testing.rigs import LOCAL, REMOTE, Rig
from linkrx.testing.waiting import PATIENCE, running, until

__all__ = ["scapy_uses_linkrx"]

pytestmark = pytest.mark.usefixtures("devices", "scapy_uses_linkrx")

LOCAL_TEXT, REMOTE_TEXT = LOCAL.hex(":"), REMOTE.hex(":")


def numbered(number: int) -> Ether:
    """A numbered frame of scapy."""
    return Ether(dst=LOCAL_TEXT, src=REMOTE_TEXT, type=0x88B5) / Raw(number.to_bytes(4, "big") + bytes(42))


@pytest.mark.parametrize("make", [rigs.interface, rigs.tap])
def test_sendp(make: rigs.MakeRig) -> None:
    """sendp sends each packet once, in order, VLAN tags included, and the far end receives them."""
    with make() as rig:
        assert rig.far_end is not None
        with rig.far_end() as take, L2Socket(rig.source) as sender:
            packets = [numbered(number) for number in range(20)]
            if isinstance(rig.source, str):
                sendp(packets, iface=rig.source)
            else:
                sendp(packets, socket=sender)
            assert [take() for _ in packets] == [bytes(packet) for packet in packets]
            sent = sendp(packets[:3], socket=sender, return_packets=True)
            assert sent is not None
            assert all(packet.sent_time for packet in sent)
            assert [take() for _ in range(3)] == [bytes(packet) for packet in packets[:3]]


def test_a_tag_is_sent() -> None:
    """A frame with a VLAN tag arrives with it."""
    tagged = Ether(dst=LOCAL_TEXT, src=REMOTE_TEXT) / Dot1Q(vlan=7) / IP() / UDP() / bytes(40)
    with rigs.veth() as (near, far), sniffing(iface=far, filter="vlan 7", count=1) as found:
        sendp(tagged, iface=near)
        assert [bytes(packet) for packet in found.wait()] == [bytes(tagged)]


def test_a_short_frame_is_padded() -> None:
    """A frame that is too short for the link is padded with zeroes, as by scapy's own sockets."""
    with rigs.interface() as rig, linkrx.open(rig.source) as near, rigs_far(rig) as far:
        assert far.send(Raw(b"abc")) == 60
        assert bytes(near_packet(near, b"abc")) == b"abc".ljust(60, b"\0")
        with pytest.raises(OSError, match="longer than its MTU"):
            far.send(Raw(bytes(70_000)))


def rigs_far(rig: Rig) -> L2Socket:
    """A socket on the other end of a rig's veth pair."""
    return L2Socket(str(rig.source).replace("lrxn", "lrxf"))


def near_packet(near: linkrx.Dispatcher, start: bytes) -> linkrx.Packet:
    """The next packet that starts with these bytes."""
    while True:
        packet = near.recv(PATIENCE)
        if packet[: len(start)] == start:
            return packet


def test_send_waits_for_room() -> None:
    """`send` waits while the kernel's queue is full, so nothing is lost."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, L2Socket(near) as sender:
        full = threading.Event()
        send, number = sender.rx.send, 500

        def until_full() -> None:
            for one in range(number):
                try:
                    send(
                        bytes(numbered(one)),
                    )
                except BlockingIOError:
                    full.set()
                    sender.send(numbered(one))

        with running(until_full):
            assert full.wait(PATIENCE)
            seen = [far.recv(100) for _ in range(number)]
        assert seen == [bytes(numbered(one)) for one in range(number)]


def test_srp1_and_an_answering_machine() -> None:
    """srp1 gets the ARP reply of scapy's answering machine at the far end, and None without an answer."""
    with rigs.veth() as (near, far):
        started = threading.Event()
        machine = ARP_am(iface=far, IP_addr="10.0.0.2", ARP_addr=LOCAL_TEXT)
        machine.defoptsniff["started_callback"] = started.set
        sniffer = machine.bg()
        assert started.wait(PATIENCE)
        try:
            request = Ether(dst="ff:ff:ff:ff:ff:ff", src=REMOTE_TEXT) / ARP(
                hwsrc=REMOTE_TEXT, psrc="10.0.0.1", pdst="10.0.0.2"
            )
            answer = srp1(request, iface=near, timeout=PATIENCE)
            assert answer is not None
            assert (answer[ARP].hwsrc, answer[ARP].psrc) == (LOCAL_TEXT, "10.0.0.2")
            with L2Socket(near, filter="arp") as asks:
                request[ARP].pdst = "10.0.0.3"
                assert asks.sr1(request, timeout=0.2) is None
                request[ARP].pdst = "10.0.0.2"
                again = asks.sr1(request, timeout=PATIENCE, threaded=True)
                assert again is not None
        finally:
            sniffer.stop()


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_the_kernel_answers(mode: str) -> None:
    """On a TAP and a TUN, the kernel answers ARP and ping requests, and scapy gets the answers."""
    with linkrx.TunTap("lrxs0", mode=mode) as queue, L2Socket(queue) as asks, IPRoute() as route:
        index = socket.if_nametoindex(queue.name)
        route.addr("add", index=index, address="10.9.0.1", prefixlen=24)
        Device(queue.name).set_up()
        ping: Packet = IP(src="10.9.0.2", dst="10.9.0.1") / ICMP(id=7) / b"hello"
        if mode == "tap":
            arp = ARP(hwsrc=REMOTE_TEXT, psrc="10.9.0.2", pdst="10.9.0.1")
            answer = asks.sr1(Ether(dst="ff:ff:ff:ff:ff:ff", src=REMOTE_TEXT) / arp, timeout=PATIENCE)
            assert answer is not None
            assert answer[ARP].psrc == "10.9.0.1"
            ping = Ether(dst=answer[ARP].hwsrc, src=REMOTE_TEXT) / ping
        answer = asks.sr1(ping, timeout=PATIENCE)
        assert answer is not None
        assert bytes(answer).endswith(b"hello")


class Bridged:
    """Two veth pairs. `ends` are the far ends. bridge_and_sniff runs between the near ends in a thread, which `wait` joins."""

    def __init__(self, near: tuple[str, str], count: int, **wanted: Any) -> None:
        self.seen: list[Packet] = []
        started = threading.Event()

        def bridge() -> None:
            found = bridge_and_sniff(
                *near, count=count, started_callback=started.set, lfilter=is_udp, timeout=60, **wanted
            )
            self.seen.extend(found)

        self.thread = threading.Thread(target=bridge)
        self.thread.start()
        assert started.wait(PATIENCE)

    def wait(self) -> list[Packet]:
        """Wait for the bridge to end. Returns the packets that it received."""
        self.thread.join(2 * PATIENCE)
        assert not self.thread.is_alive()
        return self.seen


def is_udp(packet: Packet) -> bool:
    """Whether a packet is one of these tests' packets."""
    return UDP in packet


def udp(number: int) -> Ether:
    """A numbered UDP packet."""
    ip = IP(src="192.0.2.1", dst="192.0.2.2")
    return Ether(dst=LOCAL_TEXT, src=REMOTE_TEXT) / ip / UDP(sport=number, dport=9) / bytes(20)


def collected(name: str, number: int) -> Callable[[], list[Packet]]:
    """Start to receive `number` of these tests' packets on an interface. The returned call waits for them."""
    socket = L2Socket(name, filter="udp dst port 9")

    def wait() -> list[Packet]:
        found: list[Packet] = []
        with socket:
            while len(found) < number:
                packet = socket.recv()
                if packet is not None:
                    found.append(packet)
        return found

    return wait


def test_bridge_and_sniff() -> None:
    """bridge_and_sniff forwards frames in both directions, each once and in order, and returns them all."""
    with rigs.veth() as (one, far_one), rigs.veth() as (other, far_other):
        there, back = collected(far_other, 10), collected(far_one, 10)
        bridged = Bridged((one, other), count=20)
        for number in range(1, 11):
            sendp(udp(number), iface=far_one)
            sendp(udp(100 + number), iface=far_other)
        assert [bytes(packet) for packet in there()] == [bytes(udp(number)) for number in range(1, 11)]
        assert [packet[UDP].sport for packet in back()] == list(range(101, 111))
        assert len(bridged.wait()) == 20


def test_bridge_and_sniff_transforms() -> None:
    """If xfrm12 returns False the packet is dropped, if True it is forwarded, and a returned packet replaces it, as for NAT."""

    def translate(packet: Packet) -> Packet | bool:
        if packet[UDP].sport == 1:
            return False
        if packet[UDP].sport == 2:
            return True
        packet[IP].src = "198.51.100.1"
        del packet[IP].chksum, packet[UDP].chksum
        return packet

    with rigs.veth() as (one, far_one), rigs.veth() as (other, far_other):
        there = collected(far_other, 2)
        bridged = Bridged((one, other), count=3, xfrm12=translate, store=False)
        for number in (1, 2, 3):
            sendp(udp(number), iface=far_one)
        assert [(packet[UDP].sport, packet[IP].src) for packet in there()] == [
            (2, "192.0.2.1"),
            (3, "198.51.100.1"),
        ]
        assert bridged.wait() == []


def test_sending_on_the_interface_of_a_bridge() -> None:
    """A frame that xfrm sends on its own interface is not received there, and does not end the bridge."""
    with rigs.veth() as (one, far_one), rigs.veth() as (other, far_other):
        answered = collected(far_one, 2)

        def echo(packet: Packet) -> bool:
            sendp(packet, iface=packet.sniffed_on)
            return True

        there = collected(far_other, 2)
        bridged = Bridged((one, other), count=2, xfrm12=echo)
        for number in (1, 2):
            sendp(udp(number), iface=far_one)
        assert [packet[UDP].sport for packet in answered()] == [1, 2]
        assert [packet[UDP].sport for packet in there()] == [1, 2]
        assert len(bridged.wait()) == 2


@pytest.mark.parametrize("make", [rigs.tap, rigs.tun])
def test_bridge_of_taps(make: rigs.MakeRig) -> None:
    """bridge_and_sniff bridges sockets on TAPs and TUNs too."""
    with make() as one, make() as other, L2Socket(one.source) as near, L2Socket(other.source) as beyond:
        assert other.far_end is not None
        with other.far_end() as take:
            frames = [one.frame(60, number) for number in range(3)]
            bridged = threading.Thread(
                target=bridge_and_sniff,
                args=(near, beyond),
                kwargs={"count": 3, "lfilter": lambda packet: bytes(packet) in frames, "timeout": 60},
            )
            bridged.start()
            for frame in frames:  # queued frames are forwarded too
                one.send(frame)
            assert [take() for _ in frames] == frames
            bridged.join(PATIENCE)
            assert not bridged.is_alive()


def test_a_bridge_survives_a_flap(caplog: pytest.LogCaptureFixture) -> None:
    """Frames to a link that is down are lost, with scapy's warning. After it is up, the bridge forwards again."""
    with rigs.veth() as (one, far_one), rigs.veth() as (other, far_other):
        device = Device(other, far_other)
        with (
            caplog.at_level(logging.WARNING, "scapy.runtime"),
            sniffing(iface=far_other, filter="udp dst port 9") as found,
        ):
            bridged = Bridged((one, other), count=3)
            sendp(udp(1), iface=far_one)
            until(lambda: len(found.packets) == 1)
            device.set_down()
            sendp(udp(2), iface=far_one)
            until(lambda: "Cannot forward" in caplog.text)
            device.set_up()
            sendp(udp(3), iface=far_one)
            bridged.wait()
            until(lambda: len(found.packets) == 2)
        assert [packet[UDP].sport for packet in found.packets] == [1, 3]
    caplog.clear()  # tracebacks hold sockets that scapy leaves open
    gc.collect()
