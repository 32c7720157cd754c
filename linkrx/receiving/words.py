"""What a receiver calls of its subclass, `linkrx.receiving.reception`, where something rare has happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from linkrx.receiving.wakeup import Wakeup


class Words:
    """The names that `_core/types/receive.c` lists."""

    _wakeup: Wakeup
    _fill: Callable[[Any], int]
    _without_hangup: Callable[[int], int]
    _handle_error: Callable[[], None]
    _over: Callable[[], bool]
    _look_at_link: Callable[[], None]
    _look_at_drops: Callable[[], float]
    _look_at_owner: Callable[[], None]
    _listen: Callable[[], None]
    _flush_limits: Callable[[], tuple[int, float]]
    _vain: Callable[[], None]
    _show: Callable[[], None]
    _hush: Callable[[], None]
    _refuse: Callable[[bool], NoReturn]
    _left_by_all: Callable[[], None]
    _release_all: Callable[[], None]
    _without_deliver: Callable[[], NoReturn]
    _raise_ended: Callable[[], NoReturn]
    end: Any
