"""The public dispatcher."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial, wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from linkrx.backend import Backend
from linkrx.choice import Choice
from linkrx.memory import counters as slots
from linkrx.memory.counters import BYTES, CUT, EMPTY, FILTERED, PACKETS, RUNTS, UNKNOWN_PROTOCOL
from linkrx.packets import Batch, Deliver, Packet
from linkrx.receiving import aio
from linkrx.receiving.deadline import deadline_after, earlier, seconds_left
from linkrx.receiving.receiver import AsyncPackets, Waiter
from linkrx.receiving.reception import Reception
from linkrx.receiving.stats import End, Stats
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.filters import FilterLike
from linkrx.sources.resolve import Settings
from linkrx.sources.source import Source

Given = ParamSpec("Given")
Result = TypeVar("Result")

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


def _while_open(
    method: Callable[Concatenate[Dispatcher, Given], Result],
) -> Callable[Concatenate[Dispatcher, Given], Result]:
    """The method raises Closed after close(), also if close() came meanwhile."""

    @wraps(method)
    def call(dispatcher: Dispatcher, /, *args: Given.args, **names: Given.kwargs) -> Result:
        dispatcher._check_open()
        try:
            result = method(dispatcher, *args, **names)
        except Exception:
            if dispatcher._closed:
                raise dispatcher._why_closed() from None
            raise
        dispatcher._check_open()
        return result

    return call


class Dispatcher(Reception):
    """One open source on one backend. Made by `linkrx.open`.

    One thread at a time may receive. Any thread may call `stop()`, `close()`, `stats()`, `set_filter()`, `send()` and `send_batch()`.
    After `close()` every method but `stop` and `close` raises Closed. A method that receives raises Busy while another thread
    receives, or inside `deliver`. It raises OSError for kernel errors that linkrx cannot handle.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        choice: Choice,
        backends: Mapping[str, type[Backend]],
        deliver: Deliver | None = None,
    ) -> None:
        """The dispatcher owns the source if this succeeds."""
        self._opened = False  # __del__ closes only what was opened
        self._reader: aio.Reader | None = None
        self._waiting: list[
            threading.Event
        ] = []  # for threads in close(): set when the receiving thread has left
        _alive.add(self)  # first, because nothing may fail after the rest
        super().__init__(source, settings, choice, backends, deliver)
        self._opened = True

    # These can be read after close() too.

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self.choice.backend

    @property
    def capabilities(self) -> Capabilities:
        """The result of probing the source."""
        return self.source.capabilities

    @property
    def fanout(self) -> int | None:
        """The number of the fanout group, which others can join; None without `fanout=`."""
        return self.source.fanout

    @property
    def end(self) -> End | None:
        """Why reception ended, or None."""
        stopped = self._stopping or (self._flushing and self._closed)
        return self._end or (End.STOPPED if stopped else None)

    @_while_open
    def interface_name(self, index: int) -> str | None:
        """The name of the interface with this index, as in `packet.interface`; None if it is not known.

        For a packet socket it is the present name in the socket's network namespace, for a TAP or TUN queue that of its device,
        for a capture file the name in the file. Messages have the present name too; `capabilities` has the name at open.
        """
        return self._mechanism.interface_name(index) or self.source.interface_name(index)

    @_while_open
    def stats(self) -> Stats:
        """The counters since `open`. From any thread."""
        counters, tally = self._counters, self._tally
        return Stats(
            packets=counters[PACKETS] - self._undelivered,
            bytes=counters[BYTES] - self._undelivered_bytes,
            batches=self._batches,
            receives=self._receives,
            waits=self._waits,
            runts=counters[RUNTS],
            empty=counters[EMPTY],
            unknown_protocol=counters[UNKNOWN_PROTOCOL],
            malformed=counters[slots.MALFORMED] + tally.indescribable,
            truncated=counters[CUT],
            kernel_drops=self._drops(),
            ring_freezes=self._mechanism.freezes(),
            link_downs=tally.link_downs if self.source.watched else None,
            demotions=self._rungs - len(self.choice.ladder),
            undelivered=self._undelivered + tally.undelivered,
            sent=self._sent,
            filtered=counters[FILTERED] if self._source_filter.own or counters[FILTERED] else None,
        )

    @_while_open
    def fileno(self) -> int:
        """A descriptor for any event loop: when it is readable, call `drain()` and look at `end`.

        It is not the source's descriptor. It is readable while packets wait inside linkrx. After the end of reception it stays
        readable until a call returned False, raised Ended or left `end` set.
        """
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
        return f"<Dispatcher {self.backend} on {self.source.present.title}, {state}>"

    # Receiving. The receiver has dispatch, run, drain, recv and iteration.

    def batches(self, timeout: float | None = None, *, duration: float | None = None) -> Batches:
        """Iterate over batches, with `for` or `async for`, until the end or `timeout` seconds without a packet.

        `duration` limits the whole iteration to so many seconds from this call, also under load. The next call gives the packets
        that wait then.
        """
        self._check_open()
        return Batches(self, timeout, duration)

    def __aiter__(self) -> AsyncIterator[Packet]:
        self._check_open()
        return AsyncPackets(self)

    def _reader_here(self) -> aio.Reader:
        """The reader for the event loop that runs in this thread."""
        self._check_open()
        reader = self._reader
        if reader is None or not reader.is_here():
            if reader is not None:
                reader.leave()
            reader = self._reader = aio.Reader(self)
        return reader

    def _begin_waiting(self, waiter: Waiter | None) -> Waiter:
        """Let `waiter` wait for packets, or a new one if `waiter` belongs to another event loop."""
        reader = self._reader_here()
        if waiter is None or waiter.get_loop() is not reader.loop:
            waiter = Waiter(self, reader.loop)
        reader.begin(waiter)
        return waiter

    def _ready(self) -> None:
        """The event loop found the descriptor readable."""
        if self._reader is not None:
            self._reader.ready()

    def _stop_waiting(self) -> None:
        """The waiting task was cancelled."""
        if self._reader is not None:
            self._reader.stop_waiting()

    @_while_open
    def set_filter(self, filter: FilterLike | None) -> None:
        """Replace the filter by an expression or instructions, as for `open`. None removes it.

        After this returns, no packet comes that the new filter rejects, whether it was queued, received, or waiting in a batch.
        Inside `deliver` this holds for the packets that follow. Any thread may call it; while another thread receives, it waits
        until that thread's `deliver` has returned. On a borrowed socket, None and `close()` restore the owner's filter.

        Raises ValueError for a wrong filter, UnsupportedOption for a filter that the source cannot have or the kernel refuses, and
        Busy while another thread sets a filter. The old filter then stays in force.
        """
        chosen = self._backends[self.choice.backend]
        self._source_filter.change(self._run_filter, filter, chosen, self._mechanism.readable_within)
        self._explain_filter()

    # Ending.

    def _disarm(self) -> None:
        super()._disarm()
        if self._reader is not None:
            self._reader.end_seen()

    def stop(self, flush: bool = False) -> None:
        """End reception. Any thread, signal handler or `deliver` may call it, any number of times.

        After it returns no further `deliver` starts; one that is running in another thread finishes.

        With `flush` the receiving call first delivers the packets that came before. Reception ends when the source was empty
        once, or has given as many packets as its queue holds. So later packets may be among them. For a ring this waits for two
        retire periods at most. A stop without `flush` ends it at once.
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
        """Release everything that linkrx opened, and restore the settings of a borrowed descriptor. Idempotent.

        Packets and batches stay valid. Inside `deliver`, or in a signal handler of the receiving thread, it takes effect when the
        receiving call returns. From another thread it stops that call and waits for it. Raises Busy while a task of another
        thread's event loop waits.
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
                    self._wake_closers()
                if not alone:
                    self._wait_until_left()
        _alive.discard(self)

    def _wait_until_left(self) -> None:
        """Stop the receiving thread, and wait a second for it: an exception could keep it from setting the event."""
        gone = threading.Event()
        self._waiting.append(gone)  # first, so that a thread that leaves now sets it
        try:
            self._closed = self._leaving = True
            self.stop()
            if self._thread is not None:
                gone.wait(1)
        finally:
            self._waiting.remove(gone)

    def _wake_closers(self) -> None:
        for gone in tuple(self._waiting):
            gone.set()

    def _last_left(self) -> None:
        """Called when the last call has returned, and close() was called meanwhile."""
        self._leaving = False
        try:
            if self._closed and not self._released:
                self.close()
        finally:
            self._wake_closers()

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
    """The iterator of `Dispatcher.batches`, also for `async for`."""

    def __init__(self, dispatcher: Dispatcher, timeout: float | None, duration: float | None) -> None:
        self._dispatcher = dispatcher
        self._timeout = timeout
        self._until = deadline_after(duration, "duration")

    def __iter__(self) -> Iterator[Batch]:
        # In C, because in Python the exception of a signal handler could lose the batch that is being returned.
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
        while not dispatcher._ended and seconds_left(self._until) != 0:
            came = True
            if dispatcher.end is None:  # no stop() is pending
                reader = dispatcher._reader_here()
                came = await reader.wait(seconds_left(deadline))
                if not came and not reader.holds:
                    break
            batch = dispatcher._next_batch(0, self._until)
            if batch is not None:
                return batch
            if not came:
                break
        raise StopAsyncIteration
