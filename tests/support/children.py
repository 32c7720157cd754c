"""Forked children."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def child() -> Iterator[bool]:
    """Fork: true in the child, whose exit status must be 0; what it raises makes it 1."""
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
