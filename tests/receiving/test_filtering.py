"""Filters on open sources: where they run, and that rejected packets are not delivered."""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import pytest
from support.frames import tagged, udp
from support.interruptions import Acting, After, Interrupted
from support.pairs import BACKENDS, frame, number_of, pair
from support.paths import TESTS
from support.programs import packed
from support.run import points, that_take

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
    """The numbers of the next `count` packets."""
    return [packet.u32(14) for packet in collect(rx, count)]


def nothing_more(rx: linkrx.Dispatcher) -> None:
    """Assert that no packet is queued."""
    with pytest.raises(TimeoutError):
        rx.recv(0)


@pytest.mark.parametrize("backend", ON_PACKET)
def test_the_kernel_filters_an_interface(wire: Wire, backend: str) -> None:
    """For an interface the kernel filters, from before the socket is bound, and linkrx counts no rejected packets."""
    near, injector = wire
    assert "the kernel" in (linkrx.choose(near, backend=backend, filter=EVEN).filter or "")
    with linkrx.open(near, backend=backend, filter=EVEN) as rx:
        for number in range(4):
            injector.send(frame(number))
        assert numbers(rx, 2) == [0, 2]
        assert rx.choice.filter == "the kernel: attached before the socket was bound"
        assert rx.choice.explain().splitlines()[-1].split(None, 1) == ["filter", rx.choice.filter]
        assert rx.stats().filtered is None


def test_linkrx_filters_other_sources() -> None:
    """For other sources linkrx filters, and counts rejected packets."""
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
    """Under load, no packet of an interface is received if each open has a filter that rejects all."""
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
def test_packets_that_were_queued_before(wire: Wire, borrowed: socket.socket, backend: str) -> None:
    """linkrx filters the packets that a borrowed socket had queued, and the kernel the others. None is discarded unfiltered."""
    for number in range(6):
        wire[1].send(frame(number))
    with linkrx.open(borrowed, backend=backend, filter=EVEN) as rx:
        for number in range(6, 10):
            wire[1].send(frame(number))
        assert numbers(rx, 5) == [0, 2, 4, 6, 8]
        assert rx.stats().filtered == 3
        nothing_more(rx)
        # The queue was empty once: from now on only the kernel filters.
        attach(borrowed.fileno(), b"")
        wire[1].send(frame(11))
        assert numbers(rx, 1) == [11]


@pytest.mark.parametrize("backend", [name for name in ON_PACKET if name != "packet_mmap"])
def test_a_filter_of_the_owner_is_put_back(borrowed: socket.socket, backend: str) -> None:
    """close() and set_filter(None) restore the owner's filter, instruction for instruction."""
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
    """A locked filter makes open and set_filter raise an error that says so, and it stays attached."""
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
    """A socket filter in eBPF that accepts every packet: bpf(2), BPF_PROG_LOAD."""
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
    """The kernel does not show an eBPF filter, so linkrx could not restore it and refuses the option."""
    program = _ebpf()
    try:
        borrowed.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
    finally:
        os.close(program)
    with pytest.raises(linkrx.UnsupportedOption, match="and so could not restore it"):
        linkrx.open(borrowed, filter=EVEN)


def test_filters_that_only_the_kernel_can_run(wire: Wire, borrowed: socket.socket) -> None:
    """A program that reads the receive hash runs in the kernel for an interface by name, and is refused if packets may be queued."""
    with linkrx.open(wire[0], filter=RXHASH) as rx:
        wire[1].send(frame(1))
        assert numbers(rx, 1) == [1]
        with pytest.raises(linkrx.UnsupportedOption, match="the receive hash, which linkrx does not know"):
            rx.set_filter(RXHASH)
    with pytest.raises(linkrx.UnsupportedOption, match="the receive hash"):
        linkrx.open(borrowed, filter=RXHASH)


@pytest.mark.parametrize("backend", ON_PACKET)
def test_tags(wire: Wire, backend: str) -> None:
    """An expression with `vlan` is applied to the frame as it was on the wire. It distinguishes double tags and no tag."""
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
    """A source that receives from every device: a packet socket of a type, or "any"."""
    if kind == "any":
        yield "any"
        return
    number = getattr(socket, kind) | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_PACKET, number, socket.htons(3)) as packet:
        yield packet


@devices
@pytest.mark.parametrize("kind", ["any", "SOCK_RAW", "SOCK_DGRAM"])
def test_any_device(kind: str) -> None:
    """On a socket that receives from lo, a veth and a TUN device, an expression accepts the same packets of each.

    The same is true of an expression that replaces it, for queued packets.
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
    """An expression on a TAP queue is applied to the frame behind the virtio-net header."""
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
    """After a fallback to another backend the filter is still applied, and explain() says so."""
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
    """set_filter from another thread during a wait takes effect: later packets are judged by the new filter, and the wait continues."""
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
    """set_filter from a signal handler on the receiving thread takes effect before the next packet is delivered."""
    changed: list[bool] = []
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, filter=ODD) as rx:

        def change(_: object) -> None:
            if not changed:
                changed.append(True)
                rx.set_filter(EVEN)
                sender.send(frame(1))
                sender.send(frame(2))

        # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
        with alarmed(change, first=0.01, interval=0.01):
            assert number_of(rx.recv(PATIENCE)) == 2


def test_closed() -> None:
    """After close(), set_filter raises Closed."""
    with pair() as (receiver, _):
        rx = linkrx.open(receiver)
        rx.close()
        with pytest.raises(linkrx.Closed):
            rx.set_filter(EVEN)


def test_runts_that_a_filter_makes() -> None:
    """A frame that a filter cuts within its link header is counted as a runt, in the current batch too."""
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
    """The kernel discards tags on a socket that is bound to an EtherType, so linkrx refuses an expression with `vlan` there."""
    with pytest.raises(linkrx.UnsupportedOption, match="with protocol= the kernel drops them"):
        linkrx.open(wire[0], protocol=0x0800, filter="vlan 5")


@pytest.mark.samples
@pytest.mark.parametrize("backend", ON_PACKET)
def test_a_signal_handler_that_sets_a_filter_inside_set_filter(wire: Wire, backend: str) -> None:
    """If a signal handler calls set_filter at any point of another set_filter, one of the two filters is in force, and stays so."""
    near, injector = wire
    for point in points(5000):
        with linkrx.open(near, backend=backend, receive_buffer=1 << 18) as rx:
            acting = Acting(point, partial(rx.set_filter, "ether[17] & 1 = 1"))
            with acting:
                rx.set_filter("ether[17] & 1 = 0")
            got: list[int] = []
            for first in (0, 6):  # linkrx's own filter for what was queued has ended when the second six come
                for number in range(first, first + 6):
                    injector.send(frame(number))
                got += numbers(rx, 3)
                nothing_more(rx)
            assert got in ([0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]), f"point {point}"
        if not acting.raised:
            break
    assert not acting.raised
    assert point > 7


def test_another_thread_sets_a_filter_after_an_interrupted_set_filter() -> None:
    """If a signal handler raises at any point of set_filter, other threads can set a filter afterwards."""
    for point in range(5000):
        with pair() as (receiver, sender), linkrx.open(receiver) as rx:
            interruption = After(point)
            with suppress(Interrupted), interruption:
                rx.set_filter(ODD)
            with ThreadPoolExecutor(1) as other:
                other.submit(rx.set_filter, EVEN).result()
            for number in range(4):
                sender.send(frame(number))
            assert numbers(rx, 2) == [0, 2]
        if not interruption.raised:
            break
    assert not interruption.raised
