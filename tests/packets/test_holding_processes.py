"""Held objects do not change until the end of a process, in forked children, and if allocations fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
from support.holding import BURST, HOLDERS, SIZE, Cell, cells
from support.paths import TESTS

pytestmark = pytest.mark.usefixtures("devices")

# The allowed memory of a kept packet besides its bytes.
OVERHEAD_MOST = 256
RESIDENT_MOST = BURST * SIZE // 8  # the frames that came with it are eight times as many bytes

# A process takes half a second. So one test uses each backend once, and others only the ring and one more.
EACH_BACKEND = cells("interface-packet_mmap", "packet-recvmmsg", "tap-readv", "tun-os_readv")
TWO = cells("interface-packet_mmap", "tap-readv")

AT_THE_END = {f"{name}: []": 1 for name in HOLDERS if name != "resurrection"}


def lines_of(job: str, cell: str) -> Counter[str]:
    """Run a job in a process that ends normally. Returns its output lines."""
    done = subprocess.run(
        [sys.executable, "-m", "support.holding_process", job, cell],
        cwd=TESTS,
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-1000:]} {done.stderr[-3000:]}"
    return Counter(done.stdout.splitlines())


@EACH_BACKEND
def test_forks_and_the_end_of_the_interpreter(cell: Cell) -> None:
    """Held objects show the sent bytes in forked children, with Python's hooks and without, and in their parent, until the last finalizer."""
    seen = lines_of("forks", cell.name)
    of_each = {"child: []": 2, "child: refused": 2, "status of the child: 0": 2, "parent: []": 2}
    assert seen == Counter(of_each) + Counter(dict.fromkeys(AT_THE_END, 3))


@pytest.mark.counts_memory
@TWO
def test_memory_of_one_kept_packet(cell: Cell) -> None:
    """A kept packet takes its bytes and a bounded overhead, and holds no other memory. Held objects show the sent bytes when the
    interpreter ends.
    """
    seen = lines_of("cost", cell.name)
    cost = {line.partition(":")[0]: int(line.partition(":")[2]) for line in seen if " each: " in line}
    assert SIZE < cost["allocated each"] <= SIZE + OVERHEAD_MOST
    # The C library and Python keep freed memory, up to some megabytes in all.
    assert cost["resident each"] < RESIDENT_MOST
    assert Counter({line: n for line, n in seen.items() if " each: " not in line}) == Counter(AT_THE_END)


@EACH_BACKEND
@pytest.mark.skipif(
    find_spec("_testcapi") is None, reason="needs _testcapi, with which CPython makes an allocation fail"
)
def test_every_allocation_fails_in_turn(cell: Cell) -> None:
    """If any allocation of a receive fails, held objects and later packets show the sent bytes, in order."""
    assert lines_of("no_memory", cell.name) == Counter(
        [
            "out of order: False",
            "before: []",
            "behind: []",
            "enough failures: True",
            "it came to an end: True",
        ]
    )
