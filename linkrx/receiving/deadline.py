"""Timeouts as moments on the monotonic clock."""

from __future__ import annotations

import time


def deadline_after(timeout: float | None) -> float | None:
    """When a timeout ends, on the monotonic clock; None for never. Raises TypeError and ValueError for no timeout."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout={timeout!r}: give seconds, or None to wait for ever")
    if not timeout >= 0:  # nan neither
        raise ValueError(f"timeout={timeout!r}: give seconds, or None to wait for ever")
    return time.monotonic() + timeout


def seconds_left(deadline: float | None) -> float | None:
    """The time until a deadline, 0 behind it; None for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
