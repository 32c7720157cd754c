"""Measures opening and closing, waking up, and importing, in microseconds. On a ring the shortest wake-up is `latency`."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from floors import Frames, receive_singly
from queues import SOURCES
from race import note

import linkrx

CELLS = [(source, backend) for source, (_, backends) in SOURCES.items() for backend in backends]
ROUNDS = 50
SINGLE = 20  # packets in a round
PAUSE_NS = (300_000, 900_000)  # pause before each packet, in which the receiver falls asleep
WAKE_ROUNDS = 15
IMPORTS = 7
LIBRARIES = {
    "nothing": "pass",
    "linkrx": "import linkrx",
    "pcapy-ng": "import pcapy",
    "python-pytun": "import pytun",
    "scapy": "import scapy.all",
}


def report(
    benchmark: Any, took_us: dict[str, list[float]], subject: str, floor: str, **facts: object
) -> None:
    """Report the medians in microseconds, and the ratio of the subject to the floor."""
    medians = {name: round(statistics.median(took), 1) for name, took in took_us.items()}
    note(benchmark, cost_us=medians, ratio=round(medians[subject] / medians[floor], 3), **facts)


@pytest.mark.parametrize(("source", "backend"), CELLS)
def test_open_and_close(benchmark: Any, source: str, backend: str) -> None:
    """Opening and closing a dispatcher on an existing source is timed, including the probe and the choice."""
    took: list[float] = []
    with SOURCES[source][0](Frames(64)) as (_, opened, _):

        def once() -> None:
            start = time.perf_counter_ns()
            linkrx.open(opened, backend=backend).close()
            took.append((time.perf_counter_ns() - start) / 1000)

        benchmark.pedantic(once, rounds=ROUNDS)
    note(
        benchmark,
        source=source,
        backend=backend,
        cost="open and close",
        cost_us={"linkrx": round(statistics.median(took), 1)},
    )


@pytest.mark.parametrize(("source", "backend"), CELLS)
def test_wake_up(benchmark: Any, processors: list[int], source: str, backend: str) -> None:
    """The time from send() on another processor to the return of recv(), which sleeps in between, is compared with poll() and read() in C."""
    if len(processors) < 2:
        pytest.skip("waking up from another processor takes two")
    chance = random.Random(1)
    rounds: dict[str, list[float]] = {"C floor": [], "linkrx": []}
    # A ring needs time until its timer closes a block. poll() and read() are the floor of all other sources.
    floor_of = SOURCES["packet" if source == "ring" else source][0]
    with (
        SOURCES[source][0](Frames(64)) as (queue, opened, _),
        floor_of(Frames(64)) as (floor_queue, floor_opened, _),
        linkrx.open(opened, backend=backend) as rx,
    ):
        assert not isinstance(floor_opened, (int, str))
        fd = floor_opened.fileno()

        def receive() -> list[int]:
            arrived = []
            for _ in range(SINGLE):
                rx.recv(10)
                arrived.append(time.monotonic_ns())
            return arrived

        def one(name: str) -> None:
            send = queue if name == "linkrx" else floor_queue
            sent: list[int] = []
            pauses = [chance.randint(*PAUSE_NS) for _ in range(SINGLE)]

            def sender() -> None:
                os.sched_setaffinity(0, {processors[0]})  # of this thread
                sent.extend(Frames(64).send_singly(send.injector, pauses))

            thread = threading.Thread(target=sender)
            thread.start()
            arrived = receive() if name == "linkrx" else receive_singly(fd, SINGLE)
            thread.join()
            waits = [there - gone for gone, there in zip(sent, arrived, strict=True)]
            assert min(waits) > 0
            rounds[name].append(statistics.median(waits) / 1000)

        def both() -> None:
            for name in random.sample(list(rounds), 2):
                one(name)

        benchmark.pedantic(both, rounds=WAKE_ROUNDS)
    report(
        benchmark, rounds, "linkrx", "C floor", source=source, backend=backend, cost="wake-up", packets=SINGLE
    )


def test_import(benchmark: Any) -> None:
    """A Python process that imports the library and ends is compared with one that imports nothing, in random order."""
    programs = {name: code for name, code in LIBRARIES.items() if runs(code)}
    left_out = {name: "not installed" for name in LIBRARIES if name not in programs}
    took: dict[str, list[float]] = {name: [] for name in programs}

    def all_of_them() -> None:
        for name in random.sample(list(programs), len(programs)):
            start = time.perf_counter_ns()
            run(programs[name])
            took[name].append((time.perf_counter_ns() - start) / 1000)

    benchmark.pedantic(all_of_them, rounds=IMPORTS)
    report(benchmark, took, "linkrx", "nothing", cost="import", left_out=left_out)


def run(code: str) -> int:
    """Run a Python process. Returns its exit status."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def runs(code: str) -> bool:
    """Whether a library can be imported here."""
    return run(code) == 0
