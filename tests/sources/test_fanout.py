"""Fanout: several dispatchers share one interface, and each packet goes to one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from support.flows import frame
from support.paths import TESTS

import linkrx
from linkrx import _core
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import veth
from linkrx.testing.waiting import patiently

pytestmark = [
    pytest.mark.usefixtures("devices"),
    pytest.mark.skipif(_core.lib is None, reason="the C core was not built"),
]

# IPv4 and UDP, so that the kernel can hash flows. The last two bytes of the source address distinguish them.
Wire = tuple[str, str, socket.socket]

# The kernel closes one of a ring's 512 blocks every 50 ms: a sender that is kept off its processor has 25 s.
LATENCY = 0.05


def numbers(rx: linkrx.Dispatcher, timeout: float) -> list[int]:
    """The numbers of received frames, until none comes for a while."""
    return [int.from_bytes(packet.data[28:32], "big") for batch in rx.batches(timeout) for packet in batch]


def drops_of(members: list[linkrx.Dispatcher]) -> int:
    """The drops of all members together."""
    return sum(member.stats().kernel_drops or 0 for member in members)


def account_of(members: list[linkrx.Dispatcher], shares: list[list[int]], total: int) -> str:
    """What each member counted and received, and the numbers that nobody received."""
    missing = sorted(set(range(total)) - {number for share in shares for number in share})
    lines = [f"{len(missing)} of {total} are missing: {missing[:100]}"]
    for member, share in zip(members, shares, strict=True):
        lines.append(f"{len(share)} from {share[:1]} to {share[-1:]}: {member.stats()}")
    return "\n".join([*lines, Path("/proc/net/softnet_stat").read_text()])


def shares_of(members: list[linkrx.Dispatcher], total: int, lost_before: int = 0) -> list[list[int]]:
    """The numbers that each member receives, when `total` frames were received or dropped."""
    shares: list[list[int]] = [[] for _ in members]
    try:
        for _ in patiently(lambda: sum(map(len, shares)) + drops_of(members) - lost_before >= total):
            for member, share in zip(members, shares, strict=True):
                share += numbers(member, 0.01)
    except AssertionError:
        raise AssertionError(account_of(members, shares, total)) from None
    for member, share in zip(members, shares, strict=True):
        share += numbers(member, 2 * LATENCY)
    return shares


@pytest.mark.parametrize("mode", ["hash", "lb", "cpu", "rollover", "qm"])
def test_members_share(wire: Wire, mode: str) -> None:
    """Each packet goes to exactly one of three members, in order, as the mode defines."""
    near, _, injector = wire
    with ExitStack() as stack:
        first = stack.enter_context(linkrx.open(near, fanout=("auto", mode), latency=LATENCY))
        group = first.fanout
        assert group is not None
        members = [first]
        for _ in range(2):
            members.append(stack.enter_context(linkrx.open(near, fanout=(group, mode), latency=LATENCY)))
        assert {member.fanout for member in members} == {group}
        for number in range(900):
            injector.send(frame(number))
        shares = shares_of(members, 900)
        assert sorted(number for share in shares for number in share) == list(range(900))
        assert all(share == sorted(share) for share in shares)
        if mode == "lb":
            assert [len(share) for share in shares] == [300, 300, 300]
        if mode == "hash":
            assert all(shares)
            flows = [{number % 256 for number in share} for share in shares]
            assert sum(map(len, flows)) == 256
        assert [member.stats().kernel_drops for member in members] == [0, 0, 0]


SENDER = """
import sys, time
from linkrx.testing.devices import Device, injector_on
from support.flows import frame
with injector_on(sys.argv[1]) as injector:
    frames = [frame(number) for number in range(int(sys.argv[2]))]
    print("ready", flush=True)
    send = injector.send
    for half in (frames[::2], frames[1::2]):
        sys.stdin.readline()
        for one in half:
            send(one)
"""


@pytest.mark.repeats
@pytest.mark.parametrize("mode", ["hash", "lb"])
def test_joining_under_load(wire: Wire, mode: str) -> None:
    """While members join, no packet is received twice, and packets without room are counted. Later packets are all received.

    A member has no room for a moment while it joins. The scheduler decides how many packets are lost: a member that does not
    run in between loses its share of 20 ms.
    """
    near, far, injector = wire
    # In a ring of 64 MiB each frame takes 152 bytes, and the first member may get all frames.
    total = 100_000
    with (
        subprocess.Popen(
            [sys.executable, "-c", SENDER, far, str(total)],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as sender,
        ExitStack() as stack,
    ):
        assert sender.stdin is not None
        assert sender.stdout is not None
        assert sender.stdout.readline() == "ready\n"
        members = [stack.enter_context(linkrx.open(near, fanout=("auto", mode), latency=LATENCY))]
        group = members[0].fanout
        assert group is not None
        while sender.poll() is None and len(members) < 12:
            if len(members) < 3:  # send while the second member joins, and while the third joins
                sender.stdin.write("go\n")
                sender.stdin.flush()
            members.append(stack.enter_context(linkrx.open(near, fanout=(group, mode), latency=LATENCY)))
        assert sender.wait(60) == 0
        shares = shares_of(members, total)
        counted = drops_of(members)
        for number in range(total, total + 900):
            injector.send(frame(number))
        later = shares_of(members, 900, lost_before=counted)
    got = sorted(number for share in shares for number in share)
    assert len(got) == len(set(got)), "twice"
    assert total - len(got) <= counted
    assert sorted(number for share in later for number in share) == list(range(total, total + 900))
    if mode == "lb":
        assert max(map(len, later)) - min(map(len, later)) <= 1
    else:
        assert all(later)


def test_a_group_that_does_not_agree(wire: Wire) -> None:
    """Joining a group with another mode or on another interface raises an error that says what the group requires."""
    with veth() as (other, _), linkrx.open(wire[0], fanout=4711) as rx:
        assert rx.fanout == 4711
        for source, option in ((wire[0], (4711, "cpu")), (other, 4711)):
            with pytest.raises(OSError, match="fanout group 4711: Invalid argument; all members must have"):
                linkrx.open(source, fanout=option)


def test_fanout_is_for_what_linkrx_opens(wire: Wire) -> None:
    """A borrowed socket is refused, because it could not leave the group. A backend that cannot join is refused too."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        borrowed.bind((wire[0], 3))
        with pytest.raises(linkrx.UnsupportedOption, match="leaves its group only when it is closed"):
            linkrx.open(borrowed, backend="packet_mmap", fanout=1)
    with pytest.raises(linkrx.UnsupportedOption, match="recvmmsg cannot honour fanout=1"):
        linkrx.open(wire[0], backend="recvmmsg", fanout=1)
    with linkrx.open(wire[0]) as rx:
        assert rx.fanout is None


@pytest.mark.parametrize("value", [True, 1.5, "hash", ("auto", 3), ("auto",), (None, "hash"), [1, "hash"]])
def test_values_that_are_no_group(wire: Wire, value: Any) -> None:
    """fanout= raises TypeError for a value that is not a number, "auto", or a pair of one of these and a mode."""
    with pytest.raises(TypeError, match="give the number of a group or 'auto'"):
        linkrx.open(wire[0], fanout=value)


@pytest.mark.parametrize(
    ("value", "said"), [(-1, "0 to 65535"), (65_536, "0 to 65535"), ((1, "rnd"), "give one of the modes")]
)
def test_invalid_groups(wire: Wire, value: Any, said: str) -> None:
    """A number out of range and an unknown mode raise ValueError, which lists the valid ones."""
    with pytest.raises(ValueError, match=said):
        linkrx.open(wire[0], fanout=value)


@pytest.mark.parametrize("outgoing", [False, True])
def test_frames_of_this_host(wire: Wire, outgoing: bool) -> None:
    """A group receives frames of this host with outgoing=True only, and they are marked as outgoing."""
    near, _, injector = wire
    with (
        injector_on(near) as own,
        linkrx.open(near, fanout=("auto", "lb"), outgoing=outgoing) as one,
        linkrx.open(near, fanout=(one.fanout or 0, "lb"), outgoing=outgoing) as two,
    ):
        own.send(frame(1))
        injector.send(frame(2))
        for member in (one, two):
            member.stop(flush=True)
        got = [packet for member in (one, two) for packet in member if packet.protocol == 0x0800]
        assert sorted(packet.outgoing for packet in got) == ([False, True] if outgoing else [False])
        with pytest.raises(OSError, match="the same interface, mode and outgoing="):
            linkrx.open(near, fanout=(one.fanout or 0, "lb"), outgoing=not outgoing)


@pytest.mark.parametrize("sizes", [(100, 100, 100), (100, 4000, 100)])
def test_flows_with_fragments_stay_together(wire: Wire, sizes: tuple[int, ...]) -> None:
    """All datagrams of a flow go to one member, also if they were sent in fragments."""
    near, far, _ = wire
    Device(far).set(mtu=1500)
    with IPRoute() as route, ExitStack() as stack:
        route.addr("add", index=socket.if_nametoindex(far), address="10.77.0.1", prefixlen=24)
        route.neigh(
            "add", dst="10.77.0.2", lladdr="02:00:00:00:00:09", ifindex=socket.if_nametoindex(far), state=0x80
        )
        members = [
            stack.enter_context(linkrx.open(near, fanout=(77, "hash"), promiscuous=True)) for _ in range(4)
        ]
        for port in range(20):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind(("10.77.0.1", 20_000 + port))
                for size in sizes:
                    sender.sendto(bytes(size), ("10.77.0.2", 9))
        flows: dict[bytes, set[int]] = {}
        for rx in members:
            rx.stop(flush=True)
        for number, rx in enumerate(members):
            for packet in rx:
                ip = bytes(packet.data)
                if packet.protocol == 0x0800 and ip[9] == 17 and not int.from_bytes(ip[6:8], "big") & 0x1FFF:
                    flows.setdefault(ip[20:22], set()).add(number)
        assert len(flows) == 20
        assert all(len(seen) == 1 for seen in flows.values())


@pytest.mark.parametrize("mode", ["hash", "lb"])
def test_rollover_only_if_requested(wire: Wire, mode: str) -> None:
    """With "+rollover" after the mode, packets for a member whose ring is full go to another member. Without it they are lost.

    The kernel looks for room (packet_rcv_has_room) and takes it (tpacket_rcv) in two steps. If the timer closes the last block
    in between, the packet is lost.
    """
    near, _, injector = wire
    for asked in (mode, f"{mode}+rollover"):
        with (
            linkrx.open(near, fanout=(78, asked), receive_buffer=1, latency=LATENCY) as small,
            linkrx.open(near, fanout=(78, asked), latency=LATENCY) as large,
        ):
            for number in range(12_000):
                injector.send(frame(number if mode == "lb" else number % 64))
            counted = [rx.stats().kernel_drops for rx in (small, large)]
            assert counted[1] == 0
            assert counted[0] is not None
            assert counted[0] > 1000 if asked == mode else counted[0] <= 10


def test_a_member_that_is_closed_leaves_at_once(wire: Wire) -> None:
    """After a member is closed, packets go to the other members, although a child that was forked before still runs."""
    near, _, injector = wire
    reading, writing = os.pipe()
    up, tells = os.pipe()
    with linkrx.open(near, fanout=(79, "lb")) as stays:
        leaves = linkrx.open(near, fanout=(79, "lb"))
        child = os.fork()
        if not child:
            os.close(writing)
            os.write(tells, b"u")  # Python's hooks have run
            os.read(reading, 1)
            os._exit(0)
        try:
            assert os.read(up, 1) == b"u"
            leaves.close()
            for number in range(100):
                injector.send(frame(number))
            stays.stop(flush=True)
            got = [number_in(packet) for packet in stays]
            assert got == list(range(100))
        finally:
            for end in (writing, reading, up, tells):
                os.close(end)
            os.waitpid(child, 0)


def number_in(packet: linkrx.Packet) -> int:
    """The number in a frame of `frame`."""
    return int.from_bytes(packet.data[28:32], "big")
