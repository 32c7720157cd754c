"""Waiting for a dispatcher under asyncio, and event loops with its interface, such as uvloop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from linkrx.errors import Busy

if TYPE_CHECKING:
    from linkrx.receiving.reception import Reception


class Reader:
    """One event loop's reader of a dispatcher, for one task at a time.

    It stays registered while somebody waits, so packets that come one by one cost no epoll_ctl(2). When it is called it
    receives at once: were that left to the task, the loop would find the descriptor readable once more before. Called while
    nobody waits, it takes itself out, for packets that nobody fetches would call it in every turn of the loop.
    """

    def __init__(self, dispatcher: Reception) -> None:
        """Made in the running loop."""
        self._dispatcher = dispatcher
        self._fd = dispatcher._wakeup.fileno()
        self._loop = asyncio.get_running_loop()
        self._registered = False
        self._waiter: asyncio.Future[bool] | None = None

    def is_here(self) -> bool:
        """Whether its loop is the one that runs in this thread."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:  # none runs here
            return False

    def check_free(self) -> None:
        """Raise Busy if a task of its loop waits."""
        if self._waiter is not None and not self._loop.is_closed():
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        self._unregister()

    async def wait(self, timeout: float | None) -> bool:
        """Until packets wait in the dispatcher, or it is over. False after `timeout` seconds without."""
        dispatcher, loop = self._dispatcher, self._loop
        if self._waiter is not None:
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiter = waiter
        timer = None
        try:
            # Back to the event loop before every batch, even under a flood: other tasks want to run.
            if dispatcher._has_something:
                loop.call_soon(self._ready)
            else:
                self._register()
            if timeout is not None:
                timer = loop.call_later(timeout, self._settle, False)
            return await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
            if waiter.cancelled():
                self._unregister()

    def _register(self) -> None:
        if not self._registered:
            self._dispatcher._looped = True
            self._dispatcher._listen()
            self._loop.add_reader(self._fd, self._ready)
            self._registered = True

    def _settle(self, found: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(found)

    def _ready(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._unregister()
        elif self._dispatcher.held_back:  # until then more may have come, and the loop need not be told again
            self._unregister()
            self._loop.call_later(self._dispatcher.held_back, self._receive)
        else:
            self._receive()

    def _receive(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._dispatcher._poll():
                waiter.set_result(True)
            else:
                self._register()
        except BaseException as error:
            waiter.set_exception(error)

    def _unregister(self) -> None:
        if self._registered:
            self._registered = False
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)

    def close(self) -> None:
        """Take it out, and let its task go on: it finds the dispatcher closed. Raises Busy in another thread."""
        if not self._loop.is_closed() and self._loop.is_running() and not self.is_here():
            if self._waiter is not None:
                raise Busy(
                    "close() while a task of another thread's event loop waits: call stop() and let it end first"
                )
            self._loop.call_soon_threadsafe(self._loop.remove_reader, self._fd)
            self._registered = False
        self._unregister()
        self._settle(found=False)
