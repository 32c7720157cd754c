"""Waiting for a dispatcher under asyncio and event loops with the same interface, such as uvloop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING

from linkrx.errors import Busy
from linkrx.kernel.errnos import REFUSED
from linkrx.receiving.deadline import HOLD
from linkrx.receiving.receiver import Waiter

if TYPE_CHECKING:
    from linkrx.receiving.dispatcher import Dispatcher


logger = logging.getLogger("linkrx")

# Seconds between two reads if the event loop may not watch the descriptor.
ASK_AGAIN = 0.01


class Reader:
    """One event loop's reader of a dispatcher, for one task at a time.

    The reader stays registered while a task waits, so single packets cost no epoll_ctl(2). The loop's call receives at once; if
    the task did that, the loop would find the descriptor readable a second time. A call without a waiting task removes the
    reader, because the loop would otherwise call it in every turn.

    The reader has a duplicate of the descriptor: a loop has one reader per descriptor, and fileno() belongs to the user.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Make a reader for the running loop."""
        self._dispatcher = dispatcher
        self.loop = asyncio.get_running_loop()
        self._fd = os.dup(dispatcher._wakeup.fileno())
        self._latency = dispatcher._coalescing
        self._registered: Waiter | None = None  # the waiter that the loop's reader belongs to
        self._waiter: Waiter | None = None
        self._asking: asyncio.TimerHandle | None = None  # the next read, if the event loop may not watch
        self._warned = False  # this was logged
        self._was_full = False  # the last batch: what it left in the queue was held back with it
        self._until = 0.0  # the time of the loop until which packets are held back; 0: none are
        self._holding: asyncio.TimerHandle | None = None  # the next read of those

    def is_here(self) -> bool:
        """Whether its loop is the one that runs in this thread."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:  # none runs here
            return False

    def leave(self) -> None:
        """Leave the loop, for another one. Raises Busy if it runs in another thread, or a task of it waits."""
        waits = self._waiter is not None and not self._waiter.done()
        if not self.loop.is_closed() and (waits or self.loop.is_running()):
            raise Busy(
                "another task is receiving, or its event loop still runs in another thread: a dispatcher belongs to one task "
                "at a time"
            )
        self._release()

    def begin(self, waiter: Waiter) -> None:
        """Settle `waiter` when packets wait in the dispatcher or reception is over. Raises Busy while another task waits."""
        before = self._waiter
        if before is not None and not before.done():
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        if before is not None:
            before.armed = False
        self._waiter = waiter
        self._until = 0.0
        self._end_hold()
        # Go back to the event loop before every batch, also under a flood, so that other tasks run.
        if self._dispatcher._has_something or self._was_full:
            self.loop.call_soon(self._receive)
        else:
            self._register(waiter)
            waiter.armed = self._registered is waiter

    @property
    def holds(self) -> bool:
        """Whether packets are held back, or will be when they are read."""
        return self._until > 0

    async def wait(self, timeout: float | None) -> bool:
        """Wait for packets in the dispatcher or the end of reception. False after `timeout` seconds, or after close()."""
        waiter = Waiter(self._dispatcher, self.loop)
        self.begin(waiter)
        timer = None if timeout is None else self.loop.call_later(timeout, _settle, waiter)
        try:
            return await waiter
        finally:
            if self._waiter is waiter:  # another task may have begun since this one was cancelled
                self._waiter = None
                self._end_hold()
            if timer is not None:
                timer.cancel()

    def _register(self, waiter: Waiter) -> None:
        if self._registered is not waiter:
            self._dispatcher._looped = True
            self._dispatcher._resume_source()
            try:
                # The C waiter has `ready` in C, so no Python function runs per packet. Replacing a reader costs no epoll_ctl(2).
                self.loop.add_reader(self._fd, getattr(waiter, "ready", self.ready))
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._warn_refused(error)
                if self._asking is not None:
                    self._asking.cancel()
                self._asking = self.loop.call_later(ASK_AGAIN, self._receive)
            else:
                self._registered = waiter

    def _warn_refused(self, error: OSError) -> None:
        """Log once that the event loop may not watch the descriptor."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "the event loop cannot watch the %s, so linkrx reads it every %d ms: %s (%s), as from a seccomp filter for "
                "epoll_ctl(2). Change the filter to allow it",
                self._dispatcher.source.present.title,
                ASK_AGAIN * 1000,
                error.strerror,
                errno.errorcode[error.errno or 0],
            )

    def _settle(self) -> None:
        if self._waiter is not None:
            _settle(self._waiter)

    def ready(self) -> None:
        """The loop calls this when the dispatcher is readable."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self.unregister()
        elif self._latency:
            # More packets may come. The event loop need not call meanwhile.
            self.unregister()
            self._until = self._until or self.loop.time() + self._latency
            self._hold()
        else:
            self._receive()

    def _hold(self) -> None:
        """Read again after HOLD. If the latency is over by then, that is the last time."""
        left = self._until - self.loop.time()
        self._end_hold()
        self._holding = self.loop.call_later(
            min(left, HOLD), self._hold_more if left > HOLD else self._receive
        )

    def _hold_more(self) -> None:
        waiter, dispatcher = self._waiter, self._dispatcher
        if waiter is None or waiter.done():
            return
        before = dispatcher._report.held_back
        try:
            is_over = dispatcher._hold_back()
        except BaseException as error:
            waiter.settle_at_once(error)
            return
        if is_over:
            self._receive()
        elif dispatcher._report.held_back > before:
            self._hold()
        else:  # the next packet goes on with it, or the end of the latency
            self._register(waiter)
            self._holding = self.loop.call_at(self._until, self._receive)

    def stop_waiting(self) -> None:
        """Leave the event loop alone: no task waits."""
        self.unregister()
        self._until = 0.0
        self._end_hold()

    def _end_hold(self) -> None:
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None

    def _receive(self) -> None:
        waiter = self._waiter
        self._until = 0.0
        self._end_hold()
        if waiter is None or waiter.done():
            return
        found: bool | BaseException = True
        try:
            if not self._dispatcher._poll():
                self._was_full = False
                self._register(waiter)
                return
            self._was_full = self._latency > 0 and self._dispatcher._was_full
        except BaseException as error:
            found = error
        waiter.settle_at_once(found)

    def unregister(self) -> None:
        """Remove the reader from the event loop."""
        if self._waiter is not None:
            self._waiter.armed = False
        if self._registered is not None:
            self._registered = None
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)

    def close(self) -> None:
        """Remove the reader, and wake its task, which finds the dispatcher closed. Raises Busy in another thread."""
        if not self.loop.is_closed() and self.loop.is_running() and not self.is_here():
            if self._waiter is not None:
                raise Busy(
                    "close() while a task of another thread's event loop waits: call stop() and let it end first"
                )
            self.loop.call_soon_threadsafe(self._release)
            return
        self._release()
        self._settle()

    def end_seen(self) -> None:
        """Wake the waiting task, which then sees the end: the descriptor is quiet from now on. From any thread."""
        if self._waiter is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._settle)

    def _release(self) -> None:
        self.stop_waiting()
        self.abandon()

    def abandon(self) -> None:
        """Close only the descriptor. For a forked child, which shares its parent's event loop."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.abandon()


def _settle(waiter: Waiter) -> None:
    """End a wait without packets, unless it is over."""
    if not waiter.done():
        waiter.settle(False)


async def nothing_to_close() -> None:
    """The aclose() of an iterator, which contextlib.aclosing() awaits."""
