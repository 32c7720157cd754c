"""One open source, as its user sees it."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Self

from linkrx.backend import Backend
from linkrx.choice import Choice
from linkrx.packets import Batch, Deliver, Packet
from linkrx.receiving import aio
from linkrx.receiving.deadline import deadline_after, earlier, seconds_left
from linkrx.receiving.receiver import Waiter
from linkrx.receiving.reception import Reception
from linkrx.receiving.stats import End
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.filters import FilterLike
from linkrx.sources.resolve import Settings
from linkrx.sources.source import Source

_alive: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _before_fork() -> None:
    for dispatcher in list(_alive):
        if dispatcher._opened and not dispatcher._released and not dispatcher._forked:
            dispatcher._copy_held()


def _after_fork() -> None:
    for dispatcher in list(_alive):
        if dispatcher._opened and not dispatcher._released:
            dispatcher._disown()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


class Dispatcher(Reception):
    """One open source on one backend. Made by `linkrx.open`.

    Belongs to one thread at a time; `stop()`, `close()`, `stats()` and `send()` are for all. After `close()` every method but `stop`
    and `close` raises Closed. A method that receives raises Busy while another thread, or the caller's own `deliver`, is
    inside, and OSError for what the kernel says and linkrx cannot mend.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        choice: Choice,
        backends: Mapping[str, type[Backend]],
        deliver: Deliver | None = None,
    ) -> None:
        """Takes the source over once this succeeds."""
        self._opened = False  # until all is open there is nothing for __del__ to close
        self._reader: aio.Reader | None = None
        self._waiting: list[
            threading.Event
        ] = []  # of threads in close(), set when the thread that is inside has left
        _alive.add(self)  # first: behind the rest nothing may fail
        super().__init__(source, settings, choice, backends, deliver)
        self._opened = True

    # What is known about it: readable after close as well, for that is when one asks why it ended.

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self.choice.backend

    @property
    def capabilities(self) -> Capabilities:
        """What probing the source found."""
        return self.source.capabilities

    @property
    def fanout(self) -> int | None:
        """The number of the fanout group, for others to join; None without `fanout=`."""
        return self.source.fanout

    @property
    def end(self) -> End | None:
        """Why it is over, or None while it is not."""
        return self._end or (End.STOPPED if self._stopping else None)

    def interface_name(self, index: int) -> str | None:
        """The name of the interface that packets with this `interface` come through; None where nobody knows it.

        Of a packet socket as it is now, in the socket's network namespace; of a capture file as the file says.
        """
        self._check_open()
        return self._mechanism.interface_name(index) or self.source.interface_name(index)

    def fileno(self) -> int:
        """What to poll for readability, in an event loop of any kind: then call `drain()` and look at `end`.

        Not the source's own descriptor. Stays readable while packets wait inside linkrx, and once it is over until that was
        seen: a call returned False, raised Ended, or has set `end`. Then it is quiet.
        """
        self._check_open()
        self._polled = True
        if self._ended:
            self._disarm()
        elif self._has_something != self._readable:
            self._set_readable()
        self._resume_source()
        return self._wakeup.fileno()

    def __repr__(self) -> str:
        if not getattr(self, "_opened", False):
            return "<Dispatcher that failed to open>"
        state = "closed" if self._closed else self.end.name if self.end else "open"
        return f"<Dispatcher {self.backend} on {self.capabilities.title}, {state}>"

    # Ways to receive, beside those of the receiver: dispatch, run, drain, recv, and iteration.

    def batches(self, timeout: float | None = None, *, duration: float | None = None) -> Batches:
        """Iterate over batches, with `for` or `async for`, until the end or `timeout` seconds without a packet.

        `duration` limits the whole: so many seconds after this call no further batch comes, under load as well. What waits
        then is the next call's.
        """
        self._check_open()
        return Batches(self, timeout, duration)

    def __aiter__(self) -> AsyncIterator[Packet]:
        self._check_open()
        return aio.AsyncPackets(self)

    def _reader_here(self) -> aio.Reader:
        """What waits in the event loop that runs in this thread."""
        self._check_open()
        reader = self._reader
        if reader is None or not reader.is_here():
            if reader is not None:
                reader.check_free()
            reader = self._reader = aio.Reader(self)
        return reader

    def _begin_waiting(self, waiter: Waiter | None) -> Waiter:
        """`waiter`, or a new one where it is of another event loop, waits for packets from now on."""
        reader = self._reader_here()
        if waiter is None or waiter.get_loop() is not reader.loop:
            waiter = Waiter(self, reader.loop)
        reader.begin(waiter)
        return waiter

    def _ready(self) -> None:
        """The event loop finds it readable."""
        if self._reader is not None:
            self._reader.ready()

    def _stop_waiting(self) -> None:
        """The task that waited was cancelled."""
        if self._reader is not None:
            self._reader.unregister()

    def set_filter(self, filter: FilterLike | None) -> None:
        """Take other packets from now on: an expression, or instructions, as for `open`; None takes all.

        After it returns no packet comes that the new filter rejects, be it queued, received, or waiting in a batch; from inside
        `deliver` that holds for what follows. From any thread; where another one receives, it waits for that one's `deliver`. On
        a borrowed socket the filter of its owner is put back by None, and by `close()`.

        Raises ValueError for a wrong filter, UnsupportedOption for one that the source cannot have or the kernel refuses, and
        Busy while another thread is setting one; the filter before is then still in force.
        """
        self._check_open()
        chosen = self._backends[self.choice.backend]
        self._source_filter.change(self._run_filter, filter, chosen, self._mechanism.readable_within)
        self._tell_filter()

    # Ways to end.

    def _disarm(self) -> None:
        super()._disarm()
        if self._reader is not None:
            self._reader.end_seen()

    def stop(self, flush: bool = False) -> None:
        """End reception, from any thread, signal handler or `deliver`; any number of times, at any time.

        After it returns no further `deliver` starts, except that one already running in another thread finishes.

        `flush`: what came before this call is handed over first, by whatever receives. Reception ends when the source was
        empty once, or has given as many packets as its queue holds; so some that came later may be among them. A ring is
        waited for, two retire periods at most. A stop without `flush` ends this at once.
        """
        if not self._forked:
            if flush:
                self._flushing = True
            else:
                self._stopping = True
            event = self._wakeup.event
            if event is not None:
                event.set()
                if self._quiet:
                    event.clear()

    def close(self) -> None:
        """Release all that linkrx opened and restore what it changed on a borrowed descriptor. Idempotent.

        Packets and batches stay valid. From inside `deliver`, or a signal handler of the thread that receives, it takes
        effect when the call that receives returns. From another thread it stops that call and waits for it; raises Busy
        where a task of another thread's event loop waits.
        """
        if self._released:
            return
        self._notice_fork()
        reader = self._reader
        if reader is not None:
            if self._forked:
                reader.abandon()
            else:
                reader.close()
        while not self._released:
            if self._forked:
                self._release_all()
            elif self._thread == threading.get_ident():
                self._closed = True
                self.stop()
                return
            else:
                try:
                    alone = self._close_alone()
                finally:
                    self._tell_waiting()
                if not alone:
                    self._wait_until_left()
        _alive.discard(self)

    def _wait_until_left(self) -> None:
        """Stop the thread that is inside, and wait for it; a second at most, for an exception may have kept it from telling."""
        gone = threading.Event()
        self._waiting.append(gone)  # first: whoever leaves now tells it
        try:
            self._closed = self._leaving = True
            self.stop()
            if self._thread is not None:
                gone.wait(1)
        finally:
            self._waiting.remove(gone)

    def _tell_waiting(self) -> None:
        for gone in tuple(self._waiting):
            gone.set()

    def _last_left(self) -> None:
        """Nobody is inside any more, and close() was called meanwhile."""
        self._leaving = False
        try:
            if self._closed and not self._released:
                self.close()
        finally:
            self._tell_waiting()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_opened", False) or self._released:
            return
        if not self._forked:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self.close()


class Batches:
    """What `Dispatcher.batches` returns: an iterator of Batch, also an asynchronous one."""

    def __init__(self, dispatcher: Dispatcher, timeout: float | None, duration: float | None) -> None:
        self._dispatcher = dispatcher
        self._timeout = timeout
        self._until = deadline_after(duration, "duration")

    def __iter__(self) -> Iterator[Batch]:
        # In C: on a way through Python the exception of a signal handler would cost the batch that is on its way out.
        return iter(partial(self._dispatcher._next_batch, self._timeout, self._until), None)

    def __next__(self) -> Batch:
        batch = self._dispatcher._next_batch(self._timeout, self._until)
        if batch is None:
            raise StopIteration
        return batch

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Batch:
        dispatcher = self._dispatcher
        dispatcher._check_open()
        deadline = earlier(deadline_after(self._timeout), self._until)
        while not (dispatcher.end is not None and dispatcher._over()) and seconds_left(self._until) != 0:
            if not await dispatcher._reader_here().wait(seconds_left(deadline)):
                break
            batch = dispatcher._next_batch(0, self._until)
            if batch is not None:
                return batch
        raise StopAsyncIteration
