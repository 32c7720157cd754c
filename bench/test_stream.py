"""Measures a TCP connection from the kernel to linkrx at full speed: megabytes per second, and processor time."""

from __future__ import annotations

import os
import random
import resource
import statistics
import time
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
from race import note
from support.tcp_sink import MODES, stream

from linkrx.testing.waiting import PATIENCE

MEGABYTE = 1_000_000
STREAM = 50 * MEGABYTE
ROUNDS = 5
SUBJECT = "segment"


class Cost(NamedTuple):
    """The cost of one stream: megabytes per second, and microseconds of processor time per megabyte.

    The time of the receiver's thread includes the kernel's sending after each acknowledgement.
    """

    mb_per_s: float
    user_us: float
    system_us: float
    both_ends_us: float


def measured(mode: str, version: int) -> Cost:
    """Measure one connection, received in this thread. The other end is in another thread."""
    with stream(mode, version, STREAM, timestamps=True) as (rx, sink):
        start, usage, cpu = (
            time.perf_counter(),
            resource.getrusage(resource.RUSAGE_THREAD),
            time.process_time(),
        )
        for batch in rx.batches(PATIENCE):
            sink.take(batch)
            if sink.finished:
                break
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        used = resource.getrusage(resource.RUSAGE_THREAD)
    assert (sink.received, sink.ahead) == (STREAM, 0)
    megabytes = STREAM / MEGABYTE
    return Cost(
        megabytes / took,
        (used.ru_utime - usage.ru_utime) * 1e6 / megabytes,
        (used.ru_stime - usage.ru_stime) * 1e6 / megabytes,
        cpu * 1e6 / megabytes,
    )


@pytest.mark.parametrize("version", [4, 6])
def test_stream(benchmark: Any, version: int) -> None:
    """A stream is received segmented by the kernel, segmented by linkrx, and whole, in random order, and every byte is checked."""
    processors = os.sched_getaffinity(0)
    costs: dict[str, list[Cost]] = defaultdict(list)

    def one(mode: str) -> None:
        costs[mode].append(measured(mode, version))

    def others() -> None:
        modes = [mode for mode in MODES if mode != SUBJECT]
        random.shuffle(modes)
        for mode in modes:
            one(mode)

    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # sender and receiver side by side
    try:
        benchmark.pedantic(one, args=(SUBJECT,), setup=others, rounds=ROUNDS, warmup_rounds=1)
    finally:
        os.sched_setaffinity(0, processors)
    streams = {
        mode: {
            name: round(statistics.median(values), 1)
            for name, values in zip(Cost._fields, zip(*rounds, strict=True), strict=True)
        }
        for mode, rounds in costs.items()
    }
    note(benchmark, transport=f"TCP, IPv{version}", streams=streams)
