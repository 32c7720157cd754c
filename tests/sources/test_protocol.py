"""protocol=: the kernel selects one EtherType of an interface."""

from __future__ import annotations

import socket

import pytest
from support.run import that_take

import linkrx
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("devices")

LLDP = 0x88CC
ARP = 0x0806


def of(protocol: int, number: int) -> bytes:
    """A frame of that EtherType."""
    return LOCAL + REMOTE + protocol.to_bytes(2, "big") + bytes([number]) * 46


@pytest.mark.parametrize("backend", that_take("packet"))
def test_one_protocol(backend: str) -> None:
    """All packets of the protocol are received, in order, and no others are received or counted."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.open(near, backend=backend, protocol=LLDP) as rx,
    ):
        for number in range(20):
            injector.send(of(LLDP if number % 4 == 0 else ARP, number))
        got = [rx.recv(PATIENCE) for _ in range(5)]
        assert [bytes(packet) for packet in got] == [of(LLDP, number) for number in range(0, 20, 4)]
        assert {packet.protocol for packet in got} == {LLDP}
        rx.stop(flush=True)
        assert list(rx) == []
        stats = rx.stats()
        assert (stats.packets, stats.unknown_protocol, stats.kernel_drops) == (5, 0, 0)


@pytest.mark.parametrize("backend", that_take("packet"))
def test_all_protocols_by_number(backend: str) -> None:
    """protocol=3 (ETH_P_ALL) is the same as no protocol."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.open(near, backend=backend, protocol=3) as rx,
    ):
        injector.send(of(LLDP, 1))
        injector.send(of(ARP, 2))
        got = [packet for packet in (rx.recv(PATIENCE) for _ in range(2)) if packet.remote == REMOTE]
        assert [bytes(packet) for packet in got] == [of(LLDP, 1), of(ARP, 2)]


def test_tags_are_forgotten() -> None:
    """A tagged frame is selected by the EtherType behind its tag. The kernel gives the tag only to sockets of all protocols."""
    with veth() as (near, far), injector_on(far) as injector, linkrx.open(near, protocol=LLDP) as rx:
        injector.send(LOCAL + REMOTE + b"\x81\x00\x00\x05" + LLDP.to_bytes(2, "big") + bytes(46))
        got = rx.recv(PATIENCE)
        assert (got.protocol, got.vlan, bytes(got)) == (LLDP, None, of(LLDP, 0))


def test_sending_another_protocol() -> None:
    """A dispatcher that receives one protocol can send frames of any protocol."""
    with (
        veth() as (near, far),
        linkrx.open(near, protocol=LLDP) as rx,
        linkrx.open(far, protocol=ARP) as other,
    ):
        rx.send(of(LLDP, 1))
        rx.send(of(ARP, 2))
        assert bytes(other.recv(PATIENCE)) == of(ARP, 2)


def test_where_it_cannot_be() -> None:
    """protocol= on a borrowed source, and with outgoing=True, raises an error that names both."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        veth() as (near, _),
        receiver,
        sender,
        linkrx.TunTap() as tap,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed,
    ):
        borrowed.bind((near, 0))
        for call in (linkrx.open, linkrx.choose):
            for source, title in (
                (receiver, "AF_UNIX datagram socket"),
                (tap, "TAP queue"),
                (borrowed, "AF_PACKET"),
            ):
                with pytest.raises(linkrx.UnsupportedOption, match=rf"protocol=0x88cc .*{title}"):
                    call(source, protocol=LLDP)
            with pytest.raises(linkrx.UnsupportedOption, match=r"outgoing=True and protocol=0x88cc"):
                call(near, protocol=LLDP, outgoing=True)
        assert linkrx.choose(near, protocol=LLDP).backend == linkrx.choose(near).backend
