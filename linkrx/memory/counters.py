"""What classification counts, in C as in Python."""

from __future__ import annotations

from array import array

# Slots of the counters that classification adds to, in C as in Python.
PACKETS, BYTES, RUNTS, EMPTY, UNKNOWN_PROTOCOL, CUT, MALFORMED = range(7)


def new_counters() -> array[int]:
    """Seven zeroes of 64 bits."""
    return array("Q", bytes(7 * 8))
