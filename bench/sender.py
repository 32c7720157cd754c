"""Sends paced streams from a process of its own, on a processor of its own: `sender.py FD SIZE PROCESSOR`.

A line on standard input is the number of packets and the nanoseconds from one to the next; the answer is how many the
kernel took, and how many of them were sent an interval or more behind their time.
"""

from __future__ import annotations

import os
import socket
import sys

from floors import Frames


def main() -> None:
    """The command."""
    fd, size, processor = map(int, sys.argv[1:])
    os.sched_setaffinity(0, {processor})
    frames = Frames(size)
    with socket.socket(fileno=fd) as injector:
        print("ready", flush=True)
        for line in sys.stdin:
            packets, interval_ns = map(int, line.split())
            print(*frames.send_paced(injector, packets, interval_ns), flush=True)


if __name__ == "__main__":
    main()
