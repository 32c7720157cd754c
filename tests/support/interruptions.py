"""Raises an exception at each point in turn where CPython may run a signal handler."""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable
from types import FrameType

from support import paths

TESTS = f"{paths.TESTS}/"


class Interrupted(Exception):
    """The exception of the simulated signal handler."""


class After:
    """Raises Interrupted once inside `with`: at the n-th point where CPython may run a signal handler.

    Such a point is at the start of a Python function, after a call of any other callable, types included, and after a backward
    jump. It counts points in all functions that the test calls, and in those that they call, but not in `deliver`.
    """

    def __init__(self, points: int, error: type[Exception] = Interrupted) -> None:
        self.left = points
        self.error = error
        self.raised = False

    def enter(self, frame: FrameType, _event: str, _argument: object) -> Steps | None:
        """The trace function for sys.settrace()."""
        caller = frame.f_back
        if caller is not None and isinstance(caller.f_trace, Steps):
            caller.f_trace.entered.append(frame.f_code.co_name)
        if is_of_tests(frame) or is_lost(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return Steps(self, -1 if at_the_start(frame) else frame.f_lasti)

    def count(self) -> None:
        """Count a point, and raise at the last one."""
        if not self.left:
            sys.settrace(None)
            self.raised = True
            raise self.error
        self.left -= 1

    def __enter__(self) -> None:
        gc.disable()  # else finalizers of other objects would run
        sys.settrace(self.enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        gc.enable()


class Acting(After):
    """Calls a function at the point where After raises."""

    def __init__(self, points: int, act: Callable[[], object]) -> None:
        super().__init__(points)
        self.act = act

    def count(self) -> None:
        """Count a point, and call the function at the last one."""
        if self.left:
            self.left -= 1
        elif not self.raised:
            sys.settrace(None)
            self.raised = True
            self.act()


class Steps:
    """Traces the instructions of one frame. `before` is the previous instruction, `entered` the Python functions that it called."""

    def __init__(self, after: After, before: int) -> None:
        self.after = after
        self.before = before  # -1 at the start; in a resumed generator, where it was suspended
        self.entered: list[str] = []
        self.failed = False  # the instruction raised: CPython does not check for signals after it

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Steps:
        if event == "exception":
            self.failed = True
        elif event == "opcode":
            failed, self.failed = self.failed, False
            before, self.before = self.before, frame.f_lasti
            entered, self.entered = self.entered, []
            name = "" if before < 0 else dis.opname[frame.f_code.co_code[before]]
            # A Python function that is called without C in between: CPython does not check for signals after it.
            straight = len(entered) == 1 and not entered[0].startswith("__")
            jumped_back = frame.f_lasti < before and name != "JUMP_BACKWARD_NO_INTERRUPT"
            called = name.startswith("CALL") and not straight
            if before < 0 or (not failed and (jumped_back or called)):
                self.after.count()
        return self


def at_the_start(frame: FrameType) -> bool:
    """Whether a frame is at the start of its function. False for a resumed generator."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return at < 0 or (dis.opname[code[at]] == "RESUME" and code[at + 1] == 0)


def is_lost(frame: FrameType | None) -> bool:
    """Whether Python ignores exceptions in this frame, because it runs in a `__del__`."""
    while frame is not None and not is_of_tests(frame):
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def is_of_tests(frame: FrameType) -> bool:
    """Whether the frame is of a test or its helpers. These have received their packets."""
    return frame.f_code.co_filename.startswith(TESTS)
