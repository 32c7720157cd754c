"""Measures a stream at a fixed rate on a TAP: the receiver's processor time per packet. It may sleep in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from floors import Frames
from paced import Stream, in_loop, polled, polled_in_c, run, sending
from peers import Field
from queues import tap
from race import Reader, race
from world import IN_C

import linkrx

SIZE = 64
SECONDS, SHORT_SECONDS = 0.2, 0.02  # of a stream
LATENCY, LATENCY_RATE = 0.0005, 50_000
# Streams of each reader in a round. At a low rate a packet costs mostly what the kernel needs to wake a sleeping processor, which varies.
DRAINS = {5_000: 3, 50_000: 1, 200_000: 1}


@pytest.mark.parametrize("rate", DRAINS)
def test_paced(benchmark: Any, processors: list[int], rate: int) -> None:
    """Every sent packet is received: by hand, by `run()`, and under asyncio."""
    if len(processors) < 2:
        pytest.skip("to send on another processor takes two")
    packets = int(rate * (SECONDS if benchmark.enabled else SHORT_SECONDS))
    field = Field()
    with ExitStack() as stack:

        def add(name: str, make: Callable[[Stream, linkrx.TunTap], Reader]) -> None:
            queue, source, _ = stack.enter_context(tap(Frames(SIZE)))
            assert isinstance(source, linkrx.TunTap)
            sender = stack.enter_context(sending(queue, processors[0]))
            stream = Stream(queue, source, sender, packets, rate)
            field.add(name, lambda: make(stream, source))

        add("poll, os.read", lambda stream, source: polled(stream, source.fileno()))
        add(IN_C, lambda stream, source: polled_in_c(stream, source.fileno()))
        add("run, readv", partial(run, backend="readv"))
        add("run, os_readv", partial(run, backend="os_readv"))
        if rate == LATENCY_RATE:
            add("run, latency=0.0005", partial(run, latency=LATENCY))
        add("add_reader, os.read", partial(in_loop, way="os.read"))
        add("add_reader, drain", partial(in_loop, way="drain"))
        add("async for", partial(in_loop, way="async for"))
        race(
            benchmark,
            field.readers,
            "run, readv",
            floor="poll, os.read",
            per_round=DRAINS[rate],
            warmup=1,
            rate=rate,
            size=SIZE,
            packets=packets,
            left_out=field.left_out,
        )
