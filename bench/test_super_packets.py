"""Measures segmentation of super-packets of a TAP: linkrx against the kernel's own segmentation, and a bare loop in C."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from race import Figures, figures, note, ratio_of, rounds_of
from support.super_packets import TCP, UDP, Super

import linkrx
from linkrx.memory.columns import align
from linkrx.testing.devices import Device

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
SUPER_PACKETS = 32  # in a fill: two megabytes, more than a core's second-level cache
SEGMENTS = 44  # in each
QUEUE = 2 * SUPER_PACKETS * SEGMENTS
MTU = 1500
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))

ROUNDS, DRAINS = 9, 7  # as in race.py: a round's figure is the median of its drains
WARMUP = 5

READ_ROOM = 65_600  # split_floor.c
MEMORY = 512 * 1024


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "split_floor.so")
        source = Path(__file__).with_name("split_floor.c")
        core = source.parents[1] / "linkrx" / "_core"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", f"-I{core}", "-shared", "-fPIC", "-o", built, source],
            check=True,
        )
        return ctypes.CDLL(str(built))


class Floor:
    """A bare C loop on a descriptor. Each call drains it and returns the number of frames or super-packets."""

    def __init__(self, function: str, fd: int) -> None:
        self.memory = mmap.mmap(-1, MEMORY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._call = getattr(_library(), function)
        self._call.restype = ctypes.c_long
        self._fd = fd
        self._at = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self.memory)))

        self._size = ctypes.c_uint64(0)

    def __call__(self) -> int:
        count: int = self._call(self._fd, self._at, ctypes.c_long(MEMORY), ctypes.byref(self._size))
        return count

    def size(self) -> int:
        """The bytes so far."""
        return self._size.value


class Queue:
    """A TAP queue, and a sender of the same super-packets. Without `offload` the kernel segments them."""

    def __init__(self, kept: ExitStack, case: Super, *, offload: bool) -> None:
        self.tap = kept.enter_context(linkrx.TunTap(vnet_header=offload, offload=offload))
        device = Device(self.tap.name)
        device.set(txqlen=QUEUE)
        device.set_up()
        self._sender = kept.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._sender.bind((self.tap.name, 0))
        self._sent = case.vnet() + case.frame()

    def fill(self, super_packets: int = SUPER_PACKETS) -> None:
        """Untimed."""
        for _ in range(super_packets):
            self._sender.send(self._sent)


@dataclass
class Reader:
    """One reader of a queue: `drain` returns the number of packets, `size` the bytes since the reader was made."""

    queue: Queue
    drain: Callable[[], int]
    size: Callable[[], int]
    wanted: tuple[int, int]  # packets and bytes in a filled queue
    sized: int = 0

    def check(self, came: int) -> None:
        """Check the counters, untimed, because that also reads the kernel's."""
        before, self.sized = self.sized, self.size()
        got = came, self.sized - before
        assert got == self.wanted, f"drained {got} of {self.wanted}"


def batches(rx: linkrx.Dispatcher, packets: int) -> Callable[[], int]:
    """The batch API: nothing per packet."""
    source = rx.batches()

    def drain() -> int:
        got = 0
        while got < packets:
            got += len(next(source))
        return got

    return drain


def delivery(rx: linkrx.Dispatcher, packets: int) -> Callable[[], int]:
    """`deliver` for every packet."""

    def drain() -> int:
        got = 0
        while got < packets:
            got += rx.drain()
        return got

    return drain


def ignore(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
    """A deliver that does nothing, so the time is linkrx's."""


def super_packet(protocol: int, version: int) -> Super:
    """A super-packet of as many full frames as the kernel puts into one."""
    case = Super(version, protocol, tcp_options=TIMESTAMPS if protocol == TCP else b"")
    size = MTU - (case.headers - len(case.link))
    return Super(version, protocol, SEGMENTS * size, size, tcp_options=case.tcp_options)


@contextmanager
def readers(case: Super) -> Iterator[dict[str, Reader]]:
    """All readers, on a queue with super-packets and on one without."""
    frames = SUPER_PACKETS * SEGMENTS, SUPER_PACKETS * sum(map(len, case.frames()))
    wholes = SUPER_PACKETS, SUPER_PACKETS * len(case.frame())
    with ExitStack() as kept:
        whole, cut = Queue(kept, case, offload=True), Queue(kept, case, offload=False)

        def opened(
            queue: Queue, way: Callable[..., Callable[[], int]], wanted: tuple[int, int], **options: Any
        ) -> Reader:
            deliver = ignore if way is delivery else None
            rx = kept.enter_context(linkrx.open(queue.tap, deliver, backend="readv", **options))
            return Reader(queue, way(rx, wanted[0]), lambda: rx.stats().bytes, wanted)

        def bare(function: str, wanted: tuple[int, int]) -> Reader:
            floor = Floor(function, whole.tap.fileno())
            return Reader(whole, floor, floor.size, wanted)

        yield {
            "C floor": bare("drain_split", frames),
            "segment": opened(whole, batches, frames, segment=True),
            "segment, deliver": opened(whole, delivery, frames, segment=True),
            "kernel": opened(cut, batches, frames),
            "kernel, deliver": opened(cut, delivery, frames),
            "C, whole": bare("drain_whole", wholes),
            "whole": opened(whole, batches, wholes),
        }


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
def test_super_packets(benchmark: Any, protocol: int, version: int) -> None:
    """Each reader drains its queue in every round, in random order, and receives every frame and byte."""
    case = super_packet(protocol, version)
    verify(case)
    spent: dict[str, list[float]] = defaultdict(list)
    with readers(case) as racing:
        names, waiting = list(racing), list[str]()

        def drain(name: str) -> None:
            reader = racing[name]
            start = time.perf_counter_ns()
            came = reader.drain()
            spent[name].append((time.perf_counter_ns() - start) / SUPER_PACKETS / SEGMENTS)
            reader.check(came)

        def finish_round() -> None:
            while waiting:
                racing[waiting[-1]].queue.fill()
                drain(waiting.pop())

        def start_round() -> None:
            finish_round()
            random.shuffle(names)
            waiting.extend(names)
            while (name := waiting.pop()) != "segment":
                racing[name].queue.fill()
                drain(name)
            racing[name].queue.fill()

        gc.collect()
        gc.freeze()
        try:
            benchmark.pedantic(
                drain, args=("segment",), setup=start_round, rounds=ROUNDS * DRAINS, warmup_rounds=WARMUP
            )
            finish_round()
        finally:
            gc.unfreeze()
    transport = f"{'TCP' if protocol == TCP else 'UDP'}, IPv{version}"
    note(benchmark, transport=transport, segments=SEGMENTS, super_packets=SUPER_PACKETS)
    if benchmark.enabled:
        report(
            benchmark,
            {name: rounds_of([(ns, False) for ns in took[WARMUP:]], DRAINS) for name, took in spent.items()},
        )


def report(benchmark: Any, timed: dict[str, Figures]) -> None:
    """Report nanoseconds per frame of each reader, and the ratios between them."""
    note(benchmark, **figures(timed, "segment", "C floor"))

    def ratio(name: str, other: str) -> float:
        return ratio_of(timed[name], timed[other])

    benchmark.extra_info["targets"] = {
        "kernel / segment": ratio("kernel", "segment"),
        "kernel / segment, both with deliver": ratio("kernel, deliver", "segment, deliver"),
        "segment / C": ratio("segment", "C floor"),
        "whole / C, whole": ratio("whole", "C, whole"),
    }


def verify(case: Super) -> None:
    """Assert that the kernel, the bare loop and linkrx give the same frames, byte for byte."""
    with ExitStack() as kept:
        whole, cut = Queue(kept, case, offload=True), Queue(kept, case, offload=False)
        cut.fill(1)
        expected = [os.read(cut.tap.fileno(), READ_ROOM) for _ in range(SEGMENTS)]
        assert expected == case.frames()

        floor = Floor("drain_split", whole.tap.fileno())
        whole.fill(1)
        assert (floor(), floor.size()) == (SEGMENTS, sum(map(len, expected)))
        at = READ_ROOM
        for frame in expected:
            assert floor.memory[at : at + len(frame)] == frame
            at += align(len(frame))

        whole.fill(2)
        assert os.read(whole.tap.fileno(), READ_ROOM) == case.vnet() + case.frame()
        with linkrx.open(whole.tap, backend="readv", segment=True) as rx:
            assert [bytes(rx.recv(1)) for _ in expected] == expected
