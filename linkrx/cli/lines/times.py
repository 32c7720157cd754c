"""Formats timestamps, as chosen by `-t`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache

Stamp = Callable[
    ["int | None"], str
]  # from nanoseconds since 1970 to a text that ends with a space or is empty

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache(64)
def _date(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


@lru_cache(64)
def _utc(second: int) -> str:
    return (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


def clock() -> Stamp:
    """Without `-t`: the local time of day."""
    last, shown = -1, ""

    def at(moment: int | None) -> str:
        nonlocal last, shown
        if moment is None:
            return "--:--:--.------ "
        microseconds = moment // 1000
        second = microseconds // 1_000_000
        if second != last:
            last, shown = second, time.strftime("%H:%M:%S", time.localtime(second))
        return f"{shown}.{microseconds % 1_000_000:06d} "

    return at


def nothing(_moment: int | None) -> str:
    """`-t`: no time."""
    return ""


def since_1970(moment: int | None) -> str:
    """`-tt`: seconds since 1970."""
    if moment is None:
        return "-.------ "
    second, rest = divmod(moment, 1_000_000_000)
    return f"{second}.{rest // 1000:06d} "


def since_last() -> Stamp:
    """`-ttt`: the time since the previous packet."""
    last: int | None = None

    def since(moment: int | None) -> str:
        nonlocal last
        if moment is None:
            return " --:--:--.------ "
        passed = 0 if last is None else moment - last
        last = moment
        seconds, rest = divmod(abs(passed), 1_000_000_000)
        sign = "-" if passed < 0 else " "
        return f"{sign}{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{rest // 1000:06d} "

    return since


def date(moment: int | None) -> str:
    """`-tttt`: date and time, local."""
    if moment is None:
        return "----------  --:--:--.------ "
    second, rest = divmod(moment, 1_000_000_000)
    return f"{_date(second)}.{rest // 1000:06d} "


def iso(moment: int | None) -> str | None:
    """UTC with nanoseconds in ISO 8601. None if there is no timestamp."""
    if moment is None:
        return None
    second, rest = divmod(moment, 1_000_000_000)
    return f"{_utc(second)}.{rest:09d}Z"


def stamp(asked: int) -> Stamp:
    """The format for the number of times that `-t` was given."""
    return (clock(), nothing, since_1970, since_last(), date)[asked]
