"""Batches over the blocks of a ring, for as long as nobody keeps anything of them: then nothing is copied.

What a user holds stays true here as well. Each of two loans has a buffer of its own over the ring, and every batch
and view that is made of it refers to that, as batches do to an arena, see there: one look at the count tells whether
all of the loan may go back to the kernel. The consumer's loop variable still has the last batch when the next is
received, so a loan is looked at two receives later.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from functools import partial
from typing import Any

from linkrx import _core
from linkrx.arena import ARENA_BYTES, START, Arena

logger = logging.getLogger("linkrx")

# So much of a ring may be lent at a time, at most: there are two loans, and the kernel wants room too.
SHARE = 16

# To copy what is kept takes 2 ms, most of them for mapping the ring anew, which is what lending saves in 64 batches or so.
# After that nothing is lent until nothing was kept for that many.
PAUSE = 1024

_alive: weakref.WeakSet[Loans] = weakref.WeakSet()


class Loans:
    """Two loans of one ring. Only `before_fork` is for other threads."""

    def __init__(self, ring: Any, size: int, block: int) -> None:
        """`ring`: the C object, of `size` bytes in blocks of `block`, and not closed before `close`."""
        self._ring = ring
        self._size = size
        self._block = block
        self._told = _core.new("struct lrx_loans *", most=most_blocks(size, block), pause=PAUSE)
        self._buffers: list[Any] = []
        self._kept: Any = None
        self._unheld = 0
        self._lock = threading.RLock()  # a fork in a signal handler may come while its thread has it
        _core.lib.lrx_ring_lend(ring, self._told)
        _alive.add(self)

    def settle(self, arena: Arena) -> None:
        """Before each receive into `arena`: the loan before the last is over, or else copied for those who keep it."""
        told = self._told
        turn = told.turn
        if told.blocks[turn]:
            if told.offered and sys.getrefcount(self._buffers[turn]) != self._unheld:
                self._hand_over()
                if told.offered:
                    return  # it could not be copied, so the kernel must wait for it
            told.over = 1
        if told.offered:
            return
        if told.rest:
            if arena.cursor != START or not arena.reclaimed:
                told.rest = told.pause  # something is kept of what was copied, too
        elif not told.blocks[0] and not told.blocks[1]:
            self._offer()

    def _offer(self) -> None:
        """Make buffers for batches of the ring where it is mapped now."""
        kept = _core.new("struct lrx_kept *")
        first, second = _core.buffers(self._told.ring, self._size, partial(_core.lib.lrx_kept_unmap, kept))
        self._kept = kept
        self._buffers = [first, second]
        del first, second
        self._unheld = sys.getrefcount(self._buffers[0])
        self._told.offered = 1

    def last(self) -> tuple[Any, int, int] | None:
        """The buffer that has the blocks that the last receive lent, their begin and their end; None if it copied."""
        told = self._told
        if not told.lent:
            return None
        which = 1 - told.turn
        begin = told.first[which] * self._block
        return self._buffers[which], begin, begin + told.blocks[which] * self._block

    def _hand_over(self) -> None:
        with self._lock:
            code = _core.lib.lrx_ring_hand_over(self._ring, self._kept, True) if self._ring else 0
        if code and self._told.most:
            self._told.most = 0
            logger.warning(
                "packet_mmap: a batch that is kept could not be copied: %s. Its blocks of the ring are out of use until "
                "nobody keeps it, and nothing is lent any more. receive_buffer= makes a smaller ring",
                os.strerror(-code),
            )

    def before_fork(self) -> None:
        """A child may look at all that its parent holds, and has no ring."""
        if self._told.offered:
            self._hand_over()

    def close(self) -> None:
        """The ring is about to be closed: what is lent is copied. Raises OSError when there is no memory for that."""
        with self._lock:
            if self._ring and self._told.offered:
                code = _core.lib.lrx_ring_hand_over(self._ring, self._kept, False)
                if code:
                    raise OSError(-code, f"closing a ring of which packets may be kept: {os.strerror(-code)}")
            self._ring = None


def most_blocks(size: int, block: int) -> int:
    """Blocks in a loan: no more than what else an arena would hold, or one; none of a small ring."""
    return min(max(1, ARENA_BYTES // block), size // block // SHARE)


def _before_fork() -> None:
    for loans in list(_alive):
        loans.before_fork()


os.register_at_fork(before=_before_fork, after_in_child=_alive.clear)
