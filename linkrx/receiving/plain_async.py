"""Waiting under asyncio in plain Python. In C: `_core/types/waiter.c` and `async_packets.c`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from linkrx.packets import Packet
    from linkrx.receiving.dispatcher import Dispatcher


class Waiter:
    """The future that one task awaits: the part of asyncio.Future that asyncio.Task uses.

    A Future wakes its task in the loop's next turn, which costs one more epoll_wait(2), as much as a packet. The event loop
    calls `Reader.ready` while no task runs, so the task can be woken at once there.
    """

    __slots__ = ("_asyncio_future_blocking", "_call", "_context", "_dispatcher", "_loop", "_result", "armed")

    def __init__(self, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop) -> None:
        self._dispatcher = dispatcher
        self._loop = loop
        self.armed = False
        self._asyncio_future_blocking = False
        self._call: Callable[[Waiter], object] | None = None
        self._context: Context | None = None
        self._result: bool | BaseException | None = None  # None: not done

    def __await__(self) -> Generator[Waiter, None, bool]:
        self._asyncio_future_blocking = True
        yield self
        return self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop."""
        return self._loop

    def add_done_callback(
        self, call: Callable[[Waiter], object], /, *, context: Context | None = None
    ) -> None:
        """Set the callback that wakes the task."""
        self._call, self._context = call, context

    def done(self) -> bool:
        """Whether the task was or will be woken."""
        return self._result is not None

    def result(self) -> bool:
        """The task's result."""
        if isinstance(self._result, BaseException):
            raise self._result
        return bool(self._result)

    def cancel(self, msg: object = None) -> bool:
        """End the wait of a task that is cancelled. False if no task waits."""
        if self.done():
            return False
        self.settle(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        self._dispatcher._stop_waiting()
        return True

    def settle(self, result: bool | BaseException) -> None:
        """Wake the task in the loop's next turn."""
        self._result = result
        if self._call is not None:
            self._loop.call_soon(self._call, self, context=self._context)

    def settle_at_once(self, result: bool | BaseException) -> None:
        """Wake the task now. Only in a call from the loop, when no other task runs."""
        self._result = result
        if self._call is not None and self._context is not None:
            self._context.run(self._call, self)


class AsyncPackets:
    """The iterator of `async for` over a dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Packet:
        dispatcher = self._dispatcher
        while True:
            packet = dispatcher._take()
            if packet is not None:
                return packet
            if dispatcher._ended:
                raise StopAsyncIteration
            await dispatcher._reader_here().wait(None)

    async def aclose(self) -> None:
        """Nothing is to be closed. contextlib.aclosing() awaits this."""
