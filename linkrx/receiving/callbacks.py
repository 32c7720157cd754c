"""The methods of `linkrx.receiving.reception` that a receiver, its base class, calls when something rare has happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from linkrx.receiving.wakeup import Wakeup


class Callbacks:
    """`_core/types/receive.c` says what each of them does."""

    _wakeup: Wakeup
    _fill: Callable[[Any, int], int]
    _without_hangup: Callable[[int], int]
    _handle_error: Callable[[], None]
    _over: Callable[[], bool]
    _look_at_link: Callable[[], None]
    _look_at_drops: Callable[[], float]
    _look_at_owner: Callable[[], None]
    _resume_source: Callable[[], None]
    _flush_limits: Callable[[], tuple[int, float]]
    _sleep_until_flushed: Callable[[float], bool]
    _pause_source: Callable[[], None]
    _set_readable: Callable[[], None]
    _disarm: Callable[[], None]
    _refuse: Callable[[bool], NoReturn]
    _last_left: Callable[[], None]
    _release_all: Callable[[], None]
    _without_deliver: Callable[[], NoReturn]
    _raise_ended: Callable[[], NoReturn]
    end: Any
