"""What a user holds stays true to the end of a process, in the children that it forks, and where memory is short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
from support.holding import HOLDERS, SIZE, Cell, cells
from support.paths import TESTS

pytestmark = pytest.mark.usefixtures("devices")

# What a packet that is kept by itself may take besides its bytes.
OVERHEAD_MOST = 256

# A process takes half a second: each backend once, and the ring and another where that says enough.
EACH_BACKEND = cells("interface-packet_mmap", "packet-recvmmsg", "tap-readv", "tun-os_readv")
TWO = cells("interface-packet_mmap", "tap-readv")

AT_THE_END = {f"{name}: []": 1 for name in HOLDERS if name != "resurrection"}


def lines_of(job: str, cell: str) -> Counter[str]:
    """What a process has written that did a job, and came to its ordinary end."""
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
    """Children that fork made, with Python's hooks and without, and their parent, see what was sent, to the last finalizer."""
    seen = lines_of("forks", cell.name)
    of_each = {"child: []": 2, "child: refused": 2, "status of the child: 0": 2, "parent: []": 2}
    assert seen == Counter(of_each) + Counter(dict.fromkeys(AT_THE_END, 3))


@pytest.mark.counts_memory
@TWO
def test_what_one_kept_packet_costs(cell: Cell) -> None:
    """A packet takes its bytes and a bounded overhead; what is held when the interpreter ends shows what was sent."""
    seen = lines_of("cost", cell.name)
    (cost,) = [int(line.removeprefix("bytes each: ")) for line in seen if line.startswith("bytes each")]
    assert cost <= SIZE + OVERHEAD_MOST
    assert seen - Counter([f"bytes each: {cost}"]) == Counter(AT_THE_END)


@EACH_BACKEND
@pytest.mark.skipif(
    find_spec("_testcapi") is None, reason="needs _testcapi, with which CPython makes an allocation fail"
)
def test_every_allocation_fails_in_turn(cell: Cell) -> None:
    """Whichever allocation of a receive fails, what was held and what comes behind it shows what was sent, in order."""
    assert lines_of("no_memory", cell.name) == Counter(
        [
            "out of order: False",
            "before: []",
            "behind: []",
            "enough failures: True",
            "it came to an end: True",
        ]
    )
