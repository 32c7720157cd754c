"""The bare C loops, compiled on the spot, and the way to measure against them."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from linkrx import _core

MEMORY = 512 * 1024
ROUNDS = 200
RING_BLOCK, RING_BLOCKS = 128 * 1024, 512


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "floors.so")
        source = Path(__file__).with_name("floors.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", built, source], check=True
        )
        return ctypes.CDLL(str(built))


class Floor:
    """One bare loop on one descriptor. Each call drains it and returns (packets, bytes)."""

    def __init__(self, function: str, fd: int, argument: int) -> None:
        self._memory = mmap.mmap(-1, MEMORY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._call = getattr(_library(), function)
        self._call.restype = ctypes.c_long
        self._fd = fd
        self._argument = argument
        self._at = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))

    def __call__(self) -> tuple[int, int]:
        drained = ctypes.c_uint64(0)
        packets = self._call(self._fd, self._at, ctypes.c_long(self._argument), ctypes.byref(drained))
        return packets, drained.value


def read_floor(fd: int) -> Floor:
    """read() into a packed arena, for TAP and TUN."""
    return Floor("drain_read", fd, MEMORY)


def recvmmsg_floor(fd: int, *, metadata: bool) -> Floor:
    """recvmmsg() in batches of 64."""
    return Floor("drain_recvmmsg", fd, int(metadata))


class RingFloor:
    """A bare walk of a TPACKET_V3 ring. Each call empties it and returns (packets, bytes)."""

    def __init__(self, fd: int) -> None:
        library = _library()
        library.make_ring.restype = ctypes.c_void_p
        library.walk_ring.restype = ctypes.c_long
        self._shape = (ctypes.c_uint(RING_BLOCK), ctypes.c_uint(RING_BLOCKS))
        self._ring = ctypes.c_void_p(library.make_ring(fd, *self._shape))
        assert self._ring.value, "no ring"
        self._walk = library.walk_ring

    def __call__(self) -> tuple[int, int]:
        walked = ctypes.c_uint64(0)
        packets = self._walk(self._ring, *self._shape, ctypes.byref(walked))
        return packets, walked.value

    def close(self) -> None:
        """Unmap it: the kernel removes a ring with its socket."""
        _library().free_ring(self._ring, *self._shape)


def processor() -> str:
    """The CPU's name, as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


Drain = Callable[[], int]


def against(
    benchmark: Any,
    floor: Callable[[], tuple[int, int]],
    subject: Drain,
    fill: Drain,
    size: int,
    fill_floor: Drain | None = None,
    **facts: object,
) -> int:
    """Measure `subject` draining what `fill` put into a queue, round by round beside `floor` doing the same.

    `fill` and `subject` return packets, and what is drained must be what was put in; so must the bytes that the
    floor counts, packets of `size` each. Filling is not timed. The figure is `ratio`: the subject's median round over
    the floor's. `fill_floor` is for a floor with a queue of its own. Returns how many packets the subject drained in
    all, for a last check.
    """
    floor_rounds: list[int] = []
    sent = drained = 0

    def interleave() -> None:
        nonlocal sent
        sent = (fill_floor or fill)()
        start = time.perf_counter_ns()
        got = floor()
        floor_rounds.append(time.perf_counter_ns() - start)
        assert got == (sent, sent * size), f"the floor drained {got} of {sent}"
        sent = fill()

    def drain() -> None:
        nonlocal drained
        got = subject()
        assert got == sent, f"{got} drained of {sent}"
        drained += got

    gc.collect()
    gc.freeze()
    try:
        benchmark.pedantic(drain, setup=interleave, rounds=ROUNDS, warmup_rounds=5)
    finally:
        gc.unfreeze()
    benchmark.extra_info.update(
        kernel=platform.release(), cpu=processor(), core=_core.reason is None, **facts
    )
    if benchmark.enabled:
        ns = statistics.median(benchmark.stats.stats.data) * 1e9 / sent
        floor_ns = statistics.median(floor_rounds) / sent
        benchmark.extra_info.update(
            ns=round(ns, 1), floor_ns=round(floor_ns, 1), ratio=round(ns / floor_ns, 3)
        )
    return drained
