"""Runs a few seconds of the soak, `python bench/soak.py`, to test the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("source", ["tap", "tun", "packet", "cooked", "ring", "borrowed"])
def test_every_frame_is_accounted_for(source: str) -> None:
    """A short soak, in its own process and namespace, finds no error."""
    soak = [sys.executable, str(Path(__file__).with_name("soak.py")), "--sources", source]
    # The benchmarks are tied to one processor. A soak needs another for the sender.
    every = range(os.cpu_count() or 1)
    done = subprocess.run(
        [*soak, "--minutes", "0.05", "--packets", "50000", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, every),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every frame is accounted for." in done.stdout
