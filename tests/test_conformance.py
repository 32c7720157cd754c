"""Every backend on every kind of source: each cell asserts support or refusal."""

from __future__ import annotations

import pytest
from conftest import cell_outcomes

import linkrx
from linkrx import rigs, testing

NAMES = [info.name for info in linkrx.backends()]


def cells(kinds: tuple[rigs.MakeRig, ...]) -> list[object]:
    """One parameter for each backend, rig and check."""
    return [pytest.param(cell, id=cell.name) for name in NAMES for cell in testing.cells(name, kinds)]


def settle(cell: testing.Cell) -> None:
    """Run a cell, and see that a backend which this host lacks says so."""
    reason = next(info.reason for info in linkrx.backends() if info.name == cell.backend)
    if reason is None:
        cell_outcomes[cell.run()] += 1
        return
    with cell.make_rig() as rig, pytest.raises(linkrx.BackendUnavailable) as caught:
        rig.open(cell.backend)
    assert reason in str(caught.value)
    cell_outcomes["unavailable"] += 1


@pytest.mark.parametrize("cell", cells(rigs.PLAIN_RIGS))
def test_plain_cell(cell: testing.Cell) -> None:
    """The backend passes the check on a source that needs no privilege, or refuses the source and says why."""
    settle(cell)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("cell", cells(rigs.DEVICE_RIGS))
def test_device_cell(cell: testing.Cell) -> None:
    """The backend passes the check on a source behind a network device, or refuses the source and says why."""
    settle(cell)


def test_every_backend_is_here() -> None:
    """The three backends of the folder are listed, best first."""
    assert NAMES == ["recvmmsg", "readv", "os_readv"]
