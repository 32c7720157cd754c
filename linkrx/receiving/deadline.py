"""Timeouts as moments on the monotonic clock."""

from __future__ import annotations

import time

# Seconds between two reads while packets are held back, as in _core/types/hold.c.
HOLD = 0.001


def deadline_after(timeout: float | None, name: str = "timeout") -> float | None:
    """The moment on the monotonic clock at which a timeout ends; None for never. `name` is that of the argument.

    Raises TypeError and ValueError for a value that is no time.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"{name}={timeout!r}: give seconds, or None for no limit")
    try:
        seconds = float(timeout)
    except OverflowError:  # an int of more than 308 digits
        seconds = -1
    if not seconds >= 0:  # nan neither
        raise ValueError(f"{name}={timeout!r}: give seconds, or None for no limit")
    return time.monotonic() + seconds


def earlier(one: float | None, other: float | None) -> float | None:
    """The earlier of two deadlines. None is never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def seconds_left(deadline: float | None) -> float | None:
    """The seconds until a deadline, 0 after it; None for never."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
