"""Who is inside a dispatcher."""

from __future__ import annotations

import inspect
import threading
from types import FunctionType
from typing import cast


class Claim:
    """Of a call, of a thread. Its variable `claim` has it."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def is_live(self, function: object) -> bool:
        """Whether the call of `function` that made it, in this thread, still runs.

        CPython 3.12 can skip a `finally` when a second signal handler raises as it is entered.
        """
        code = cast(FunctionType, function).__code__
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get("claim") is self:
                return True
            frame = frame.f_back
        return False
