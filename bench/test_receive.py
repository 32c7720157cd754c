"""Draining a filled queue: every backend and way to receive beside the bare C loop that does the same."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from floors import Drain, Floor, RingFloor, against, read_floor, recvmmsg_floor
from pyroute2 import IPRoute

import linkrx
from linkrx.device import injector_on
from linkrx.rigs import LOCAL, REMOTE, veth
from linkrx.source import ETH_P_ALL, SO_RCVBUFFORCE

PACKETS = 512  # below the 1000 that a TAP queue holds by default
RING_PACKETS = (
    4096  # a ring takes them in 20 ns each: enough that the first misses of a cold cache do not count
)
RING_CLOSED = (
    0.002  # seconds after which the block that the last of them are in is closed: twice the default latency
)
SIZES = [64, 1514]
QUEUE_BACKENDS = ["readv", "os_readv"]
SOCKET_BACKENDS = ["recvmmsg", "readv", "os_readv"]


def filler(send: Callable[[bytes], object], size: int, neighbours: int, packets: int = PACKETS) -> Drain:
    """Put so many frames of `size` bytes into the queue, from so many senders in turn."""
    senders = [REMOTE[:-1] + bytes([number]) for number in range(neighbours)]
    frames = [LOCAL + sender + b"\x08\x00" + bytes(size - 14) for sender in senders]

    def fill() -> int:
        for _ in range(packets // neighbours):
            for frame in frames:
                send(frame)
        return packets

    return fill


def batches(rx: linkrx.Dispatcher, wanted: int = PACKETS) -> Drain:
    """The batch API: nothing per packet."""
    source = rx.batches()

    def drain() -> int:
        packets = 0
        while packets < wanted:
            packets += len(next(source))
        return packets

    return drain


def iteration(rx: linkrx.Dispatcher, wanted: int = PACKETS) -> Drain:
    """`for packet in batch`."""
    source = rx.batches()

    def drain() -> int:
        packets = 0
        while packets < wanted:
            for _ in next(source):
                packets += 1
        return packets

    return drain


def each(rx: linkrx.Dispatcher, wanted: int = PACKETS) -> Drain:
    """`for packet in rx`."""

    def drain() -> int:
        packets = 0
        for _ in rx:
            packets += 1
            if packets == wanted:
                break
        return packets

    return drain


def delivery(rx: linkrx.Dispatcher, wanted: int = PACKETS) -> Drain:
    """`deliver` for every packet; see `ignore`."""

    def drain() -> int:
        packets = 0
        while packets < wanted:
            packets += rx.drain()
        return packets

    return drain


def ignore(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
    """A deliver that does nothing: what remains is linkrx."""


WAYS: dict[str, Callable[..., Drain]] = {
    "batches": batches,
    "iteration": iteration,
    "each": each,
    "deliver": delivery,
    "deliver_four": delivery,
}


def measure(
    benchmark: Any, rx: linkrx.Dispatcher, floor: Floor, way: str, send: Callable[[bytes], object], size: int
) -> None:
    """Run one way to receive beside its floor, and see that every byte was counted."""
    neighbours = 4 if way == "deliver_four" else 1
    drained = against(benchmark, floor, WAYS[way](rx), filler(send, size, neighbours), size, batch_size=64)
    counted = rx.stats()
    assert (counted.packets, counted.bytes, counted.truncated) == (drained, drained * size, 0)


@contextmanager
def tap_queue() -> Iterator[tuple[linkrx.TunTap, socket.socket]]:
    """A TAP queue that is up, and a socket that sends into it."""
    with linkrx.TunTap() as tap, IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(tap.name), state="up")
        with injector_on(tap.name) as injector:
            yield tap, injector


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", QUEUE_BACKENDS)
def test_tap(benchmark: Any, backend: str, size: int, way: str) -> None:
    """linkrx on a TAP queue beside a bare read() loop."""
    with (
        tap_queue() as (tap, injector),
        linkrx.open(tap, ignore if way.startswith("deliver") else None, backend=backend) as rx,
    ):
        measure(benchmark, rx, read_floor(tap.fileno()), way, injector.send, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parse", [False, True], ids=["os.read", "os.read+unpack+call"])
def test_tap_by_hand(benchmark: Any, size: int, parse: bool) -> None:
    """What people write without linkrx: an os.read loop, and one that takes the header apart and calls."""
    unpack = struct.Struct("!6s6sH").unpack_from

    def handle(remote: bytes, local: bytes, protocol: int, frame: bytes) -> None:
        pass

    with tap_queue() as (tap, injector):
        fd = tap.fileno()

        def drain() -> int:
            packets = 0
            try:
                while True:
                    frame = os.read(fd, 65_600)
                    if parse:
                        local, remote, protocol = unpack(frame)
                        handle(remote, local, protocol, frame)
                    packets += 1
            except BlockingIOError:
                return packets

        against(benchmark, read_floor(fd), drain, filler(injector.send, size, 1), size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", SOCKET_BACKENDS)
def test_packet_socket(benchmark: Any, backend: str, size: int, way: str) -> None:
    """linkrx on an AF_PACKET socket beside a bare recvmmsg() loop with the same metadata."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as source,
    ):
        source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 * 1024 * 1024)
        source.bind((near, ETH_P_ALL))
        with linkrx.open(source, ignore if way.startswith("deliver") else None, backend=backend) as rx:
            measure(benchmark, rx, recvmmsg_floor(source.fileno(), metadata=True), way, injector.send, size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch_size", [64, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_ring(benchmark: Any, size: int, batch_size: int, way: str) -> None:
    """linkrx on a TPACKET_V3 ring beside a bare walk of such a ring, each on an interface of its own."""
    deliver = ignore if way.startswith("deliver") else None
    with (
        veth() as (near, far),
        veth() as (floor_near, floor_far),
        injector_on(far) as injector,
        injector_on(floor_far) as floor_injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as source,
        linkrx.open(near, deliver, backend="packet_mmap", batch_size=batch_size) as rx,
    ):
        floor = RingFloor(source.fileno())
        source.bind((floor_near, ETH_P_ALL))
        neighbours = 4 if way == "deliver_four" else 1
        try:
            drained = against(
                benchmark,
                floor,
                WAYS[way](rx, RING_PACKETS),
                closed(filler(injector.send, size, neighbours, RING_PACKETS)),
                size,
                closed(filler(floor_injector.send, size, neighbours, RING_PACKETS)),
                batch_size=batch_size,
            )
        finally:
            floor.close()
        counted = rx.stats()
        assert (counted.packets, counted.bytes, counted.kernel_drops) == (drained, drained * size, 0)
        assert counted.waits == 0, "a wait was measured"


def closed(fill: Drain) -> Drain:
    """Give the kernel time to close the block that the last packets are in."""

    def fill_and_close() -> int:
        packets = fill()
        until = time.monotonic() + RING_CLOSED
        while time.monotonic() < until:
            pass  # awake: what a sleep does to the caches is not what is measured here
        return packets

    return fill_and_close
