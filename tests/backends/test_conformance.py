"""Runs every check for every backend on every kind of source, and compares the outcomes with the matrix in tests/README.md."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import pytest
from support.paths import TESTS
from support.run import cell_outcomes

import linkrx
from linkrx import testing
from linkrx.testing import rigs
from linkrx.testing.capture_rigs import CAPTURE_RIGS

SUPPORTED = {info.name: info.supported for info in linkrx.backends()}
NAMES = list(SUPPORTED)
ABOUT_LAYOUTS = ("ladder", "truncation")  # for backends that accept the caller's layout
README = TESTS / "README.md"


@cache
def published(label: str) -> dict[str, dict[str, bool]]:
    """A table of README.md: for each row and kind of source, whether there is an x. `label` is the head of its first column."""
    lines = [
        line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")
    ]
    start = next(number for number, line in enumerate(lines) if line[0] == label)
    kinds = lines[start][-len(rigs.PLAIN_RIGS + rigs.DEVICE_RIGS + CAPTURE_RIGS) :]
    table = {}
    for line in lines[start + 2 :]:
        if len(line) != len(lines[start]):
            break
        found = re.search(r"`(?:check_)?(\w+)`", " ".join(line))
        assert found, line
        table[found.group(1)] = {
            kind: mark == "x" for kind, mark in zip(kinds, line[-len(kinds) :], strict=True)
        }
    return table


def cells(kinds: tuple[rigs.MakeRig, ...]) -> list[object]:
    """One parameter for each backend, rig and check."""
    return [
        pytest.param(cell, id=cell.name, marks=[pytest.mark.repeats] if repeats(cell) else [])
        for name in NAMES
        for cell in testing.cells(name, kinds)
    ]


def repeats(cell: testing.Cell) -> bool:
    """Whether the cell has the same outcome as the first check's, because the backend refuses the source or is unsupported."""
    taken = published("backend").get(cell.backend, {}).get(cell.source, True)
    return cell.check is not testing.CHECKS[0] and not (taken and SUPPORTED[cell.backend])


def settle(cell: testing.Cell) -> None:
    """Run a cell, and compare its outcome with the matrix. An unsupported backend must raise BackendUnavailable."""
    info = next(info for info in linkrx.backends() if info.name == cell.backend)
    reason = info.reason
    if reason is None:
        outcome = cell.run()
        cell_outcomes[outcome] += 1
        assert cell.backend in published("backend"), (
            f"{README} has no row for {cell.backend} in its first table"
        )
        if not published("backend")[cell.backend][cell.source]:
            assert outcome == "refused"
        else:
            applies = published("what happens")[cell.row][cell.source]
            if cell.row in ABOUT_LAYOUTS and "buffer_sizes" not in info.honours:
                applies = False
            assert outcome == ("supported" if applies else "inapplicable")
        return
    with cell.make_rig() as rig, pytest.raises(linkrx.BackendUnavailable) as caught:
        rig.open(cell.backend)
    assert reason in str(caught.value)
    cell_outcomes["unavailable"] += 1


@pytest.mark.parametrize("cell", cells(rigs.PLAIN_RIGS))
def test_plain_cell(cell: testing.Cell) -> None:
    """The check passes on a source that needs no privilege, or does not apply, or the backend refuses the source."""
    settle(cell)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("cell", cells(rigs.DEVICE_RIGS))
def test_device_cell(cell: testing.Cell) -> None:
    """The check passes on a source with a network device, or does not apply, or the backend refuses the source."""
    settle(cell)


@pytest.mark.parametrize("cell", cells(CAPTURE_RIGS))
def test_capture_cell(cell: testing.Cell) -> None:
    """The check passes on a capture file or a pipe with one, or does not apply, or the backend refuses the source."""
    settle(cell)


def test_every_backend_is_here() -> None:
    """The backends of the folder are listed, best first, and the matrix has a row for each."""
    assert list(published("backend")) == NAMES


def test_every_check_is_published() -> None:
    """The matrix has one row for each check, in the same order, and links to the file that holds it."""
    rows = {testing.row_of(check): inspect.getsourcefile(check) for check in testing.CHECKS}
    assert list(published("what happens")) == list(rows)
    links = dict(re.findall(r"\[`check_(\w+)`\]\(([^)]+)\)", README.read_text()))
    assert {row: (README.parent / link).resolve() for row, link in links.items()} == {
        row: Path(file or "").resolve() for row, file in rows.items()
    }


def test_every_test_that_is_named_exists() -> None:
    """Each test that README.md links to is in the file that it links to, and each file is there."""
    for path in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).exists(), path
    links = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", README.read_text())
    for name, file in links:
        assert f"def {name}(" in (README.parent / file).read_text(), name
    assert len(links) > 20
