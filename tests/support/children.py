"""Forked children."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def child() -> Iterator[bool]:
    """Fork. Yields True in the child, and False in the parent. Asserts that the child raises no exception."""
    pid = os.fork()
    if pid:
        yield False
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return
    try:
        yield True
    except BaseException:
        os._exit(1)
    os._exit(0)
