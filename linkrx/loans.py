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

# To copy what is kept takes 2 ms, most of them for mapping the ring anew, which is what lending saves in 70 batches or so.
# After that nothing is lent until nothing was kept for so many receives.
PAUSE = 1024

_alive: weakref.WeakSet[Loans] = weakref.WeakSet()


class Loans:
    """Two loans of one ring. Only what stands around a fork is for other threads."""

    def __init__(self, ring: Any, size: int, block: int) -> None:
        """`ring`: the C object, of `size` bytes in blocks of `block`, and not closed before `close`."""
        self._ring = ring
        self._size = size
        self._block = block
        self._told = _core.new("struct lrx_loans *", most=most_blocks(size, block), pause=PAUSE)
        self._buffers: list[Any] = []
        self._kept = _core.new("struct lrx_kept *")
        self._unheld = 0
        self._lock = threading.RLock()  # a fork in a signal handler may come while its thread has it
        self._warned = self._inherited = False
        _core.lib.lrx_ring_lend(ring, self._told)
        _alive.add(self)

    def settle(self, arena: Arena) -> None:
        """Before each receive into `arena`: the loan before the last is over, or else copied for those who keep it."""
        told = self._told
        turn = told.turn
        if told.blocks[turn]:
            held = told.offered and sys.getrefcount(self._buffers[turn]) != self._unheld
            if held and (told.rest or self._hand_over()):
                return  # it could not be copied: the kernel must wait for it, and the next try a pause
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
        # From C to C: the exception of a signal handler cannot keep memory from being unmapped.
        buffers = _core.buffers(self._told.ring, self._size, partial(_core.lib.lrx_kept_unmap, kept))
        self._kept = kept
        self._buffers = buffers
        # The list and the argument. Should anybody look here, as tracers do, it must not count.
        self._unheld = min(2, sys.getrefcount(self._buffers[0]))
        self._told.offered = 1

    def memory(self) -> memoryview | None:
        """The blocks that the last receive lent, or None if it copied."""
        told = self._told
        if not told.lent:
            return None
        which = 1 - told.turn
        begin = told.first[which] * self._block
        return memoryview(self._buffers[which])[begin : begin + told.blocks[which] * self._block]

    def _hand_over(self) -> int:
        """Errno, or 0 when nothing that is kept lies in the ring any more."""
        with self._lock:
            code: int = _core.lib.lrx_ring_hand_over(self._ring, self._kept) if self._ring else 0
        if code and not self._warned:
            self._warned = True
            logger.warning(
                "packet_mmap: a batch that is kept could not be copied: %s. Its blocks of the ring are out of use until "
                "nobody keeps it, or there is memory for it. receive_buffer= makes a smaller ring",
                os.strerror(-code),
            )
        return code

    def before_fork(self) -> None:
        """A child may look at all that its parent holds, and has no ring. Nothing is lent until it is made."""
        if self._hand_over():
            with self._lock:
                if self._ring:  # better than a child that faults: it sees the ring itself
                    self._inherited = True
                    _core.lib.lrx_ring_inherit(self._ring, True)

    def after_fork(self) -> None:
        """In the parent."""
        if self._inherited:
            with self._lock:
                if self._ring:
                    _core.lib.lrx_ring_inherit(self._ring, False)
                self._inherited = False

    def close(self) -> None:
        """The ring is about to be closed: what is kept of it is not there any more."""
        with self._lock:
            told, unheld = self._told, self._unheld
            lent = [k for k in (0, 1) if told.offered and told.blocks[k]]
            if self._ring and any(sys.getrefcount(self._buffers[k]) != unheld for k in lent):
                _core.lib.lrx_ring_leave(self._ring, self._kept)
            self._ring = None


def most_blocks(size: int, block: int) -> int:
    """Blocks in a loan: no more than what else an arena would hold, or one; none of a small ring."""
    return min(max(1, ARENA_BYTES // block), size // block // SHARE)


def _before_fork() -> None:
    """Python forks whatever comes out of here, and only reports it. So an exception of a signal handler must wait."""
    raised: BaseException | None = None
    for _ in range(100):
        try:
            for loans in list(_alive):  # RuntimeError: another thread has just made a ring
                loans.before_fork()
            break
        except BaseException as error:
            raised = error if raised is None or isinstance(raised, RuntimeError) else raised
    if raised is not None and not isinstance(raised, RuntimeError):
        raise raised


def _after_fork() -> None:
    for loans in list(_alive):
        loans.after_fork()


# Twice, for an exception may come before the first step of the one.
os.register_at_fork(before=_before_fork)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_alive.clear)
