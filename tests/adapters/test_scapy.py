"""scapy's sniff and AsyncSniffer on linkrx: options, packet attributes and ends."""

from __future__ import annotations

import logging
import socket as sockets
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from scapy.arch.linux import L2ListenSocket as OwnListenSocket
from scapy.config import conf
from scapy.error import Scapy_Exception
from scapy.layers.dot11 import RadioTap
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.sendrecv import sniff
from scapy.utils import wrpcap
from support.sniffing import scapy_uses_linkrx, sniffing

import linkrx
from linkrx.adapters import scapy as adapter
from linkrx.adapters.scapy import L2ListenSocket, L2Socket
from linkrx.kernel.uapi import ETH_P_ALL, SO_TIMESTAMPNS
from linkrx.testing import rigs
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import asleep, flooded, patiently, running, until

__all__ = ["scapy_uses_linkrx"]

pytestmark = pytest.mark.usefixtures("devices", "scapy_uses_linkrx")

OURS = "ether proto 0x88b5"  # frames of rigs; the kernel sends other packets


def is_ours(packet: Packet) -> bool:
    """Whether a rig made the packet."""
    return bool(bytes(packet)[12:14] == b"\x88\xb5")


def numbered(rig: Rig, numbers: range) -> list[bytes]:
    """Numbered frames of a rig."""
    return [rig.frame(60, number) for number in numbers]


def sent_at_start(rig: Rig, frames: list[bytes]) -> dict[str, Any]:
    """An option of `sniff`: the frames are sent after it has started to receive."""
    return {"iface": rig.source, "timeout": 60, "started_callback": lambda: list(map(rig.send, frames))}


def mixed() -> list[bytes]:
    """Frames of UDP, TCP and other protocols."""
    head = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")
    ip = IP(src="10.0.0.1", dst="10.0.0.2")
    return [
        bytes(head / ip / UDP(sport=1, dport=53) / b"asked"),
        bytes(head / ip / TCP(dport=53)),
        bytes(head / ip / UDP(sport=53, dport=1) / b"answered"),
        bytes(head / Raw(b"other")),
    ]


def test_sniff_count_prn_and_store(capsys: pytest.CaptureFixture[str]) -> None:
    """sniff returns `count` packets in order, and prints the results of prn. Without `store` it keeps none."""
    with rigs.interface() as rig:
        frames = numbered(rig, range(8))
        found = sniff(filter=OURS, count=5, prn=lambda packet: len(packet), **sent_at_start(rig, frames))
        assert [bytes(packet) for packet in found] == frames[:5]
        assert capsys.readouterr().out.split() == ["60"] * 5
        assert len(sniff(filter=OURS, count=5, store=False, **sent_at_start(rig, frames))) == 0


@pytest.mark.parametrize("backend", ["packet_mmap", "recvmmsg"])
def test_sniff_filter(backend: str) -> None:
    """The kernel filters: sniff gets the two frames of port 53 out of four. A backend can be named."""
    with rigs.interface() as rig:
        found = sniff(filter="udp port 53", count=2, backend=backend, **sent_at_start(rig, mixed()))
        assert [bytes(packet[UDP].payload) for packet in found] == [b"asked", b"answered"]


def test_except_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """conf.except_filter excludes packets from those that a filter accepts. `nofilter` accepts all."""
    with rigs.interface() as rig:
        monkeypatch.setattr(conf, "except_filter", "udp src port 1")
        (found,) = sniff(filter="udp port 53", count=1, **sent_at_start(rig, mixed()))
        assert found[UDP].sport == 53
        monkeypatch.setattr(conf, "except_filter", "not ether proto 0x88b5")
        frames = [*mixed(), *numbered(rig, range(1))]
        assert is_ours(sniff(count=1, **sent_at_start(rig, frames))[0])
        with L2Socket(rig.source, filter="not ip6", nofilter=True) as taken:
            for frame in mixed():
                rig.send(frame)
            assert UDP in one_of(taken, lambda packet: IP in packet)


def one_of(socket: L2Socket, wanted: Any) -> Packet:
    """The next packet for which `wanted` is true."""
    while True:
        packet = socket.recv()
        if packet is not None and wanted(packet):
            return packet


def test_a_wrong_filter() -> None:
    """An invalid expression raises Scapy_Exception with libpcap's message, as with scapy's own sockets. Monitor mode raises it too."""
    with rigs.interface() as rig:
        with pytest.raises(Scapy_Exception, match="upd"):
            sniff(iface=rig.source, filter="upd port 53", timeout=1)
        with pytest.raises(Scapy_Exception, match="iw dev"):
            sniff(iface=rig.source, monitor=True, timeout=1)


def test_no_such_interface() -> None:
    """An interface that does not exist raises ValueError, which names it, as with scapy's own sockets."""
    for socket in (L2Socket, L2ListenSocket, OwnListenSocket):
        with pytest.raises(ValueError, match="nope0"):
            socket(iface="nope0")


@pytest.mark.parametrize("wanted", [{"promisc": True}, {"type": 0x0800}])
def test_options_that_a_borrowed_source_cannot_have(wanted: dict[str, Any]) -> None:
    """promisc and type are refused, and not ignored, for sources other than an interface by name."""
    with rigs.tap() as rig, pytest.raises(linkrx.UnsupportedOption, match=r"promiscuous|protocol"):
        L2Socket(rig.source, **wanted)


def test_lfilter_and_stop_filter() -> None:
    """lfilter excludes packets, and the packet for which stop_filter is true is the last."""
    with rigs.interface() as rig:
        frames = numbered(rig, range(10))
        found = sniff(
            lfilter=lambda packet: is_ours(packet) and bytes(packet)[17] % 2 == 0,
            stop_filter=lambda packet: bytes(packet)[17] >= 5,
            **sent_at_start(rig, frames),
        )
        assert [bytes(packet) for packet in found] == frames[0:7:2]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_timeout(busy: bool) -> None:
    """`timeout` ends sniff, also under load."""
    with rigs.interface() as rig, ExitStack() as stack:
        if busy:
            stack.enter_context(flooded(rig))
        found: list[Packet] = []
        for _ in patiently(lambda: found):  # the thread that sends may get no turn in so short a time
            found.extend(sniff(iface=rig.source, timeout=0.3, filter=OURS))
            if not busy:
                break
        assert bool(found) == busy


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_async_sniffer(busy: bool) -> None:
    """AsyncSniffer receives from start to stop, and stop returns the packets, also under load."""
    with rigs.interface() as rig, sniffing(iface=rig.source, filter=OURS) as found, ExitStack() as stack:
        frames = numbered(rig, range(3))
        list(map(rig.send, frames))
        until(lambda: len(found.packets) >= 3)
        if busy:
            stack.enter_context(flooded(rig))
            until(lambda: len(found.packets) >= 100)
        found.sniffer.stop()
        assert not found.sniffer.running
        assert [bytes(packet) for packet in found.packets[:3]] == frames


@pytest.mark.parametrize("labelled", [False, True], ids=["list", "dict"])
def test_several_interfaces(labelled: bool) -> None:
    """A sniff of two interfaces gets the packets of both, in order, with the interface of each."""
    with rigs.interface() as one, rigs.interface() as other:
        names = [str(one.source), str(other.source)]
        iface: Any = {name: f"label of {name}" for name in names} if labelled else names
        with sniffing(iface=iface, filter=OURS, count=40) as found:
            for number in range(20):
                one.send(one.frame(60, number))
                other.send(other.frame(60, 100 + number))
            found.wait()
        for name, first in zip(names, (0, 100), strict=True):
            label = f"label of {name}" if labelled else name
            seen = [bytes(packet)[17] for packet in found.packets if packet.sniffed_on == label]
            assert seen == list(range(first, first + 20))


def tagged() -> list[bytes]:
    """Frames with one or two VLAN tags, of 802.1Q and 802.1ad, with and without a VLAN number, and one without a tag."""
    head = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")
    rest = IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=7) / bytes(100)
    return [
        bytes(head / tags / rest)
        for tags in (
            Dot1Q(vlan=5, prio=3, dei=1),
            Dot1Q(vlan=0, prio=6),
            Dot1AD(vlan=9) / Dot1Q(vlan=10),
            Dot1Q(vlan=4095) / Dot1Q(vlan=1),
        )
    ] + [bytes(head / rest)]


def until_stamped(rig: Rig) -> None:
    """Wait until the kernel stamps frames when they come. A worker switches that on; until then each socket stamps its own copy."""
    with sockets.socket(sockets.AF_PACKET, sockets.SOCK_RAW, 0) as seen:
        seen.setsockopt(sockets.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        seen.bind((str(rig.source), ETH_P_ALL))

        def stamped() -> bool:
            rig.send(rig.frame(60))
            sent = time.time_ns()
            told = seen.recvmsg(100, 100)[1]
            seconds, nanoseconds = struct.unpack("qq", told[0][2])
            return bool(seconds * 10**9 + nanoseconds <= sent)

        until(stamped)


@pytest.mark.parametrize("listens", [L2ListenSocket, L2Socket])
def test_as_scapys_own(listens: type[L2Socket]) -> None:
    """Bytes, dissection and times are the same as of scapy's own socket, VLAN tags included, and wirelen and direction are set."""
    before = time.time_ns()
    with rigs.interface() as rig, listens(rig.source) as mine:
        own = OwnListenSocket(iface=str(rig.source))
        both = {mine: "linkrx", own: "scapy"}
        until_stamped(rig)
        with own, sniffing(opened_socket=both, lfilter=lambda packet: UDP in packet) as found:
            for frame in tagged():
                rig.send(frame)
            until(lambda: len(found.packets) == 2 * len(tagged()))
    after = time.time_ns()
    ours, theirs = (
        [packet for packet in found.packets if packet.sniffed_on == who] for who in ("linkrx", "scapy")
    )
    assert [bytes(packet) for packet in ours] == [bytes(packet) for packet in theirs] == tagged()
    assert ours == theirs
    for packet, their in zip(ours, theirs, strict=True):
        assert packet.wirelen == len(packet)
        assert packet.direction == 1
        assert isinstance(packet.time, Decimal)
        # scapy's time is a float, exact to a quarter of that.
        assert abs(float(packet.time) - float(their.time)) < 2e-6
        assert packet.time.as_tuple().exponent == -9
        assert before <= int(packet.time * 10**9) <= after
    assert any(int(packet.time * 10**9) % 1000 for packet in ours)


def test_original_length() -> None:
    """wirelen of a frame that was cut is its true length. `recv(x)` cuts too."""
    with rigs.interface() as rig, L2Socket(rig.source, snaplen=64, filter="udp or vlan") as cut:
        for frame in tagged():
            rig.send(frame)
        for frame in tagged():
            packet = one_of(cut, lambda packet: True)
            assert packet.wirelen == len(frame) > len(packet)
            assert bytes(packet) == frame[: len(packet)]
        rig.send(tagged()[0])
        short = cut.recv(30)
        assert short is not None
        assert bytes(short) == tagged()[0][:30]
        assert short.wirelen == len(tagged()[0])


def test_direction() -> None:
    """L2ListenSocket receives packets that this host sends, with direction 2. L2Socket does not."""
    with (
        rigs.interface() as rig,
        L2Socket(rig.source, filter=OURS) as both,
        L2ListenSocket(rig.source, filter=OURS) as listens,
    ):
        both.send(Ether(rig.frame(60, 1)))
        rig.send(rig.frame(60, 2))
        seen = [one_of(listens, is_ours) for _ in range(2)]
        assert [(bytes(packet)[17], packet.direction) for packet in seen] == [(1, 2), (2, 1)]
        assert bytes(one_of(both, is_ours))[17] == 2
        with pytest.raises(Scapy_Exception, match="cannot send"):
            listens.send(Ether())


def test_one_protocol() -> None:
    """`type` selects packets of one EtherType."""
    with rigs.interface() as rig, L2ListenSocket(rig.source, type=0x88B5) as taken:
        for frame in [*mixed(), *numbered(rig, range(2))]:
            rig.send(frame)
        assert [bytes(one_of(taken, lambda packet: True))[17] for _ in range(2)] == [0, 1]


def test_waiting() -> None:
    """`recv` waits for a packet. It does not wait if the descriptor was polled before, or after set_nonblock."""
    with rigs.interface() as rig, L2Socket(rig.source, filter=OURS) as taken:
        found: list[Packet | None] = []
        with running(lambda: found.append(taken.recv())):
            until(lambda: asleep(taken.rx))
            rig.send(rig.frame(60, 1))
        assert found[0] is not None
        taken.fileno()
        assert taken.recv() is None
        taken.set_nonblock()
        assert taken.recv() is None
        assert taken.recv_raw() == (None, None, None)


def test_any_interface() -> None:
    """iface="any" receives from all interfaces, and each packet is dissected by the link type of its device."""
    with rigs.interface() as one, rigs.tun() as tun:
        with sniffing(iface="any", L2socket=L2ListenSocket, lfilter=lambda p: UDP in p) as found:
            one.send(mixed()[0])
            tun.send(mixed()[2][14:])
            # The frame is received twice: when it goes out of one end of the pair, and when it comes in at the other.
            until(lambda: len(found.packets) >= 3)
        assert [type(packet) for packet in found.packets] == [Ether, Ether, IP]


def test_link_types() -> None:
    """TAP gives Ethernet frames, and TUN gives IPv4 and IPv6. A packet without a reported EtherType is dissected by its link type."""
    six = bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=7, dport=7))
    with rigs.tap() as rig, L2Socket(rig.source) as taken:
        rig.send(mixed()[0])
        assert type(one_of(taken, lambda packet: UDP in packet)) is Ether
    with rigs.tun() as rig, L2Socket(rig.source, filter="udp") as taken:
        for packet in (mixed()[0][14:], six):
            rig.send(packet)
        assert [type(one_of(taken, lambda packet: UDP in packet)) for _ in range(2)] == [IP, IPv6]
        taken.fileno()
        rig.send(mixed()[1][14:])  # TCP, which linkrx's own filter rejects
        assert taken.recv() is None
    with rigs.packet_cooked() as rig, L2Socket(rig.source) as taken:
        rig.send(mixed()[0][14:])
        assert type(one_of(taken, lambda packet: UDP in packet)) is IP
    assert adapter._layer(803, 0, ethernet=False) is RadioTap
    assert adapter._layer(65534, 0x88B5, ethernet=False) is conf.raw_layer
    assert adapter._layer(0, 0, ethernet=True) is Ether


def test_a_capture_file(tmp_path: Path) -> None:
    """sniff of a capture file returns its packets, with their times, and ends."""
    path = tmp_path / "four.pcap"
    wrpcap(str(path), [Ether(frame) for frame in mixed()])
    taken = L2ListenSocket(linkrx.CaptureFile(path), filter="udp")
    found = sniff(opened_socket=taken)
    assert [bytes(packet) for packet in found] == mixed()[0:3:2]
    assert all(isinstance(packet.time, Decimal) for packet in found)


def test_a_flap_is_no_end() -> None:
    """One sniff gets the packets from before and after a link was down."""
    with rigs.interface() as rig, sniffing(iface=rig.source, filter=OURS, count=6) as found:
        assert rig.device is not None
        for number in range(3):
            rig.send(rig.frame(60, number))
            until(lambda number=number: len(found.packets) == number * 2 + 1)  # type: ignore[misc]
            rig.device.set_down()
            rig.device.set_up()
            rig.send(rig.frame(60, number))
            if number < 2:
                until(lambda number=number: len(found.packets) == number * 2 + 2)  # type: ignore[misc]
        assert [bytes(packet)[17] for packet in found.wait()] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("make", [rigs.interface, rigs.tap, rigs.tun])
def test_deletion_ends_it(make: rigs.MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    """After its device was deleted, sniff returns its packets, without a warning. A sniff of two devices continues with the other."""
    with make() as rig, rigs.interface() as other, caplog.at_level(logging.WARNING):
        gone, stays = L2Socket(rig.source), L2Socket(other.source, filter=OURS)
        with gone, stays, sniffing(opened_socket={gone: "gone", stays: "stays"}) as found:
            rig.send(rig.frame(60, 1))
            until(lambda: any(packet.sniffed_on == "gone" for packet in found.packets))
            assert rig.device is not None
            rig.device.delete()
            until(lambda: gone.closed)
            other.send(other.frame(60, 2))
            until(lambda: any(packet.sniffed_on == "stays" for packet in found.packets))
            other.device.delete()  # type: ignore[union-attr]
            found.wait()
        assert found.packets
    assert caplog.records == []


def test_recv_after_the_end() -> None:
    """`recv` after the end raises an error that is an EOFError and an OSError, each time."""
    with rigs.interface() as rig, L2Socket(rig.source) as taken:
        assert rig.device is not None
        rig.device.delete()
        for _ in range(2):
            with pytest.raises(EOFError) as caught:
                while True:
                    taken.recv()
            assert isinstance(caught.value, OSError)


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in its own process."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_scapy_is_imported_where_it_is_asked_for() -> None:
    """`import linkrx` does not import scapy. Without scapy the adapter's error says what to install."""
    done = run("import linkrx, sys; linkrx.open; print('scapy' in sys.modules)")
    assert done.stdout == "False\n"
    done = run(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'scapy': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        "import linkrx.adapters.scapy"
    )
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: linkrx.adapters.scapy needs scapy, which is not installed: pip install scapy"
    )


def test_frames_are_dissected_without_scapy_all() -> None:
    """A program that imports no other module of scapy gets Ethernet, ARP and IP layers."""
    done = run(
        "import socket, linkrx.adapters.scapy as adapter\n"
        "near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "with near, far, adapter.L2Socket(near) as sock:\n"
        f"    far.send(bytes.fromhex('{mixed()[0].hex()}'))\n"
        "    print(sock.recv().summary())"
    )
    assert done.stdout.startswith("Ether / IP / UDP 10.0.0.1:"), done.stderr
