"""Sending to a full queue, on every kind of source that sends through a device. The device is slow."""

from __future__ import annotations

import fcntl
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from support.run import that_take

import linkrx
from linkrx.kernel.uapi import ETH_P_ALL
from linkrx.testing.devices import Device, delete_if_there, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import PATIENCE, running, until

pytestmark = pytest.mark.usefixtures("devices")

TUNSETSNDBUF = 0x400454D4  # linux/if_tun.h
SMALL = 4608  # bytes of a send buffer: SOCK_MIN_SNDBUF of include/net/sock.h
FRAME = LOCAL + REMOTE + b"\x88\xb5" + bytes(86)
MANY = 2000
FULL = "its queue is full"


@contextmanager
def slow(name: str, limit: int) -> Iterator[Callable[[], None]]:
    """Make a device slow: it sends a few kilobytes, and queues up to `limit` bytes. The yielded call makes it fast again."""

    def tc(what: str, *parameters: str) -> None:
        subprocess.run(["tc", "qdisc", what, "dev", name, "root", *parameters], check=True)

    # One frame in 14 seconds: after a wait for the processor, a test must find the queue still full.
    tc("add", "tbf", "rate", "64bit", "burst", "2000", "limit", str(limit))
    deleted: list[bool] = []

    def let_through() -> None:
        if not deleted:
            deleted.append(True)
            tc("del")

    try:
        yield let_through
    finally:
        let_through()


@dataclass
class SlowSource:
    """An open dispatcher on a slow device, a frame to send, a call that makes room, and a call that sends to it."""

    rx: linkrx.Dispatcher
    frame: bytes
    let_through: Callable[[], None]
    receive: Callable[[], object]


Make = Callable[[ExitStack, str, Any, int], SlowSource]


def by_name(stack: ExitStack, backend: str, deliver: Any, limit: int) -> SlowSource:
    """An interface by name."""
    near, far = stack.enter_context(veth())
    let_through = stack.enter_context(slow(near, limit))
    rx = stack.enter_context(linkrx.open(near, deliver, backend=backend))
    injector = stack.enter_context(injector_on(far))
    return SlowSource(rx, FRAME, let_through, lambda: injector.send(FRAME))


def packet_socket(stack: ExitStack, backend: str, deliver: Any, limit: int) -> SlowSource:
    """A borrowed packet socket with the smallest send buffer."""
    near, far = stack.enter_context(veth())
    let_through = stack.enter_context(slow(near, limit))
    borrowed = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    borrowed.bind((near, ETH_P_ALL))
    rx = stack.enter_context(linkrx.open(borrowed, deliver, backend=backend))
    injector = stack.enter_context(injector_on(far))
    return SlowSource(rx, FRAME, let_through, lambda: injector.send(FRAME))


def tap(stack: ExitStack, backend: str, deliver: Any, limit: int) -> SlowSource:
    """A TAP queue with a small send buffer, bridged to a slow interface."""
    near, _ = stack.enter_context(veth())
    queue = stack.enter_context(linkrx.TunTap())
    fcntl.ioctl(queue, TUNSETSNDBUF, struct.pack("i", SMALL))
    bridge = queue.name + "b"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0"], check=True)
    stack.callback(delete_if_there, bridge)
    for port in (near, queue.name):
        subprocess.run(["ip", "link", "set", port, "master", bridge, "up"], check=True)
    Device(bridge).set_up()
    let_through = stack.enter_context(slow(near, limit))
    rx = stack.enter_context(linkrx.open(queue, deliver, backend=backend))
    injector = stack.enter_context(injector_on(queue.name))
    return SlowSource(rx, FRAME, let_through, lambda: injector.send(FRAME))


def udp(stack: ExitStack, backend: str, deliver: Any, limit: int) -> SlowSource:
    """A connected UDP socket with the smallest send buffer."""
    near, _ = stack.enter_context(veth())
    subprocess.run(["ip", "addr", "add", "192.0.2.1/24", "dev", near], check=True)
    neighbour = ["192.0.2.2", "lladdr", LOCAL.hex(":"), "dev", near, "nud", "permanent"]
    subprocess.run(["ip", "neigh", "add", *neighbour], check=True)
    let_through = stack.enter_context(slow(near, limit))
    borrowed = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    borrowed.bind(("192.0.2.1", 4000))
    borrowed.connect(("192.0.2.2", 5000))
    # Packets to the source are sent from the peer's address.
    peer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
    rx = stack.enter_context(linkrx.open(borrowed, deliver, backend=backend))
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(FRAME), 0, 0, 64, socket.IPPROTO_UDP, 0)
    addresses = socket.inet_aton("192.0.2.2") + socket.inet_aton("192.0.2.1")
    datagram = head + addresses + struct.pack("!HHHH", 5000, 4000, 8 + len(FRAME), 0) + FRAME
    return SlowSource(rx, FRAME, let_through, lambda: peer.sendto(datagram, ("192.0.2.1", 0)))


LARGE = 1 << 30


def cells() -> list[object]:
    """Every kind of source with every backend."""
    kinds = {by_name: "packet", packet_socket: "packet", tap: "tap", udp: "udp"}
    return [
        pytest.param(make, backend, id=f"{backend}-{make.__name__}")
        for make, kind in kinds.items()
        for backend in that_take(kind)
    ]


def ignore(*_: object) -> None:
    """A deliver that does nothing."""


def refused(rx: linkrx.Dispatcher, frame: bytes) -> bool:
    """Whether send raises BlockingIOError."""
    try:
        rx.send(frame)
    except BlockingIOError as error:
        if FULL in str(error):
            return True
        raise
    return False


@pytest.mark.parametrize(("make", "backend"), cells())
def test_a_queue_that_is_full(make: Make, backend: str) -> None:
    """On a full queue `send` raises BlockingIOError, and `send_batch` returns how many frames were accepted. All accepted frames are counted, and reception and later sends work."""
    with ExitStack() as stack:
        narrow = make(stack, backend, ignore, LARGE)
        rx, frame = narrow.rx, narrow.frame
        sent = rx.send_batch([frame] * MANY)
        while taken := rx.send_batch([frame] * MANY):  # frames that were in transit to the device
            sent += taken
        assert 0 < sent < MANY
        assert rx.stats().sent == sent
        assert refused(rx, frame)
        assert rx.send_batch([frame]) == 0
        assert rx.stats().sent == sent
        before = rx.stats().packets
        narrow.receive()
        assert rx.dispatch(PATIENCE)
        assert rx.stats().packets > before
        narrow.let_through()
        until(lambda: not refused(rx, frame))
        assert rx.send_batch([frame] * 3) > 0
        assert rx.end is None


@pytest.mark.parametrize(("make", "backend"), cells())
def test_full_in_a_flood_both_ways(make: Make, backend: str) -> None:
    """Threads, `deliver` and a signal handler that send to a full queue get BlockingIOError, while packets are received."""
    refusals: dict[str, int] = {"deliver": 0, "signal": 0, "thread": 0}
    over: list[bool] = []

    with ExitStack() as stack:

        def deliver(*_: object) -> None:
            refusals["deliver"] += refused(rx, frame)

        narrow = make(stack, backend, deliver, LARGE)
        rx, frame = narrow.rx, narrow.frame
        while rx.send_batch([frame] * MANY):
            pass

        def handler(_number: int, _frame: FrameType | None) -> None:
            refusals["signal"] += refused(rx, frame)

        def flood() -> None:
            while not over:
                narrow.receive()
                refusals["thread"] += refused(rx, frame)
                refusals["thread"] += rx.send_batch([frame] * 10) == 0

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            with running(flood):
                try:
                    while min(refusals.values()) < 10:
                        rx.run(count=10, duration=PATIENCE)
                finally:
                    over.append(True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert rx.end is None


@pytest.mark.parametrize("backend", that_take("packet"))
def test_a_queue_of_the_device_that_is_full(backend: str) -> None:
    """If the device's queue drops the frame (ENOBUFS), `send` raises BlockingIOError too, and the frame is not counted."""
    with ExitStack() as stack:
        narrow = by_name(stack, backend, ignore, 1000)
        rx = narrow.rx
        sent = rx.send_batch([FRAME] * MANY)
        while taken := rx.send_batch([FRAME] * MANY):
            sent += taken
        assert 0 < sent < 100
        assert refused(rx, FRAME)
        assert rx.stats().sent == sent
        narrow.let_through()
        rx.send(FRAME)
        assert rx.stats().sent == sent + 1
