"""Sends paced streams from a process of its own, on a processor of its own: `sender.py FD SIZE PROCESSOR`.

A line on standard input is the number of packets and the nanoseconds from one to the next; the answer is how many the
kernel took, and how many of them were sent an interval or more behind their time.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress

from floors import Frames

FIRST = 1  # the lowest real-time priority: before all that has none


def set_scheduler(policy: int = os.SCHED_FIFO) -> None:
    """Have this thread run before others, where that is allowed: a stream that others interrupt is not paced."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(FIRST if policy == os.SCHED_FIFO else 0))


def main() -> None:
    """The command."""
    fd, size, processor = map(int, sys.argv[1:])
    os.sched_setaffinity(0, {processor})
    set_scheduler()
    frames = Frames(size)
    with socket.socket(fileno=fd) as injector:
        print("ready", flush=True)
        for line in sys.stdin:
            packets, interval_ns = map(int, line.split())
            print(*frames.send_paced(injector, packets, interval_ns), flush=True)


if __name__ == "__main__":
    main()
