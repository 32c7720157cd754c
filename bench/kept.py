"""Measures the memory of kept packets, in a process of its own: `kept.py READER SOURCE SIZE PACKETS EVERY`.

READER is `linkrx` or `bytes` (a loop by hand, on the same kind of source). It keeps every EVERY-th packet. It prints the growth of
the process in bytes per kept packet. That counts anonymous memory, which does not include the kernel's ring.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from floors import Frames
from peers import ROOM
from queues import SOURCES

import linkrx

WARM = 3  # fills of which no packet is kept
BALLAST = 2 * 1024 * 1024  # bytes


def anonymous() -> int:
    """The anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError("no RssAnon in /proc/self/status")


def ballast(packet: Any) -> list[Any]:
    """Copies of a packet, until they need new memory. What was freed since the start of the process would hide the kept ones."""
    made, enough = [], anonymous() + BALLAST
    while anonymous() < enough:
        for _ in range(1000):
            made += [copy.copy(packet), bytes(bytearray(packet))]  # copies share their bytes
    return made


def main() -> None:
    """Run the command."""
    who, name = sys.argv[1:3]
    size, packets, every = map(int, sys.argv[3:])
    kept: list[Any] = []
    seen, keeping = 0, False
    some: list[Any] = []

    def take(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
        nonlocal seen
        seen += 1
        if not some:
            some.append(packet)
        if keeping and seen % every == 0:
            kept.append(packet)

    with SOURCES["packet" if who == "bytes" and name == "ring" else name][0](Frames(size)) as (
        queue,
        source,
        _,
    ):

        def fill_and_drain(drain: Callable[[], object]) -> None:
            queue.fill()
            until = seen + queue.packets
            while seen < until:
                drain()

        def run(drain: Callable[[], object]) -> int:
            nonlocal keeping
            for _ in range(WARM):
                fill_and_drain(drain)
            taken = ballast(some[0])
            before, keeping = anonymous(), True
            while len(kept) < packets // every:
                fill_and_drain(drain)
            grown = anonymous() - before
            assert taken
            return grown

        if who == "linkrx":
            with linkrx.open(source, take) as rx:
                grown = run(rx.drain)
        else:
            assert not isinstance(source, (int, str))
            fd = source.fileno()
            grown = run(lambda: take(None, None, 0, os.read(fd, ROOM)))
        assert all(len(packet) == size for packet in kept)
        print(round(grown / len(kept), 1))


if __name__ == "__main__":
    main()
