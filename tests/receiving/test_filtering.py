"""Filters on open sources: who runs them, and that nothing comes which they reject."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from support.frames import tagged, udp
from support.pairs import BACKENDS, frame, number_of, pair
from support.paths import TESTS
from support.programs import packed
from support.run import that_take

import linkrx
from linkrx import _core
from linkrx.sources.socket_filter import attach, attached
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import tap, tap_vnet, tun, veth
from linkrx.testing.stops import alarmed
from linkrx.testing.waiting import PATIENCE, asleep, collect, running, until

ON_PACKET = that_take("packet")
EVEN = [(0x20, 0, 0, 14), (0x45, 0, 1, 1), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF)]
ODD = [(0x20, 0, 0, 14), (0x45, 0, 1, 1), (6, 0, 0, 0xFFFFFFFF), (6, 0, 0, 0)]
ALL = [(6, 0, 0, 0xFFFFFFFF)]
RXHASH = [(0x20, 0, 0, 0xFFFFF000 + 32), (6, 0, 0, 0xFFFFFFFF)]

SO_LOCK_FILTER = 44  # asm-generic/socket.h
SO_ATTACH_BPF = 50

needs_core = pytest.mark.skipif(_core.lib is None, reason=f"of what backends in C are told: {_core.reason}")
devices = pytest.mark.usefixtures("devices")
Wire = tuple[str, socket.socket]


@pytest.fixture
def wire(devices: None) -> Iterator[Wire]:
    """The name of one end of a veth pair, and a socket that sends from the other."""
    with veth() as (near, far), injector_on(far) as injector:
        yield near, injector


@pytest.fixture
def borrowed(wire: Wire) -> Iterator[socket.socket]:
    """A packet socket on the near end."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as packet:
        packet.bind((wire[0], 3))
        yield packet


def numbers(rx: linkrx.Dispatcher, count: int) -> list[int]:
    """Those of so many packets."""
    return [packet.u32(14) for packet in collect(rx, count)]


def nothing_more(rx: linkrx.Dispatcher) -> None:
    """What was sent has all been received."""
    with pytest.raises(TimeoutError):
        rx.recv(0)


@pytest.mark.parametrize("backend", ON_PACKET)
def test_who_filters_an_interface(wire: Wire, backend: str) -> None:
    """The kernel, from before the socket is bound; linkrx counts nothing then."""
    near, injector = wire
    assert "the kernel" in (linkrx.choose(near, backend=backend, filter=EVEN).filter or "")
    with linkrx.open(near, backend=backend, filter=EVEN) as rx:
        for number in range(4):
            injector.send(frame(number))
        assert numbers(rx, 2) == [0, 2]
        assert rx.choice.filter == "the kernel: attached before the socket was bound"
        assert rx.choice.explain().splitlines()[-1].split(None, 1) == ["filter", rx.choice.filter]
        assert rx.stats().filtered is None


def test_who_filters_other_sources() -> None:
    """linkrx, and what it rejects is counted."""
    with pair() as (receiver, sender), linkrx.open(receiver, filter=EVEN) as rx:
        for number in range(4):
            sender.send(frame(number))
        assert numbers(rx, 2) == [0, 2]
        assert (rx.choice.filter or "").startswith("linkrx: the kernel filters for packet sockets only")
        rx.set_filter(None)
        assert rx.choice.filter is None
        assert rx.stats().filtered == 2


@devices
def test_nothing_comes_before_the_filter() -> None:
    """In a flood, no packet comes of an interface that is opened with a filter that rejects all, however often."""
    with veth() as (near, far), injector_on(far) as injector:
        running_on = True

        def flood() -> None:
            while running_on:
                with suppress(OSError):
                    injector.send(frame(1))

        with running(flood):
            try:
                for backend in ON_PACKET * 5:
                    with linkrx.open(near, backend=backend, filter=[(6, 0, 0, 0)]) as rx:
                        assert list(rx.batches(duration=0.01)) == []
            finally:
                running_on = False


@pytest.mark.parametrize("backend", [name for name in ON_PACKET if name != "packet_mmap"])
def test_what_was_queued_before(wire: Wire, borrowed: socket.socket, backend: str) -> None:
    """Packets that a borrowed socket had queued are judged by linkrx, the others by the kernel; none is drained away."""
    for number in range(6):
        wire[1].send(frame(number))
    with linkrx.open(borrowed, backend=backend, filter=EVEN) as rx:
        for number in range(6, 10):
            wire[1].send(frame(number))
        assert numbers(rx, 5) == [0, 2, 4, 6, 8]
        assert rx.stats().filtered == 3
        nothing_more(rx)
        # The queue was empty: from now on the kernel is alone.
        attach(borrowed.fileno(), b"")
        wire[1].send(frame(11))
        assert numbers(rx, 1) == [11]


@pytest.mark.parametrize("backend", [name for name in ON_PACKET if name != "packet_mmap"])
def test_a_filter_of_the_owner_is_put_back(borrowed: socket.socket, backend: str) -> None:
    """By close(), and by set_filter(None): instruction for instruction."""
    fd = borrowed.fileno()
    attach(fd, packed(ODD))
    with linkrx.open(borrowed, backend=backend, filter=EVEN) as rx:
        assert attached(fd) == packed(EVEN)
        rx.set_filter(ALL)
        assert attached(fd) == packed(ALL)
        rx.set_filter(None)
        assert attached(fd) == packed(ODD)
        rx.set_filter(ALL)
    assert attached(fd) == packed(ODD)
    attach(fd, b"")
    with linkrx.open(borrowed, backend=backend) as rx:
        rx.set_filter(EVEN)
        assert attached(fd) == packed(EVEN)
    assert attached(fd) == b""


def test_a_locked_filter(wire: Wire, borrowed: socket.socket) -> None:
    """What the kernel does not let go of is an error that says so, in open and in set_filter, and the filter stays."""
    attach(borrowed.fileno(), packed(EVEN))
    borrowed.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    with pytest.raises(linkrx.UnsupportedOption, match=r"Operation not permitted; its owner has locked"):
        linkrx.open(borrowed, filter=ODD)
    with linkrx.open(borrowed) as rx:
        with pytest.raises(linkrx.UnsupportedOption, match="SO_LOCK_FILTER"):
            rx.set_filter(ODD)
        for number in range(3):
            wire[1].send(frame(number))
        assert numbers(rx, 2) == [0, 2]


def _ebpf() -> int:
    """A socket filter of eBPF that takes every packet: bpf(2), BPF_PROG_LOAD."""
    call = {"x86_64": 321, "aarch64": 280}[platform.machine()]
    code = ctypes.create_string_buffer(
        struct.pack("=BBhi", 0xB7, 0, 0, 0xFFFF) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    )
    licence = ctypes.create_string_buffer(b"GPL")
    given = struct.pack("=IIQQIIQI64x", 1, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(call, 5, ctypes.create_string_buffer(given), len(given))
    if fd < 0:
        pytest.skip(f"needs bpf(2): {errno.errorcode[ctypes.get_errno()]}")
    return fd


@pytest.mark.superuser
def test_a_filter_that_cannot_be_read(borrowed: socket.socket) -> None:
    """One of eBPF the kernel does not show, so it could not be put back: the option is refused."""
    program = _ebpf()
    try:
        borrowed.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
    finally:
        os.close(program)
    with pytest.raises(linkrx.UnsupportedOption, match="and so could not restore it"):
        linkrx.open(borrowed, filter=EVEN)


def test_what_only_the_kernel_can_tell(wire: Wire, borrowed: socket.socket) -> None:
    """A program that asks for the receive hash runs in the kernel of an own socket; where packets may be queued it is refused."""
    with linkrx.open(wire[0], filter=RXHASH) as rx:
        wire[1].send(frame(1))
        assert numbers(rx, 1) == [1]
        with pytest.raises(linkrx.UnsupportedOption, match="the receive hash, which linkrx does not know"):
            rx.set_filter(RXHASH)
    with pytest.raises(linkrx.UnsupportedOption, match="the receive hash"):
        linkrx.open(borrowed, filter=RXHASH)


@pytest.mark.parametrize("backend", ON_PACKET)
def test_tags(wire: Wire, backend: str) -> None:
    """An expression that speaks of tags is judged on the frame as it was on the wire; a double tag and none are told apart."""
    near, injector = wire
    with linkrx.open(near, backend=backend, filter="vlan 5 and udp port 53") as rx:
        assert (rx.choice.filter or "").startswith("linkrx: the filter is about VLAN tags")
        wanted = tagged(udp(53), 0x2005)
        for sent in (
            wanted,
            tagged(udp(53), 6),
            tagged(udp(54), 5),
            udp(53),
            tagged(tagged(udp(53), 5), 9, 0x88A8),
        ):
            injector.send(sent)
        packet = rx.recv(PATIENCE)
        assert packet.tagged() == wanted
        nothing_more(rx)
        rx.set_filter("vlan 9 and vlan 5")
        injector.send(tagged(udp(53), 5))
        injector.send(tagged(tagged(udp(53), 5), 9, 0x88A8))
        assert rx.recv(PATIENCE).vlan == linkrx.Vlan(0x88A8, 9)


@contextmanager
def unbound(kind: str) -> Iterator[str | socket.socket]:
    """What sees every device: a packet socket of a type, or "any"."""
    if kind == "any":
        yield "any"
        return
    number = getattr(socket, kind) | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_PACKET, number, socket.htons(3)) as packet:
        yield packet


@devices
@pytest.mark.parametrize("kind", ["any", "SOCK_RAW", "SOCK_DGRAM"])
def test_any_device(kind: str) -> None:
    """An expression on a socket that sees lo, a veth and a TUN device at once takes the same packets of each, and no others; so
    does one that takes its place, of what is queued.
    """
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        tun() as rig,
        unbound(kind) as source,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local,
    ):
        assert isinstance(rig.source, linkrx.TunTap)
        queue, names = rig.source.fileno(), (near, "lo", rig.source.name)

        def send() -> None:
            for port in (53, 54, 55):
                injector.send(udp(port))
                os.write(queue, udp(port)[14:])
                local.sendto(b"x", ("127.0.0.1", port))

        def of_each(port: int) -> None:
            got = collect(rx, 3)
            assert [packet.data[22:24] for packet in got] == [port.to_bytes(2, "big")] * 3
            assert {packet.interface for packet in got} == set(map(socket.if_nametoindex, names))

        with linkrx.open(source, filter="udp dst port 53") as rx:
            send()
            of_each(53)
            nothing_more(rx)
        with linkrx.open(source) as rx:
            send()
            rx.set_filter("udp dst port 54 and not ip6")
            of_each(54)
            send()
            of_each(54)
        with pytest.raises(ValueError, match="ethernet addresses supported only on"):
            linkrx.open(source, filter="ether src 02:00:00:00:00:01")


@devices
def test_a_tap_queue() -> None:
    """An expression on a TAP queue is judged on the frame behind a virtio-net header."""
    for make in (tap, tap_vnet):
        with make() as rig, rig.open("auto", filter="udp port 53") as rx:
            for port in (53, 54, 53):
                rig.send(udp(port))
            assert [packet.u16(36) for packet in collect(rx, 2)] == [53, 53]


# A seccomp filter as in a container: recvmmsg is refused when the first packet is received.
DEMOTED = """
import errno, socket, sys
from support.seccomp import deny
from support.pairs import frame, pair
import linkrx

even = [(0x20, 0, 0, 14), (0x45, 0, 1, 1), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF)]
with pair() as (receiver, sender), linkrx.open(receiver, filter=even) as rx:
    assert rx.backend == "recvmmsg"
    deny(errno.ENOSYS, "recvmmsg")
    for number in range(6):
        sender.send(frame(number))
    assert [rx.recv(1).u32(14) for _ in range(3)] == [0, 2, 4]
    assert rx.backend == "readv", rx.backend
    assert rx.stats().filtered == 3
    assert rx.choice.filter.startswith("linkrx")
"""


@needs_core
def test_the_filter_goes_along() -> None:
    """With a fallback to another backend the filter stays, and so does what explain() says."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEMOTED)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_wait(backend: str) -> None:
    """set_filter from another thread wakes a wait, which goes on; what comes then is judged by the new one."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, filter=ODD) as rx:
        got: list[int] = []
        with running(lambda: got.append(number_of(rx.recv(PATIENCE)))):
            until(lambda: asleep(rx))
            rx.set_filter(EVEN)
            sender.send(frame(1))
            sender.send(frame(2))
        assert got == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_a_signal_handler(backend: str) -> None:
    """set_filter from a handler on the thread that receives takes effect before anything more is handed over."""
    changed: list[bool] = []
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, filter=ODD) as rx:

        def change(_: object) -> None:
            if not changed:
                changed.append(True)
                rx.set_filter(EVEN)
                sender.send(frame(1))
                sender.send(frame(2))

        # Again and again: the first may come just before the system call that waits, where Python runs no handlers any more.
        with alarmed(change, first=0.01, interval=0.01):
            assert number_of(rx.recv(PATIENCE)) == 2


def test_closed() -> None:
    """After close() there is nothing to filter."""
    with pair() as (receiver, _):
        rx = linkrx.open(receiver)
        rx.close()
        with pytest.raises(linkrx.Closed):
            rx.set_filter(EVEN)


def test_runts_that_a_filter_makes() -> None:
    """A frame that is cut into its link header is a runt, in the batch at hand too."""
    with pair() as (receiver, sender), linkrx.open(receiver, filter=[(6, 0, 0, 13)]) as rx:
        sender.send(frame(1))
        nothing_more(rx)
        assert (rx.stats().runts, rx.stats().packets, rx.stats().bytes) == (1, 0, 0)
        rx.set_filter(None)
        for number in range(3):
            sender.send(frame(number))
        assert number_of(rx.recv(PATIENCE)) == 0
        rx.set_filter([(6, 0, 0, 13)])
        nothing_more(rx)
        stats = rx.stats()
        assert (stats.runts, stats.packets, stats.bytes, stats.filtered) == (3, 1, len(frame(0)), 0)


def test_tags_with_a_protocol(wire: Wire) -> None:
    """Of a socket that is bound to an EtherType the kernel forgets tags, so an expression that speaks of them is refused."""
    with pytest.raises(linkrx.UnsupportedOption, match="with protocol= the kernel drops them"):
        linkrx.open(wire[0], protocol=0x0800, filter="vlan 5")
