"""The ends of a pipe that this process has open."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def writing_ends(fd: int) -> list[int]:
    """The file status flags of this process's descriptors for the writing end of a pipe."""
    pipe = os.fstat(fd)
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder is closed by now
            status = os.fstat(int(entry.name))
            flags = fcntl.fcntl(int(entry.name), fcntl.F_GETFL)
            if (status.st_dev, status.st_ino) == (
                pipe.st_dev,
                pipe.st_ino,
            ) and flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(flags)
    return found
