"""The waits of checks and tests last up to PATIENCE, measured in turns."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from linkrx.testing import waiting


def clock(*readings: float) -> SimpleNamespace:
    """A module `time` whose clock shows these readings."""
    shown: Iterator[float] = iter(readings)
    return SimpleNamespace(monotonic=lambda: next(shown))


def test_a_machine_that_stood_still_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps by an hour during a turn does not end the wait."""
    monkeypatch.setattr(waiting, "time", clock(0, 1, 3601, 3602))
    turns: list[None] = []
    turns.extend(waiting.patiently(lambda: len(turns) == 3))
    assert len(turns) == 3


@pytest.mark.parametrize("turn", [0.5, 3.0, 60.0])
def test_a_condition_that_never_holds(monkeypatch: pytest.MonkeyPatch, turn: float) -> None:
    """The wait ends with an AssertionError after PATIENCE seconds, counted in turns of at most TURN_MOST."""
    monkeypatch.setattr(waiting, "time", clock(*(number * turn for number in range(100))))
    turns = 0
    with pytest.raises(AssertionError, match="did not hold within 30 s"):
        for _ in waiting.patiently(lambda: False):
            turns += 1
    assert turns == waiting.PATIENCE / min(turn, waiting.TURN_MOST) - 1
