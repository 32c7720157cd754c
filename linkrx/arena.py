"""The memory that frames lie in, and the rule for using it again.

What a user holds stays true: memory is written again only when nothing of it is held. Every batch refers to the
arena's `mmap`, and makes memoryviews of its own of it; as long as the batch, or any slice, cast or array made from
its views lives, the `mmap` has one reference more, so one look at the count answers for the whole arena.
"""

from __future__ import annotations

import mmap
import sys

from linkrx import _core
from linkrx.columns import ROW_BYTES, align

# Where counts are not exact, no arena is ever used twice.
REFERENCE_COUNTS_ARE_EXACT = (
    sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
)

# Where frames start: room for a batch of 64 full Ethernet frames five times over, small enough to stay in a core's
# second-level cache, and well under a megabyte, which is what holding one packet can pin.
ARENA_BYTES = 512 * 1024

# Frames start that far behind the mapping's. What the kernel copies to the start of a page, or less than 32 bytes behind
# it, can take four times as long: 22 us for 65,535 bytes in place of 6, seen on an AMD EPYC.
START = 64

MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, Linux 5.14


class Arena:
    """One anonymous mapping, filled from `cursor` on: ARENA_BYTES that are used, and behind them address space that
    is touched only when the last frame is a large one.

    `view` is the writable whole for Python, `address` the same for C. Frames may take what is before `limit`.
    """

    __slots__ = ("_unheld", "address", "cursor", "limit", "memory", "view")

    def __init__(self, size: int, table: int = 0) -> None:
        """The last `table` bytes are not for frames."""
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _populate(self.memory)
        self.limit = size - table
        self.cursor = START
        self.view = memoryview(self.memory)
        self.address = _core.address(self.memory) if _core.lib else 0
        self._unheld = sys.getrefcount(self.memory)

    def reclaim(self) -> bool:
        """Start again at the front if nothing of the arena is held."""
        if REFERENCE_COUNTS_ARE_EXACT and sys.getrefcount(self.memory) == self._unheld:
            self.cursor = START
            return True
        return False


def _populate(memory: mmap.mmap) -> None:
    """Touch what will be used, at once: the first touch of a page costs 1.5 us, a populated one 14 ns."""
    try:
        memory.madvise(MADV_POPULATE_WRITE, 0, ARENA_BYTES)
    except OSError:  # an older kernel
        for page in range(0, ARENA_BYTES, mmap.PAGESIZE):
            memory[page] = 0


class Arenas:
    """At most two arenas of one dispatcher, the second made only when something of the first is held.

    A consumer that keeps nothing but its loop variable alternates between two warm ones. What is kept longer is
    left to its holders: the arena is filled onward behind it until it is used up, then dropped.
    """

    __slots__ = ("_current", "_spare", "largest", "table")

    def __init__(self, capacity: int, rows: int) -> None:
        """Room in each arena for `rows` rows and one packet of `capacity` bytes at the very least."""
        # A backend reads one byte more than it keeps, to see whether a packet was cut.
        self.largest = align(capacity + 1)
        self.table = align(ROW_BYTES * rows)
        self._current = self._new()
        self._spare: Arena | None = None

    def _new(self) -> Arena:
        return Arena(ARENA_BYTES + self.largest + self.table, self.table)

    def next(self) -> Arena:
        """An arena with room for a packet of any size, and a table, behind its cursor."""
        current, spare = self._current, self._spare
        if current.reclaim():
            return current
        if spare is None or spare.reclaim():
            self._current, self._spare = spare or self._new(), current
            return self._current
        if current.limit - current.cursor >= self.largest:
            return current
        # The older one is used up, and may be kept for long: this one has the last batch, and will be free again.
        fresh = spare if spare.limit - spare.cursor >= self.largest else self._new()
        self._current, self._spare = fresh, current
        return self._current
