"""Sends streams at a fixed rate, in its own process on its own processor: `sender.py FD SIZE PROCESSOR`.

Each line on standard input has the number of packets, and the nanoseconds from one to the next. The answer is how many the kernel
accepted, and how many of them were sent late by an interval or more.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress

from floors import Frames

FIRST = 1  # the lowest real-time priority, above all threads without one


def set_scheduler(policy: int = os.SCHED_FIFO) -> None:
    """Give this thread real-time priority, if that is allowed, so that other processes do not delay the stream."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(FIRST if policy == os.SCHED_FIFO else 0))


def main() -> None:
    """Run the command."""
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
