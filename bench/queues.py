"""The queues of every kind of source, and linkrx readers that drain them with every call."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from floors import Frames, loop_floor, ring_floor
from race import Check, Drain, Queue, Reader

import linkrx
from linkrx.kernel.uapi import ETH_P_ALL, PACKET_AUXDATA, SO_RCVBUFFORCE, SO_TIMESTAMPNS, SOL_PACKET
from linkrx.sources.capabilities import HasFileno
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import TAP_MTU, veth

SIZES = (64, 576, 1514, 9014, 65535)
BUFFER = 64 * 1024 * 1024  # bytes of socket buffer; a queued frame takes more than its size
SO_SNDBUFFORCE = 32  # asm-generic/socket.h
# A TAP queue holds 1000 frames by default. Reading a ring takes some 20 ns per frame, so a fill has enough frames that the
# first cache misses do not matter. There are fewer large frames: a drain should take at most a millisecond, or other
# processes interrupt it, and the median says little.
PACKETS, FILL_BYTES = 512, 1024 * 1024
RING_PACKETS, RING_FILL_BYTES = 4096, 6 * 1024 * 1024
BYTE = 23  # the offset of the byte that is read: the protocol in the IPv4 header
RING_SETTLE = 0.004  # four times the default latency


def packets_of(size: int, most: int = PACKETS, fill: int = FILL_BYTES) -> int:
    """Frames in a fill: a multiple of 64, so that batches are full."""
    return min(most, max(64, fill // size // 64 * 64))


Source = int | str | HasFileno
Opened = tuple[Queue, Source, Reader]


@contextmanager
def tap(frames: Frames) -> Iterator[Opened]:
    """A TAP queue. Its floor is read() into a packed arena."""
    with linkrx.TunTap() as source:
        os.set_blocking(source.fileno(), False)
        device = Device(source.name)
        device.set_mtu(TAP_MTU)
        device.set_up()
        with injector_on(source.name) as injector:
            queue = Queue(frames, injector, packets_of(frames.size))
            yield queue, source, loop_floor(queue, source.fileno(), "drain_read")


@contextmanager
def packet_socket(frames: Frames) -> Iterator[Opened]:
    """An AF_PACKET socket on a veth. Its floor is recvmmsg() with the metadata that linkrx asks for."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as source,
    ):
        source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        # The kernel adds these only if they are asked for, and then copies 72 bytes more for each packet.
        source.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        source.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        source.bind((near, ETH_P_ALL))
        queue = Queue(frames, injector, packets_of(frames.size))
        yield queue, source, loop_floor(queue, source.fileno(), "drain_recvmmsg_metadata")


@contextmanager
def ring(frames: Frames) -> Iterator[Opened]:
    """An interface on which each reader has its own ring. The floor is a bare walk of a ring."""
    with veth() as (near, far), injector_on(far) as injector:
        queue = Queue(
            frames,
            injector,
            packets_of(frames.size, RING_PACKETS, RING_FILL_BYTES),
            shared=True,
            settle=RING_SETTLE,
        )
        yield queue, near, ring_floor(queue, near)


@contextmanager
def unix(frames: Frames) -> Iterator[Opened]:
    """An AF_UNIX datagram pair. Its floor is recvmmsg() without metadata."""
    source, injector = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with source, injector:
        source.setblocking(False)
        injector.setblocking(False)
        # Queued frames count against the sender's buffer.
        injector.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
        queue = Queue(frames, injector, packets_of(frames.size))
        yield queue, source, loop_floor(queue, source.fileno(), "drain_recvmmsg")


# A missing backend does not support the source: see the first table of tests/README.md.
SOURCES: dict[str, tuple[Callable[[Frames], AbstractContextManager[Opened]], tuple[str, ...]]] = {
    "tap": (tap, ("readv", "os_readv")),
    "packet": (packet_socket, ("recvmmsg", "readv", "os_readv")),
    "ring": (ring, ("packet_mmap",)),
    "unix": (unix, ("recvmmsg", "readv", "os_readv")),
}


def columns(rx: linkrx.Dispatcher, wanted: int, check: Check | None) -> Drain:
    """`for batch in rx.batches()`: nothing per packet."""
    source = iter(rx.batches())  # as `for` does

    def drain() -> int:
        packets = 0
        while packets < wanted:
            packets += len(next(source))
        return packets

    def checked(check: Check) -> int:
        packets = 0
        while packets < wanted:
            batch = next(source)
            packets += len(batch)
            for start, length in zip(batch.starts, batch.lengths, strict=True):
                check(batch.memory[start : start + length])
        return packets

    return drain if check is None else lambda: checked(check)


def columns_byte(rx: linkrx.Dispatcher, wanted: int, check: Check | None) -> Drain:
    """`columns`, and a byte of each frame through `memory`."""
    source = iter(rx.batches())  # as `for` does

    def drain() -> int:
        packets = seen = 0
        while packets < wanted:
            batch = next(source)
            memory = batch.memory
            for start in batch.starts:
                seen += memory[start + BYTE]
            packets += len(batch)
        assert seen == packets * socket.IPPROTO_UDP
        return packets

    return drain if check is None else columns(rx, wanted, check)


def batch(rx: linkrx.Dispatcher, wanted: int, check: Check | None) -> Drain:
    """`for packet in batch`."""
    source = iter(rx.batches())  # as `for` does

    def drain() -> int:
        packets = 0
        while packets < wanted:
            for _ in next(source):
                packets += 1
        return packets

    def checked(check: Check) -> int:
        packets = 0
        while packets < wanted:
            for packet in next(source):
                packets += 1
                check(packet.frame)
        return packets

    return drain if check is None else lambda: checked(check)


def each(rx: linkrx.Dispatcher, wanted: int, check: Check | None) -> Drain:
    """`for packet in rx`."""

    def drain() -> int:
        packets = 0
        for _ in rx:
            packets += 1
            if packets == wanted:
                break
        return packets

    def checked(check: Check) -> int:
        packets = 0
        for packet in rx:
            packets += 1
            check(packet.frame)
            if packets == wanted:
                break
        return packets

    return drain if check is None else lambda: checked(check)


def deliver(rx: linkrx.Dispatcher, wanted: int, check: Check | None) -> Drain:
    """`deliver` for every packet: see `ignore`."""

    def drain() -> int:
        packets = 0
        while packets < wanted:
            packets += rx.drain()
        return packets

    return drain


def ignore(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
    """A deliver that does nothing, so the time is linkrx's."""


Way = Callable[[linkrx.Dispatcher, int, Check | None], Drain]
WAYS: dict[str, Way] = {"columns": columns, "batch": batch, "each": each, "deliver": deliver}


def linkrx_reader(queue: Queue, source: Source, way: Way, **options: Any) -> Reader:
    """linkrx on a source, with one call."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        def show(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
            assert check is not None
            check(packet.frame)

        to = (ignore if check is None else show) if way is deliver else None
        with ExitStack() as stack:
            rx = stack.enter_context(linkrx.open(source, to, **options))
            yield way(rx, queue.packets, check)
            counted = rx.stats()
            assert counted.bytes == counted.packets * queue.frames.size
            assert (counted.truncated, counted.kernel_drops or 0) == (0, 0), counted

    return Reader(queue, opened)
