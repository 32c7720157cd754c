"""Measures the memory of kept packets: all of many, and one of each few hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from race import note

PACKETS, SHORT_PACKETS = 200_000, 4096
EVERY = 512


@pytest.mark.parametrize("size", [64, 1514])
@pytest.mark.parametrize("source", ["tap", "ring"])
def test_kept(benchmark: Any, source: str, size: int) -> None:
    """Each kind is measured in a process of its own."""
    packets = PACKETS if benchmark.enabled else SHORT_PACKETS
    kept: dict[str, float] = {}

    def measure() -> None:
        few = packets if size == 64 else packets // 8
        for name, who, count, every in (
            ("bytes", "bytes", few, 1),
            ("all", "linkrx", few, 1),
            ("one in 512", "linkrx", packets, EVERY),
        ):
            command = [sys.executable, str(Path(__file__).with_name("kept.py"))]
            command += [who, source, str(size), str(count), str(every)]
            said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            kept[name] = float(said.stdout)

    benchmark.pedantic(measure, rounds=1)
    note(benchmark, source=source, size=size, kept=kept)
