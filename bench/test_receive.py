"""Measures draining a filled queue: every backend, source, size and call against a bare C loop that does the same."""

from __future__ import annotations

from typing import Any

import pytest
from floors import Frames
from queues import SIZES, SOURCES, WAYS, linkrx_reader
from race import race

CELLS = [(source, backend) for source, (_, backends) in SOURCES.items() for backend in backends]
SWEPT = [("tap", "readv"), ("packet", "recvmmsg"), ("ring", "packet_mmap")]
BATCH_SIZES = (1, 8, 32, 128, 256, 512, 1024)


def measure(
    benchmark: Any,
    source: str,
    backend: str,
    size: int,
    way: str,
    neighbours: int = 1,
    **options: Any,
) -> None:
    """Compare one call with its floor."""
    with SOURCES[source][0](Frames(size, neighbours)) as (queue, opened, floor):
        subject = linkrx_reader(queue, opened, WAYS[way], backend=backend, **options)
        race(
            benchmark,
            {"C floor": floor, "linkrx": subject},
            "linkrx",
            source=source,
            backend=backend,
            size=size,
            way=way,
            neighbours=neighbours,
            packets=queue.packets,
            batch_size=options.get("batch_size", "default"),
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("source", "backend"), CELLS)
def test_receive(benchmark: Any, source: str, backend: str, size: int, way: str) -> None:
    """linkrx with default options is compared with the floor of its source."""
    measure(benchmark, source, backend, size, way)


@pytest.mark.parametrize(("source", "backend"), CELLS)
def test_deliver_from_four_neighbours(benchmark: Any, source: str, backend: str) -> None:
    """`deliver` is measured with link addresses that change with every packet."""
    measure(benchmark, source, backend, 64, "deliver", neighbours=4)


@pytest.mark.parametrize("way", ["columns", "deliver"])
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize(("source", "backend"), SWEPT)
def test_batch_size(benchmark: Any, source: str, backend: str, batch_size: int, way: str) -> None:
    """64-byte frames are received with other batch sizes."""
    measure(benchmark, source, backend, 64, way, batch_size=batch_size)
