"""Readers that drain filled queues side by side, round by round in random order, and what is asserted of each."""

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
DRAINS = 5  # of each reader in a round; their median is its figure for the round
ENOUGH = 3  # undisturbed rounds to take a median of, or else all rounds count
WARMUP = 3  # drains before the first round
CHECKED = 2  # drains in which all bytes are looked at, before any is timed

Buffer = bytes | bytearray | memoryview
Drain = Callable[[], int]
Figures = dict[str, Any]  # of a reader, see `race`
Drained = tuple[float, bool]  # ns per packet, and whether another process had the processor meanwhile


class Sendable(Protocol):
    """What a queue is filled with: `floors.Frames`."""

    size: int

    def send(self, injector: socket.socket, packets: int) -> int:
        """Send so many; returns those that the kernel took."""

    def numbered(self, packets: int) -> Iterator[bytes]:
        """What `send` sends."""

    def check(self, packets: int) -> int:
        """The checksum of that many, in order."""


@dataclass
class Queue:
    """What readers drain. A `shared` one is an interface on which each reader has a socket: one fill reaches all."""

    frames: Sendable
    injector: socket.socket
    packets: int
    shared: bool = False
    settle: float = 0.0  # seconds after which a ring has closed the block that the last frames are in

    def fill(self) -> None:
        """Put the frames in, untimed."""
        sent = self.frames.send(self.injector, self.packets)
        assert sent == self.packets, f"{sent} of {self.packets} frames fit into the queue"
        until = time.monotonic() + self.settle
        while time.monotonic() < until:
            pass  # awake: what a sleep does to the caches is not what is measured here


class Check:
    """What a reader was given: packets, bytes, and the Adler-32 of all the bytes in order."""

    def __init__(self) -> None:
        self.set(0, 0, 1)

    def set(self, packets: int, size: int, check: int) -> None:
        """What someone else has counted."""
        self.packets, self.bytes, self.check = packets, size, check

    def __call__(self, frame: Buffer) -> None:
        """Another frame."""
        self.packets += 1
        self.bytes += len(frame)
        self.check = zlib.adler32(frame, self.check)


@dataclass
class Reader:
    """One way to drain a queue.

    `open` is given a Check, to which all that is received is to be shown, or None when it is the time that is wanted;
    the context it returns yields the function that drains the queue once and returns the number of packets.
    """

    queue: Queue
    open: Callable[[Check | None], AbstractContextManager[Drain]]


class OwnClock:
    """A Drain in another process, which knows better how long it took and whether it was disturbed."""

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
    """Measure readers beside each other; `subject` is the one that pytest-benchmark gets the time of.

    There are ROUNDS rounds. In a round each reader drains its queue `per_round` times, in turn with all others and in
    random order; the median of these is its figure for the round. Filling is not timed. What is drained must be what
    was put in: the number every time, in CHECKED drains before also the order and every byte. A drain in which the
    kernel took the processor away for another process does not count, unless all of its round are such; such a round
    does not count where ENOUGH others are left.

    The figures are in `extra_info`. `readers` has for each the nanoseconds per packet of every round, which of these were
    disturbed, their median, the least, and the median of the ratios to `floor` in the same round. `ns`, `floor_ns` and
    `ratio` are the subject's.
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
    """Drain CHECKED fills and look at every byte."""
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
    """How often the kernel has taken the processor away from this thread for another."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def rounds_of(took: list[Drained], drains: int = DRAINS) -> Figures:
    """The figures of a reader. Of a round: the median of its drains that nobody disturbed, or else of all."""
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
    """The rounds in which none of them was disturbed, where ENOUGH are left, or else all: of two, their ratios."""
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
    """Of all readers, with the ratio to the floor; and those of the subject."""
    for one in readers.values():
        one["ratio"] = ratio_of(one, readers[floor])
    return {
        "readers": readers,
        "ns": readers[subject]["ns"],
        "floor_ns": readers[floor]["ns"],
        "ratio": readers[subject]["ratio"],
    }


def note(benchmark: Any, **facts: object) -> None:
    """Write facts, and those of the machine, beside the figures."""
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
