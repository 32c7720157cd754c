"""Draining a filled queue: every backend and way to receive beside the bare C loop that does the same."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from floors import Drain, Floor, against, read_floor, recvmmsg_floor
from pyroute2 import IPRoute

import linkrx
from linkrx.device import injector_on
from linkrx.rigs import LOCAL, REMOTE, veth
from linkrx.source import ETH_P_ALL, SO_RCVBUFFORCE

PACKETS = 512  # below the 1000 that a TAP queue holds by default
SIZES = [64, 1514]
QUEUE_BACKENDS = ["readv", "os_readv"]
SOCKET_BACKENDS = ["recvmmsg", "readv", "os_readv"]


def filler(send: Callable[[bytes], object], size: int, neighbours: int) -> Drain:
    """Put PACKETS frames of `size` bytes into the queue, from so many senders in turn."""
    senders = [REMOTE[:-1] + bytes([number]) for number in range(neighbours)]
    frames = [LOCAL + sender + b"\x08\x00" + bytes(size - 14) for sender in senders]

    def fill() -> int:
        for _ in range(PACKETS // neighbours):
            for frame in frames:
                send(frame)
        return PACKETS

    return fill


def batches(rx: linkrx.Dispatcher) -> Drain:
    """The batch API: nothing per packet."""
    source = rx.batches()

    def drain() -> int:
        packets = 0
        while packets < PACKETS:
            packets += len(next(source))
        return packets

    return drain


def iteration(rx: linkrx.Dispatcher) -> Drain:
    """`for packet in batch`."""
    source = rx.batches()

    def drain() -> int:
        packets = 0
        while packets < PACKETS:
            for _ in next(source):
                packets += 1
        return packets

    return drain


def each(rx: linkrx.Dispatcher) -> Drain:
    """`for packet in rx`."""

    def drain() -> int:
        packets = 0
        for _ in rx:
            packets += 1
            if packets == PACKETS:
                break
        return packets

    return drain


def delivery(rx: linkrx.Dispatcher) -> Drain:
    """`deliver` for every packet; see `ignore`."""

    def drain() -> int:
        packets = 0
        while packets < PACKETS:
            packets += rx.drain()
        return packets

    return drain


def ignore(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
    """A deliver that does nothing: what remains is linkrx."""


WAYS: dict[str, Callable[[linkrx.Dispatcher], Drain]] = {
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
