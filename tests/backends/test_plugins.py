"""A backend is added by a file in the folder, or by a distribution's entry point, without another edit."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import linkrx
from linkrx.sources.options import OpenOptions, Options

PACKAGE = Path(linkrx.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def recipe() -> str:
    """The toy backend in CONTRIBUTING.md."""
    found = re.search(r"```python\n(\"\"\"One packet.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert found, "CONTRIBUTING.md has no toy backend"
    return found.group(1)


def run(program: str, path: Path) -> str:
    """Run a program with `path` first in its module path, and return its output lines."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(path), "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


USE = """
import socket, linkrx
from linkrx import testing
from linkrx.testing import rigs
assert linkrx.__file__.startswith({path!r}), linkrx.__file__
receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
with linkrx.open(receiver) as rx:
    print(rx.backend, rx.choice.explain().splitlines()[0].split()[:2])
print([(info.name, info.supported) for info in linkrx.backends()][0])
"""

CONFORM = """
outcomes = [cell.run() for cell in testing.cells("toy", rigs.PLAIN_RIGS)]
print(len(outcomes), {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
"""


def test_a_file_dropped_into_backends(tmp_path: Path) -> None:
    """The recipe of CONTRIBUTING.md, saved as backends/toy.py, is listed, chosen, and passes the conformance checks."""
    shutil.copytree(PACKAGE, tmp_path / "linkrx", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "linkrx" / "backends" / "toy.py").write_text(recipe())
    lines = run(USE.format(path=str(tmp_path)) + CONFORM, tmp_path).splitlines()
    assert lines[:2] == ["toy ['toy', 'chosen']", "('toy', True)"]
    count, _, outcomes = lines[2].partition(" ")
    outcomes_of = ast.literal_eval(outcomes)
    assert set(outcomes_of) == {"supported", "inapplicable", "refused"}
    # Two rigs of seven are pipes, which the recipe refuses.
    assert outcomes_of["refused"] == 2 * int(count) // 7


ON_DEVICES = """
from linkrx import testing
from linkrx.testing import rigs
for cell in testing.cells("toy", rigs.DEVICE_RIGS):
    if cell.row in ("delivery", "odd_packets"):
        print(cell.source, cell.row, cell.run())
"""


@pytest.mark.usefixtures("devices")
def test_the_recipe_on_devices(tmp_path: Path) -> None:
    """The recipe accepts packet sockets with link headers and passes the checks on them. It refuses the others."""
    shutil.copytree(PACKAGE, tmp_path / "linkrx", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "linkrx" / "backends" / "toy.py").write_text(recipe())
    outcomes = [line.split() for line in run(ON_DEVICES, tmp_path).splitlines()]
    taken = {source for source, check, outcome in outcomes if (check, outcome) == ("delivery", "supported")}
    assert taken == {"interface", "packet", "packet_segment"}
    assert {outcome for source, _, outcome in outcomes if source not in taken} == {"refused"}


def test_an_entry_point(tmp_path: Path) -> None:
    """The same file works in another distribution with an entry point in the group linkrx.backends."""
    (tmp_path / "toy_backend.py").write_text(recipe())
    described = tmp_path / "toy_backend-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[linkrx.backends]\ntoy = toy_backend:Toy\nbroken = toy_backend:Missing\n"
    )
    program = USE.format(path=str(PACKAGE.parent))
    lines = run(program, tmp_path).splitlines()
    assert lines == ["toy ['toy', 'chosen']", "('toy', True)"]


def test_a_broken_entry_point_is_reported(tmp_path: Path) -> None:
    """A plug-in that cannot be loaded is logged with its traceback, and linkrx works without it."""
    described = tmp_path / "broken-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[linkrx.backends]\nbroken = nowhere:Broken\n")
    program = """
import logging, sys, linkrx
logging.basicConfig(stream=sys.stdout)
print([info.name for info in linkrx.backends()])
"""
    said = run(program, tmp_path)
    assert "the backend 'broken' of nowhere:Broken could not be loaded" in said
    assert "ModuleNotFoundError" in said
    assert said.splitlines()[-1] == "['packet_mmap', 'recvmmsg', 'readv', 'os_readv', 'capture_file']"


def test_an_entry_point_that_is_no_backend(tmp_path: Path) -> None:
    """An entry point that is no backend is logged and ignored."""
    described = tmp_path / "odd-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[linkrx.backends]\nodd = os:getpid\n")
    program = """
import logging, sys, linkrx
logging.basicConfig(stream=sys.stdout)
print([info.name for info in linkrx.backends()])
"""
    said = run(program, tmp_path).splitlines()
    assert "the backend 'odd' of os:getpid is left out: it is no Backend" in said[0]
    assert said[-1] == "['packet_mmap', 'recvmmsg', 'readv', 'os_readv', 'capture_file']"


def test_the_keywords_of_open_are_the_options() -> None:
    """The keywords of open, as type checkers see them, are the fields of Options."""
    assert set(OpenOptions.__annotations__) == set(Options.__dataclass_fields__)
    with pytest.raises(TypeError, match="no option 'batchsize'; it has batch_size, ethernet"):
        linkrx.open(0, batchsize=3)  # type: ignore[call-arg]
