"""Waiting for a dispatcher under asyncio, and event loops with its interface, such as uvloop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING

from linkrx.errors import Busy
from linkrx.kernel.errnos import REFUSED
from linkrx.receiving import receiver
from linkrx.receiving.receiver import Waiter

if TYPE_CHECKING:
    from linkrx.receiving.dispatcher import Dispatcher


logger = logging.getLogger("linkrx")

# How often packets are asked for, in seconds, where the event loop may not watch.
ASK_AGAIN = 0.01


class Reader:
    """One event loop's reader of a dispatcher, for one task at a time.

    It stays registered while somebody waits, so packets that come one by one cost no epoll_ctl(2). When it is called it
    receives at once: were that left to the task, the loop would find the descriptor readable once more before. Called while
    nobody waits, it takes itself out, for packets that nobody fetches would call it in every turn of the loop.

    It has a descriptor of its own: a loop has one reader for each number, and fileno() is the user's.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Made in the running loop."""
        self._dispatcher = dispatcher
        self.loop = asyncio.get_running_loop()
        self._fd = os.dup(dispatcher._wakeup.fileno())
        self._latency = dispatcher._coalescing
        self._registered: Waiter | None = None  # for whom
        self._waiter: Waiter | None = None
        self._asking: asyncio.TimerHandle | None = None  # where the event loop may not watch it
        self._said = False  # that it may not

    def is_here(self) -> bool:
        """Whether its loop is the one that runs in this thread."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:  # none runs here
            return False

    def check_free(self) -> None:
        """Raise Busy if a task of its loop waits."""
        if self._waiter is not None and not self.loop.is_closed():
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        self._release()

    def begin(self, waiter: Waiter) -> None:
        """`waiter` is settled when packets wait in the dispatcher, or it is over. Raises Busy where another one waits."""
        before = self._waiter
        if before is not None and not before.done():
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        if before is not None:
            before.armed = False
        self._waiter = waiter
        # Back to the event loop before every batch, even under a flood: other tasks want to run.
        if self._dispatcher._has_something:
            self.loop.call_soon(self.ready)
        else:
            self._register(waiter)
            waiter.armed = self._registered is waiter

    async def wait(self, timeout: float | None) -> bool:
        """Until packets wait in the dispatcher, or it is over. False after `timeout` seconds without."""
        waiter = Waiter(self._dispatcher, self.loop)
        self.begin(waiter)
        timer = None if timeout is None else self.loop.call_later(timeout, self._settle, False)
        try:
            return await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _register(self, waiter: Waiter) -> None:
        if self._registered is not waiter:
            self._dispatcher._looped = True
            self._dispatcher._resume_source()
            try:
                # In C, where the waiter is: no function in Python is called for a packet. No epoll_ctl(2) where another one was.
                self.loop.add_reader(self._fd, getattr(waiter, "ready", self.ready))
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._say_refused(error)
                if self._asking is not None:
                    self._asking.cancel()
                self._asking = self.loop.call_later(ASK_AGAIN, self._receive)
            else:
                self._registered = waiter

    def _say_refused(self, error: OSError) -> None:
        """Once."""
        if not self._said:
            self._said = True
            logger.warning(
                "the event loop cannot watch the %s, and packets are asked for every %d ms: %s (%s), as a seccomp filter answers "
                "to epoll_ctl(2). Have the filter allow it",
                self._dispatcher.capabilities.title,
                ASK_AGAIN * 1000,
                error.strerror,
                errno.errorcode[error.errno or 0],
            )

    def _settle(self, found: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.settle(found)

    def ready(self) -> None:
        """For the loop to call when the dispatcher is readable."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self.unregister()
        elif self._latency:  # until then more may have come, and the loop need not be told again
            self.unregister()
            self.loop.call_later(self._latency, self._receive)
        else:
            self._receive()

    def _receive(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        found: bool | BaseException = True
        try:
            if not self._dispatcher._poll():
                self._register(waiter)
                return
        except BaseException as error:
            found = error
        waiter.settle_at_once(found)

    def unregister(self) -> None:
        """The event loop need not look any more."""
        if self._waiter is not None:
            self._waiter.armed = False
        if self._registered is not None:
            self._registered = None
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)

    def close(self) -> None:
        """Take it out, and let its task go on: it finds the dispatcher closed. Raises Busy in another thread."""
        if not self.loop.is_closed() and self.loop.is_running() and not self.is_here():
            if self._waiter is not None:
                raise Busy(
                    "close() while a task of another thread's event loop waits: call stop() and let it end first"
                )
            self.loop.call_soon_threadsafe(self._release)
            return
        self._release()
        self._settle(found=False)

    def end_seen(self) -> None:
        """The descriptor is quiet from now on: a task that waits must go on, and sees the end. From any thread."""
        if self._waiter is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._settle, False)

    def _release(self) -> None:
        self.unregister()
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptor alone: for a forked child, whose event loop is the parent's."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.abandon()


class AsyncPackets(receiver.AsyncPackets):
    """What `async for` over a dispatcher goes through."""

    __slots__ = ()

    async def aclose(self) -> None:
        """Nothing to do; for those who close what they iterate over, as contextlib.aclosing() does."""
