"""Waiting for a descriptor under asyncio and the loops that speak its language, such as uvloop."""

from __future__ import annotations

import asyncio


class Waiter:
    """One task that lets its event loop work until a descriptor is readable.

    The reader is taken out as soon as it fires: left in, it would fire again in every turn of the loop for as long
    as the packets are not fetched.
    """

    def __init__(self, fd: int) -> None:
        """Made in the running loop."""
        self._fd = fd
        self.loop = asyncio.get_running_loop()
        self._readable: asyncio.Future[bool] = self.loop.create_future()
        self.loop.add_reader(fd, self.settle, True)

    async def wait(self, timeout: float | None) -> bool:
        """False after `timeout` seconds."""
        timer = None if timeout is None else self.loop.call_later(timeout, self.settle, False)
        try:
            return await self._readable
        finally:
            self.settle(False)
            if timer is not None:
                timer.cancel()

    def settle(self, readable: bool) -> None:
        """Take the reader out, and let the task go on. Only in the loop's thread; again does nothing."""
        if self._fd >= 0:
            self.loop.remove_reader(self._fd)
            self._fd = -1
        if not self._readable.done():
            self._readable.set_result(readable)

    def is_here(self) -> bool:
        """Whether its loop is the one that runs in this thread."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:  # none runs here
            return self.loop.is_closed() or not self.loop.is_running()
