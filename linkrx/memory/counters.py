"""The counters of classification, the same in C and in Python."""

from __future__ import annotations

from array import array

# Slots of the counters that classification adds to, in C as in Python.
PACKETS, BYTES, RUNTS, EMPTY, UNKNOWN_PROTOCOL, CUT, MALFORMED, FILTERED = range(8)


def new_counters() -> array[int]:
    """One 64-bit zero for each slot."""
    return array("Q", bytes((FILTERED + 1) * 8))


def received(counters: array[int]) -> int:
    """The number of frames received so far, packets or not."""
    return sum(counters[slot] for slot in (PACKETS, RUNTS, EMPTY, UNKNOWN_PROTOCOL, MALFORMED, FILTERED))
