"""What classification counts, in C as in Python."""

from __future__ import annotations

from array import array

# Slots of the counters that classification adds to, in C as in Python.
PACKETS, BYTES, RUNTS, EMPTY, UNKNOWN_PROTOCOL, CUT, MALFORMED, FILTERED = range(8)


def new_counters() -> array[int]:
    """A zero of 64 bits for each."""
    return array("Q", bytes((FILTERED + 1) * 8))


def received(counters: array[int]) -> int:
    """What was received so far, packets or not."""
    return sum(counters[slot] for slot in (PACKETS, RUNTS, EMPTY, UNKNOWN_PROTOCOL, MALFORMED, FILTERED))
