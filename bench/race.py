"""Measures readers that drain filled queues, round by round in random order, and checks their packets."""

from __future__ import annotations

import gc
import os
import platform
import random
import resource
import socket
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from linkrx import _core

ROUNDS = 9
DRAINS = 5  # drains of each reader in a round; their median is its figure for the round
ENOUGH = 3  # undisturbed rounds for a median; with fewer, all rounds count
WARMUP = 3  # drains before the first round
CHECKED = 2  # drains in which all bytes are checked, before the timed ones

Buffer = bytes | bytearray | memoryview
Drain = Callable[[], int]
Figures = dict[str, Any]  # of a reader, see `race`
Drained = tuple[float, bool]  # ns per packet, and whether another process had the processor meanwhile


class Sendable(Protocol):
    """Frames that fill a queue: `floors.Frames`."""

    size: int

    def send(self, injector: socket.socket, packets: int) -> int:
        """Send `packets` frames. Returns how many the kernel accepted."""

    def numbered(self, packets: int) -> Iterator[bytes]:
        """The frames that `send` sends."""

    def check(self, packets: int) -> int:
        """The Adler-32 checksum of `packets` frames, in order."""


@dataclass
class Queue:
    """A queue that readers drain. A `shared` one is an interface on which each reader has a socket: one fill reaches all."""

    frames: Sendable
    injector: socket.socket
    packets: int
    shared: bool = False
    settle: float = 0.0  # seconds after which a ring has closed the block of the last frames

    def fill(self) -> None:
        """Send the frames, untimed."""
        sent = self.frames.send(self.injector, self.packets)
        assert sent == self.packets, f"{sent} of {self.packets} frames fit into the queue"
        until = time.monotonic() + self.settle
        while time.monotonic() < until:
            pass  # busy-wait: a sleep would change the caches


class Check:
    """Checks the frames of a reader: counts packets and bytes, and computes the Adler-32 of all bytes in order."""

    def __init__(self) -> None:
        self.set(0, 0, 1)

    def set(self, packets: int, size: int, check: int) -> None:
        """Set the counts of another process."""
        self.packets, self.bytes, self.check = packets, size, check

    def __call__(self, frame: Buffer) -> None:
        """Add a frame."""
        self.packets += 1
        self.bytes += len(frame)
        self.check = zlib.adler32(frame, self.check)


@dataclass
class Reader:
    """One reader that drains a queue.

    `open` takes a Check, to which the reader passes all frames, or None for timed drains. It returns a context, which yields the
    function that drains the queue once and returns the number of packets.
    """

    queue: Queue
    open: Callable[[Check | None], AbstractContextManager[Drain]]


class OwnClock:
    """A drain in another process, which measures its own time and disturbance."""

    took_ns = 0.0
    disturbed = False

    def __call__(self) -> int:
        """Drain the queue."""
        raise NotImplementedError


def race(
    benchmark: Any,
    readers: dict[str, Reader],
    subject: str,
    *,
    floor: str = "C floor",
    per_round: int = DRAINS,
    warmup: int = WARMUP,
    **facts: object,
) -> None:
    """Measure readers in turn. pytest-benchmark gets the time of `subject`.

    There are ROUNDS rounds. In a round each reader drains its queue `per_round` times, in turn with all others and in
    random order. The median of these is its figure for the round. Filling is not timed. Each drain must return all frames.
    CHECKED drains before also check the order and every byte. A drain during which the kernel gave the processor to another
    process does not count, unless the round has no other. A round with only such drains does not count if there are ENOUGH
    other rounds.

    The figures are in `extra_info`. For each reader, `readers` has the nanoseconds per packet of every round, the disturbed
    rounds, the median, the minimum, and the median of the ratios to `floor` in the same round. `ns`, `floor_ns` and `ratio`
    are the subject's.
    """
    for name, reader in readers.items():
        verify(name, reader)
    spent: dict[str, list[Drained]] = {name: [] for name in readers}
    names, waiting = list(readers), list[str]()
    shared = {id(reader.queue): reader.queue for reader in readers.values() if reader.queue.shared}
    with ExitStack() as stack:
        drains = {name: stack.enter_context(reader.open(None)) for name, reader in readers.items()}

        def prepare(name: str) -> None:
            if not readers[name].queue.shared:
                readers[name].queue.fill()

        def drain(name: str) -> None:
            drained, wanted = drains[name], readers[name].queue.packets
            switches, start = preemptions(), time.perf_counter_ns()
            got = drained()
            took, disturbed = time.perf_counter_ns() - start, preemptions() > switches
            assert got == wanted, f"{name} drained {got} of {wanted}"
            if isinstance(drained, OwnClock):
                spent[name].append((drained.took_ns / wanted, drained.disturbed))
            else:
                spent[name].append((took / wanted, disturbed))

        def finish_round() -> None:
            while waiting:
                name = waiting.pop()
                prepare(name)
                drain(name)

        def start_round() -> None:
            finish_round()
            for queue in shared.values():
                queue.fill()
            random.shuffle(names)
            waiting.extend(names)
            while (name := waiting.pop()) != subject:
                prepare(name)
                drain(name)
            prepare(subject)

        gc.collect()
        gc.freeze()
        try:
            benchmark.pedantic(
                drain,
                args=(subject,),
                setup=start_round,
                rounds=ROUNDS * per_round,
                warmup_rounds=warmup,
            )
            finish_round()
        finally:
            gc.unfreeze()
    note(benchmark, **facts)
    if benchmark.enabled:
        timed = {name: rounds_of(took[warmup:], per_round) for name, took in spent.items()}
        note(benchmark, **figures(timed, subject, floor))


def verify(name: str, reader: Reader) -> None:
    """Drain CHECKED fills and check every byte."""
    check, queue = Check(), reader.queue
    wanted = (queue.packets, queue.packets * queue.frames.size, queue.frames.check(queue.packets))
    with reader.open(check) as drain:
        for _ in range(CHECKED):
            queue.fill()
            check.set(0, 0, 1)
            drain()
            got = (check.packets, check.bytes, check.check)
            assert got == wanted, f"{name}: packets, bytes, checksum are {got}, and should be {wanted}"


def preemptions() -> int:
    """The involuntary context switches of this thread so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def rounds_of(took: list[Drained], drains: int = DRAINS) -> Figures:
    """The figures of a reader. A round's figure is the median of its undisturbed drains, or of all if there are none."""
    rounds: list[float] = []
    disturbed: list[int] = []
    for first in range(0, len(took), drains):
        one = took[first : first + drains]
        calm = [ns for ns, others in one if not others]
        if not calm:
            disturbed.append(len(rounds))
        rounds.append(round(statistics.median(calm or [ns for ns, _ in one]), 1))
    figures: Figures = {"ns": 0, "least_ns": min(rounds), "rounds": rounds, "disturbed": disturbed}
    figures["ns"] = round(statistics.median(_calm(figures)), 1)
    return figures


def _calm(*readers: Figures) -> list[Any]:
    """The rounds in which no reader was disturbed, if these are at least ENOUGH, or else all rounds."""
    lines = list(zip(*(one["rounds"] for one in readers), strict=True))
    disturbed = {number for one in readers for number in one["disturbed"]}
    calm = [line for number, line in enumerate(lines) if number not in disturbed]
    chosen = calm if len(calm) >= ENOUGH else lines
    return [line[0] if len(line) == 1 else line[0] / line[1] for line in chosen]


def ratio_of(one: Figures, other: Figures) -> float:
    """The median of the ratios of two readers, round by round."""
    ratio: float = statistics.median(_calm(one, other))
    return round(ratio, 3)


def figures(readers: dict[str, Figures], subject: str, floor: str) -> dict[str, object]:
    """The figures of all readers, with the ratio to the floor, and those of the subject."""
    for one in readers.values():
        one["ratio"] = ratio_of(one, readers[floor])
    return {
        "readers": readers,
        "ns": readers[subject]["ns"],
        "floor_ns": readers[floor]["ns"],
        "ratio": readers[subject]["ratio"],
    }


def note(benchmark: Any, **facts: object) -> None:
    """Add facts, and those of the machine, to `extra_info`."""
    benchmark.extra_info.update(
        kernel=platform.release(),
        cpu=processor(),
        cpus=sorted(os.sched_getaffinity(0)),
        python=platform.python_version(),
        core=_core.reason is None,
        **facts,
    )


def processor() -> str:
    """The CPU's name, as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
