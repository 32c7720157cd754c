"""Receiving from every interface: "any", and packet sockets that are not bound."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.run import that_take

import linkrx
from linkrx.kernel.namespace import bring_up
from linkrx.kernel.uapi import ETH_P_ALL
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import PATIENCE, running, until

pytestmark = pytest.mark.usefixtures("devices")

MARK = b"\x88\xb5"
KERNELS = that_take("packet")
# The backends that distinguish frames of this host from others.
HONOUR_OUTGOING = [info.name for info in linkrx.backends() if "outgoing" in info.honours and info.supported]

Open = Callable[..., linkrx.Dispatcher]


@pytest.fixture(params=["any", "unbound"])
def every(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a source of every interface: "any", or a borrowed socket that is not bound."""
    with ExitStack() as stack:

        def opened(deliver: Any = None, **options: Any) -> linkrx.Dispatcher:
            source: Any = "any"
            if request.param == "unbound":
                kind = socket.SOCK_RAW
                source = stack.enter_context(
                    socket.socket(socket.AF_PACKET, kind, socket.htons(options.pop("protocol", ETH_P_ALL)))
                )
            return stack.enter_context(linkrx.open(source, deliver, **options))

        yield opened


def ours(packet: linkrx.Packet) -> bool:
    """Whether a test sent the packet. The kernel also sends packets."""
    return packet.protocol == 0x88B5


def of(number: int) -> bytes:
    """A frame that contains its number."""
    return LOCAL + REMOTE + MARK + bytes([number]) * 46


def take(rx: linkrx.Dispatcher, count: int) -> list[linkrx.Packet]:
    """Receive `count` packets of the tests."""
    got: list[linkrx.Packet] = []
    while len(got) < count:
        got += [packet for packet in [rx.recv(PATIENCE)] if ours(packet)]
    return got


def rest(rx: linkrx.Dispatcher) -> list[bytes]:
    """Stop, and return the remaining packets of the tests."""
    rx.stop(flush=True)
    return [bytes(packet) for packet in rx if ours(packet)]


@pytest.mark.parametrize("backend", KERNELS)
def test_every_interface(every: Open, backend: str) -> None:
    """Packets of all interfaces are received in the order of arrival, and each has its interface, in the batch's column too."""
    with (
        veth() as (one, far_one),
        veth() as (two, far_two),
        injector_on(far_one) as first,
        injector_on(far_two) as second,
    ):
        rx = every(backend=backend)
        for number in range(6):
            (first, second)[number % 2].send(of(number))
        expected = [socket.if_nametoindex(name) for name in (one, two)] * 3
        got = take(rx, 6)
        assert [bytes(packet) for packet in got] == [of(number) for number in range(6)]
        assert [packet.interface for packet in got] == expected
        for number in range(6):
            (first, second)[number % 2].send(of(number))
        interfaces: list[int] = []
        for batch in rx.batches(PATIENCE):
            interfaces += [
                index for index, kind in zip(batch.interfaces, batch.protocols, strict=True) if kind == 0x88B5
            ]
            if len(interfaces) == 6:
                break
        assert interfaces == expected


@pytest.mark.parametrize("backend", KERNELS)
def test_interfaces_that_come_and_go(every: Open, backend: str) -> None:
    """An interface that is created later is received from. Reception survives an interface that is deleted or goes down."""
    rx = every(ignore, backend=backend)
    with running(rx.run):
        for turn in range(1, 3):
            with veth() as (near, far), injector_on(far) as injector:
                before = rx.stats().packets
                injector.send(of(turn))
                until(lambda before=before: rx.stats().packets > before)  # type: ignore[misc]
                Device(near).set_down()
                assert rx.end is None
        with veth() as (_, far), injector_on(far) as injector:
            before = rx.stats().packets
            injector.send(of(9))
            until(lambda: rx.stats().packets > before)
        assert rx.end is None
        assert rx.stats().link_downs is None
        rx.stop()
    assert rx.end is linkrx.End.STOPPED


@pytest.mark.parametrize("backend", KERNELS)
def test_frames_of_this_host(every: Open, backend: str) -> None:
    """By default frames of this host are not received, except on `lo`, where each is received once."""
    with socket.socket() as some:
        bring_up("lo", some)
    with veth() as (near, far), injector_on(near) as own, injector_on(far) as other, injector_on("lo") as lo:
        # A frame that leaves one end comes in on the other end, which is also an interface.
        rx = every(backend=backend)
        own.send(of(1))
        other.send(of(2))
        lo.send(of(3))
        got = take(rx, 3)
        assert [(bytes(packet), socket.if_indextoname(packet.interface)) for packet in got] == [
            (of(1), far),
            (of(2), near),
            (of(3), "lo"),
        ]
        assert not any(packet.outgoing for packet in got)
        assert rest(rx) == []


@pytest.mark.parametrize("backend", HONOUR_OUTGOING)
def test_frames_of_this_host_that_are_wanted(every: Open, backend: str) -> None:
    """With outgoing=True frames of this host are received and marked, before the other end receives them. On `lo` each is received once."""
    with socket.socket() as some:
        bring_up("lo", some)
    with veth() as (near, far), injector_on(near) as own, injector_on("lo") as lo:
        rx = every(backend=backend, outgoing=True)
        own.send(of(1))
        lo.send(of(2))
        got = take(rx, 3)
        assert [(packet.outgoing, socket.if_indextoname(packet.interface)) for packet in got] == [
            (True, near),
            (False, far),
            (False, "lo"),
        ]
        assert rx.stats().filtered == 1
        assert rest(rx) == []


@pytest.mark.parametrize("backend", KERNELS)
def test_one_protocol_of_every_interface(every: Open, backend: str) -> None:
    """protocol= applies to every interface, and so does a protocol that the owner of a socket gave to socket()."""
    with veth() as (_, far), injector_on(far) as injector:
        rx = every(backend=backend, protocol=0x88B5)
        for number in range(4):
            injector.send(of(number))
            injector.send(LOCAL + REMOTE + b"\x88\xcc" + bytes(46))
        assert [bytes(packet) for packet in take(rx, 4)] == [of(number) for number in range(4)]
        rx.stop(flush=True)
        assert list(rx) == []
        assert rx.stats().packets == 4


@pytest.mark.parametrize("backend", KERNELS)
def test_links_of_other_types(every: Open, backend: str) -> None:
    """Each packet is parsed by the link type of its device: Ethernet by its header, and a TUN's packets as IP without addresses."""
    with veth() as (_, far), injector_on(far) as injector, linkrx.TunTap(mode="tun") as tun:
        Device(tun.name).set_up()
        with linkrx.open(tun) as out:
            rx = every(backend=backend)
            out.send(b"\x45" + bytes(5) + b"from the TUN")
            injector.send(of(1))
            got: list[linkrx.Packet] = []
            while len(got) < 2:
                got += [
                    one for one in [rx.recv(PATIENCE)] if ours(one) or bytes(one).endswith(b"from the TUN")
                ]
            assert [(one.protocol, one.remote, one.local) for one in got] == [
                (0x0800, None, None),
                (0x88B5, REMOTE, LOCAL),
            ]
            assert [one.link_type for one in got] == [0xFFFE, 1]
            assert bytes(got[0].data) == bytes(got[0])


def test_super_packets_of_every_interface(every: Open) -> None:
    """segment=True is accepted, and frames that are no super-packets are received unchanged."""
    with veth() as (_, far), injector_on(far) as injector:
        rx = every(segment=True)
        injector.send(of(1))
        assert [bytes(packet) for packet in take(rx, 1)] == [of(1)]


@pytest.mark.parametrize("backend", KERNELS)
def test_a_batch_of_every_interface_is_sent_on(every: Open, backend: str) -> None:
    """Each frame of a batch is sent as it was on the wire of its device, with its VLAN tag."""
    tagged = LOCAL + REMOTE + b"\x81\x00\x20\x05" + MARK + bytes(46)
    receiver, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with veth() as (_, far), injector_on(far) as injector, receiver, peer, linkrx.open(receiver) as out:
        rx = every(backend=backend)
        for frame in (of(1), tagged, of(2)):
            injector.send(frame)
        got: list[bytes] = []
        for batch in rx.batches(PATIENCE):
            assert out.send_batch(batch) == len(batch)
            got += [
                frame for frame in (peer.recv(2000) for _ in batch) if MARK in (frame[12:14], frame[16:18])
            ]
            if len(got) == 3:
                break
        assert got == [of(1), tagged, of(2)]


@pytest.mark.skipif("packet_mmap" not in KERNELS, reason="fanout needs the C core")
def test_any_in_a_group() -> None:
    """Two dispatchers of "any" in a fanout group share the packets of all interfaces."""
    with (
        veth() as (_, far),
        injector_on(far) as injector,
        linkrx.open("any", fanout=("auto", "lb")) as one,
        linkrx.open("any", fanout=(one.fanout or 0, "lb")) as two,
    ):
        for number in range(10):
            injector.send(of(number))
        assert sorted(rest(one) + rest(two)) == [of(number) for number in range(10)]


def test_any_sends_nothing() -> None:
    """Sending to "any" is refused, because no interface is given."""
    with (
        linkrx.open("any") as rx,
        pytest.raises(linkrx.UnsupportedSource, match="on every interface is bound"),
    ):
        rx.send(of(1))


def test_any_is_probed_and_chosen() -> None:
    """probe() and choose() accept "any", and options that it cannot honour raise errors."""
    found = linkrx.probe("any")
    assert (found.kind, found.owned, found.interface, found.ifindex) == ("packet", True, None, None)
    assert found.title == "AF_PACKET socket on every interface"
    assert linkrx.choose("any").backend == linkrx.choose("lo").backend
    with pytest.raises(linkrx.UnsupportedOption, match=r"promiscuous=True on .* on every interface"):
        linkrx.open("any", promiscuous=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as unbound:
        for source, name in (("any", "AF_PACKET socket on every interface"), (unbound, "AF_PACKET socket")):
            for ethernet in (True, False):
                with pytest.raises(
                    linkrx.UnsupportedOption,
                    match=f"ethernet={ethernet} .* each packet of an {name} has its own",
                ):
                    linkrx.open(source, ethernet=ethernet)


def test_borrowed_sockets_are_left_as_they_were() -> None:
    """linkrx does not bind a borrowed socket that is not bound."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as unbound:
        before = unbound.getsockname()
        with linkrx.open(unbound) as rx:
            assert rx.capabilities.title == "AF_PACKET socket"
        assert unbound.getsockname() == before
