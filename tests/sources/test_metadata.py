"""The kernel's metadata of a packet on AF_PACKET."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from support.run import that_take

import linkrx
from linkrx import _core
from linkrx.kernel.namespace import bring_up
from linkrx.kernel.uapi import ETH_P_ALL, PACKET_AUXDATA, PACKET_IGNORE_OUTGOING, SO_TIMESTAMPNS, SOL_PACKET
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

pytestmark = pytest.mark.usefixtures("devices")
needs_core = pytest.mark.skipif(_core.lib is None, reason="the C core was not built")

# asm-generic/socket.h. Each of these options, when switched on, adds control messages; timestamps of all kinds.
SO_TIMESTAMPING, SO_RXQ_OVFL, SO_WIFI_STATUS, SO_RCVMARK, SO_RCVPRIORITY = 37, 40, 41, 75, 82
# linux/net_tstamp.h: RX_HARDWARE, RX_SOFTWARE, SOFTWARE, RAW_HARDWARE, OPT_PKTINFO
STAMPS = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 13

HEADER = LOCAL + REMOTE + b"\x08\x00"
Wire = tuple[str, str, socket.socket]


@needs_core
def test_the_stripped_vlan_tag(wire: Wire) -> None:
    """packet.vlan is the outer tag that the kernel took out, with its priority, also if it is zero. An inner tag stays."""
    near, _, injector = wire
    addresses = LOCAL + REMOTE
    with linkrx.open(near) as rx:
        injector.send(addresses + struct.pack("!HHH", 0x8100, 0x2005, 0x0800) + b"tagged")
        injector.send(addresses + struct.pack("!HHH", 0x8100, 0, 0x0800) + b"priority tag")
        injector.send(addresses + struct.pack("!HHHHH", 0x88A8, 7, 0x8100, 9, 0x0800) + b"QinQ")
        injector.send(addresses + struct.pack("!H", 0x0800) + b"plain")
        got = [rx.recv(10) for _ in range(4)]
    assert [packet.vlan for packet in got] == [
        linkrx.Vlan(0x8100, 0x2005),
        linkrx.Vlan(0x8100, 0),
        linkrx.Vlan(0x88A8, 7),
        None,
    ]
    assert [packet.protocol for packet in got] == [0x0800, 0x0800, 0x8100, 0x0800]
    assert bytes(got[0].data) == b"tagged"
    assert got[0].copy().vlan == got[0].vlan


@pytest.mark.parametrize("backend", that_take("packet"))
def test_the_vlan_tag_with_other_control_messages(wire: Wire, backend: str) -> None:
    """The VLAN tag is read on a borrowed socket that has all other control messages switched on."""
    near, _, injector = wire
    options = {SO_TIMESTAMPING: STAMPS, SO_RXQ_OVFL: 1, SO_WIFI_STATUS: 1, SO_RCVMARK: 1, SO_RCVPRIORITY: 1}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        for option, value in options.items():
            with suppress(OSError):  # SO_RCVMARK came with Linux 6.0, SO_RCVPRIORITY with 6.14
                borrowed.setsockopt(socket.SOL_SOCKET, option, value)
        borrowed.bind((near, ETH_P_ALL))
        stamped = backend == "recvmmsg"
        with linkrx.open(borrowed, backend=backend, timestamps=stamped) as rx:
            for tag in (5, 6):
                injector.send(LOCAL + REMOTE + struct.pack("!HHH", 0x8100, tag, 0x0800) + bytes(60))
            for tag in (5, 6):
                packet = rx.recv(10)
                assert packet.vlan == linkrx.Vlan(0x8100, tag)
                assert (packet.timestamp_ns is not None) == stamped


@needs_core
def test_timestamps_are_nanoseconds_in_order(wire: Wire) -> None:
    """With timestamps=True each packet has the kernel's time of receipt, which is between the times before and after sending."""
    near, _, injector = wire
    with linkrx.open(near, timestamps=True) as rx:
        before = time.time_ns()
        for _ in range(5):
            injector.send(HEADER)
        batch = next(rx.batches(10))
        after = time.time_ns()
        stamps = [packet.timestamp_ns for packet in batch]
        assert stamps == list(batch.timestamps) == sorted(batch.timestamps)
        assert before <= batch.timestamps[0] <= batch.timestamps[-1] <= after


@needs_core
def test_without_asking_there_are_no_timestamps(wire: Wire) -> None:
    """By default timestamp_ns is None and the column is zero."""
    near, _, injector = wire
    with linkrx.open(near) as rx:
        injector.send(HEADER)
        batch = next(rx.batches(10))
        assert batch[0].timestamp_ns is None
        assert list(batch.timestamps) == [0]


@pytest.mark.parametrize("backend", that_take("packet"))
def test_own_transmissions_are_left_out(wire: Wire, backend: str) -> None:
    """By default no backend receives frames that this host sends on the interface."""
    near, _, injector = wire
    with linkrx.open(near, backend=backend) as rx, injector_on(near) as own:
        own.send(HEADER + b"own")
        injector.send(HEADER + b"foreign")
        assert bytes(rx.recv(10).data) == b"foreign"
        assert rx.stats().packets == 1


@needs_core
def test_own_transmissions_on_demand(wire: Wire) -> None:
    """With outgoing=True frames of this host are delivered in order, and marked as outgoing."""
    near, _, injector = wire
    with linkrx.open(near, outgoing=True) as rx, injector_on(near) as own:
        own.send(HEADER + b"own")
        injector.send(HEADER + b"foreign")
        got = [rx.recv(10) for _ in range(2)]
        assert [(bytes(packet.data), packet.outgoing) for packet in got] == [
            (b"own", True),
            (b"foreign", False),
        ]


@needs_core
@pytest.mark.parametrize("source", ["lo", "raw", "cooked", "fanout"])
@pytest.mark.parametrize("outgoing", [False, True])
def test_frames_on_lo_are_received_once(devices: None, source: str, outgoing: bool) -> None:
    """A frame that is sent on `lo` is received once, as incoming, also with outgoing=True."""
    with socket.socket() as some:
        bring_up("lo", some)
    with ExitStack() as stack:
        given: Any = "lo"
        if source in ("raw", "cooked"):
            kind = socket.SOCK_RAW if source == "raw" else socket.SOCK_DGRAM
            given = stack.enter_context(socket.socket(socket.AF_PACKET, kind, 0))
            given.bind(("lo", ETH_P_ALL))
        before = stack.enter_context(injector_on("lo"))
        options: dict[str, Any] = {"fanout": "auto"} if source == "fanout" else {}
        for backend in ("packet_mmap", "recvmmsg"):
            if source == "fanout" and backend == "recvmmsg":
                continue
            with linkrx.open(given, outgoing=outgoing, backend=backend, **options) as rx:
                for number in range(3):
                    before.send(LOCAL + REMOTE + b"\x88\xb5" + bytes([number]))
                rx.stop(flush=True)
                got = [packet for packet in rx if packet.protocol == 0x88B5]
                assert [(packet.data[0], packet.outgoing) for packet in got] == [
                    (0, False),
                    (1, False),
                    (2, False),
                ]


@pytest.mark.parametrize("backend", ["readv", "os_readv"])
def test_outgoing_needs_a_backend_that_can_tell(wire: Wire, backend: str) -> None:
    """A backend that does not get the direction refuses outgoing=True and timestamps=True, and names backend and option."""
    if backend == "readv" and _core.lib is None:
        pytest.skip("the C core was not built")
    for name in ("outgoing", "timestamps"):
        option: Any = {name: True}
        with pytest.raises(linkrx.UnsupportedOption, match=f"{backend} cannot honour {name}=True"):
            linkrx.open(wire[0], backend=backend, **option)


@needs_core
def test_an_unfinished_checksum_is_flagged(wire: Wire) -> None:
    """A UDP packet of this host's stack has its checksum left to the device, and is marked."""
    from pyroute2 import IPRoute

    near, far, _ = wire
    with IPRoute() as route:
        index = socket.if_nametoindex(far)
        route.addr("add", index=index, address="10.78.0.1", prefixlen=24)
        route.neigh("add", dst="10.78.0.2", lladdr="02:00:00:00:00:02", ifindex=index, state=0x80)
    with linkrx.open(near) as rx, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x" * 100, ("10.78.0.2", 9))
        packet, flags = next(
            (packet, batch.flags[index])
            for batch in rx.batches(10)
            for index, packet in enumerate(batch)
            if packet.protocol == 0x0800
        )
        assert packet.checksum_unfinished
        assert linkrx.Flags.CHECKSUM_UNFINISHED in linkrx.Flags(flags)


def promiscuity(name: str) -> int:
    """The number of users that have set the interface promiscuous."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        counted: int = route.get_links(ifname=name)[0].get("promiscuity")
        return counted


@pytest.mark.parametrize("owned", [True, False])
def test_promiscuous_mode_is_undone(wire: Wire, owned: bool) -> None:
    """promiscuous=True makes the interface promiscuous while the dispatcher is open, on an owned or borrowed socket."""
    near = wire[0]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        borrowed.bind((near, 3))
        assert promiscuity(near) == 0
        with linkrx.open(near if owned else borrowed, promiscuous=True):
            assert promiscuity(near) == 1
        assert promiscuity(near) == 0


def test_a_borrowed_packet_socket_gets_its_options_back(wire: Wire) -> None:
    """After close the options for auxiliary data, own transmissions and timestamps are restored."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        borrowed.bind((wire[0], 3))

        def options() -> list[int]:
            return [
                borrowed.getsockopt(SOL_PACKET, PACKET_AUXDATA),
                borrowed.getsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING),
                borrowed.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS),
            ]

        before = options()
        with linkrx.open(borrowed, timestamps=_core.lib is not None):
            assert options() != before
        assert options() == before


def test_no_frame_of_another_interface_ever_comes(wire: Wire) -> None:
    """While sockets are opened on one interface under traffic on another, no packet of the other is received."""
    near, _, injector = wire
    with veth() as (other, far), injector_on(far) as noise:
        for _ in range(50):
            noise.send(HEADER + b"noise")
            with linkrx.open(near) as rx:
                noise.send(HEADER + b"noise")
                injector.send(HEADER + b"signal")
                assert bytes(rx.recv(10).data) == b"signal"
                assert rx.capabilities.interface == near != other


# The kernel counts a ring's drops elsewhere: see tests/backends/test_packet_mmap.py.
@pytest.mark.parametrize("backend", [name for name in that_take("packet") if name != "packet_mmap"])
def test_drops_are_counted_exactly(wire: Wire, backend: str) -> None:
    """kernel_drops counts the frames that did not fit into the receive buffer, so sent equals delivered plus dropped."""
    near, _, injector = wire
    with linkrx.open(near, backend=backend, receive_buffer=20_000) as rx:
        for number in range(500):
            injector.send(HEADER + number.to_bytes(4, "big"))
        delivered = sum(map(len, rx.batches(0)))
        counted = rx.stats()
        assert counted.kernel_drops == 500 - delivered > 0


def test_drops_of_a_tap_queue_are_counted_exactly() -> None:
    """kernel_drops of a TAP queue is the device's count of the frames for which the queue was full."""
    from pyroute2 import IPRoute

    with linkrx.TunTap() as tap, IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(tap.name), state="up", txqlen=16)
        with linkrx.open(tap) as rx, injector_on(tap.name) as injector:
            for number in range(100):
                injector.send(HEADER + number.to_bytes(4, "big"))
            delivered = sum(map(len, rx.batches(0)))
            assert delivered == 16
            assert rx.stats().kernel_drops == 84
