"""Measures a packet that comes alone and is queued: every call and backend against the loop by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from floors import Frames
from lone import BY_HAND, Alone, by_hand, by_linkrx
from queues import SOURCES
from race import race

SIZE = 64
PACKETS, SHORT_PACKETS = 200, 8  # in a drain


@pytest.mark.parametrize("source", ["tap", "packet"])
def test_lone(benchmark: Any, source: str) -> None:
    """Each reader receives from its own queue."""
    make, backends = SOURCES[source]
    packets = PACKETS if benchmark.enabled else SHORT_PACKETS
    with ExitStack() as stack:

        def own() -> tuple[Alone, Any]:
            queue, opened, _ = stack.enter_context(make(Frames(SIZE)))
            return Alone(queue.frames, queue.injector, packets), opened

        readers = {name: by_hand(*own(), name) for name in dict.fromkeys(BY_HAND.values())}
        for backend in backends:
            readers |= {f"{way}, {backend}": by_linkrx(*own(), way, backend) for way in BY_HAND}
        race(
            benchmark,
            readers,
            f"dispatch, {backends[0]}",
            floor="os.read",
            source=source,
            size=SIZE,
            packets=packets,
            by_hand=BY_HAND,
        )
