"""Timeouts as moments on the monotonic clock."""

from __future__ import annotations

import time


def deadline_after(timeout: float | None, name: str = "timeout") -> float | None:
    """When a timeout, or a limit of another name, ends on the monotonic clock; None for never. Raises TypeError and
    ValueError for what is no time.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"{name}={timeout!r}: give seconds, or None for no limit")
    if not timeout >= 0:  # nan neither
        raise ValueError(f"{name}={timeout!r}: give seconds, or None for no limit")
    return time.monotonic() + timeout


def earlier(one: float | None, other: float | None) -> float | None:
    """The earlier of two deadlines, either of which may be never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def seconds_left(deadline: float | None) -> float | None:
    """The time until a deadline, 0 behind it; None for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
