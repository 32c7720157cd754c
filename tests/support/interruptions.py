"""Exceptions of signal handlers, raised at every point in turn where CPython may run one."""

from __future__ import annotations

import dis
import gc
import sys
from types import FrameType

from support import paths

TESTS = f"{paths.TESTS}/"


class Interrupted(Exception):
    """What the signal handler raises."""


class After:
    """Raises Interrupted inside `with` at the n-th point where CPython may run a signal handler, and then no more.

    Such a point is at the start of a function in Python, behind a call of anything else, types included, and behind a jump
    back: in all functions that the test calls, and in those that they call, but not in `deliver`, which has the packet.
    """

    def __init__(self, points: int, error: type[Exception] = Interrupted) -> None:
        self.left = points
        self.error = error
        self.raised = False

    def enter(self, frame: FrameType, _event: str, _argument: object) -> Steps | None:
        """As sys.settrace() wants it."""
        caller = frame.f_back
        if caller is not None and isinstance(caller.f_trace, Steps):
            caller.f_trace.entered.append(frame.f_code.co_name)
        if is_of_tests(frame) or is_lost(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return Steps(self, -1 if at_the_start(frame) else frame.f_lasti)

    def count(self) -> None:
        """One such point."""
        if not self.left:
            sys.settrace(None)
            self.raised = True
            raise self.error
        self.left -= 1

    def __enter__(self) -> None:
        gc.disable()  # what is collected meanwhile is somebody else's
        sys.settrace(self.enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        gc.enable()


class Steps:
    """The instructions of one frame: `before` is the one that was done last, and `entered` what it called in Python."""

    def __init__(self, after: After, before: int) -> None:
        self.after = after
        self.before = before  # -1 at the start; of a generator that goes on, where it waited
        self.entered: list[str] = []
        self.failed = False  # that instruction raised: behind it nothing is looked at

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Steps:
        if event == "exception":
            self.failed = True
        elif event == "opcode":
            failed, self.failed = self.failed, False
            before, self.before = self.before, frame.f_lasti
            entered, self.entered = self.entered, []
            name = "" if before < 0 else dis.opname[frame.f_code.co_code[before]]
            # A function in Python that is called without C in between: behind that nothing is looked at.
            straight = len(entered) == 1 and not entered[0].startswith("__")
            jumped_back = frame.f_lasti < before and name != "JUMP_BACKWARD_NO_INTERRUPT"
            called = name.startswith("CALL") and not straight
            if before < 0 or (not failed and (jumped_back or called)):
                self.after.count()
        return self


def at_the_start(frame: FrameType) -> bool:
    """Of its function; not where a generator goes on."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return at < 0 or (dis.opname[code[at]] == "RESUME" and code[at + 1] == 0)


def is_lost(frame: FrameType | None) -> bool:
    """Whether Python loses what is raised there: in a `__del__`."""
    while frame is not None and not is_of_tests(frame):
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def is_of_tests(frame: FrameType) -> bool:
    """Whether a test or its helpers run there: what they have was handed over."""
    return frame.f_code.co_filename.startswith(TESTS)
