"""The outer half of the loop: the ways in which packets are handed over, and who may ask for them."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from linkrx import aio
from linkrx.backend import Backend
from linkrx.capabilities import Capabilities
from linkrx.choice import Choice
from linkrx.claim import Claim
from linkrx.deadline import deadline_after, seconds_left
from linkrx.errors import Busy, Closed, LinkrxError
from linkrx.options import Options
from linkrx.packets import Batch, Packet
from linkrx.reception import Reception
from linkrx.source import Source
from linkrx.stats import End, Stats

# remote and local link address, protocol, packet
Deliver = Callable[["bytes | None", "bytes | None", int, Packet], object]

Taken = TypeVar("Taken")

_alive: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _before_fork() -> None:
    for dispatcher in list(_alive):
        if not dispatcher._released and not dispatcher._forked:
            dispatcher._reception.copy_held()


def _after_fork() -> None:
    for dispatcher in list(_alive):
        if not dispatcher._released:
            dispatcher._reception.disown()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


class Dispatcher:
    """One open source on one backend. Made by `linkrx.open`.

    Belongs to one thread at a time; only `stop()` is for others. After `close()` every method but `stop` and
    `close` raises Closed. A method that receives raises Busy while another thread, or the caller's own `deliver`,
    is inside, and OSError for what the kernel says and linkrx cannot mend.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        choice: Choice,
        backends: Mapping[str, type[Backend]],
        deliver: Deliver | None = None,
    ) -> None:
        """Takes the source over once this succeeds."""
        self._closed = self._released = True  # until all is open there is nothing for __del__ to close
        self._process = os.getpid()
        self._deliver = deliver
        self._owner: dict[str, Claim] = {}  # at most one, see _step
        self._waiter: aio.Waiter | None = None
        _alive.add(self)
        self._reception = Reception(source, options, choice, backends, self._owner)
        self._receiver = self._reception.receiver
        self._closed = self._released = False

    # What is known about it: readable after close as well, for that is when one asks why it ended.

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self._reception.choice.backend

    @property
    def choice(self) -> Choice:
        """Why this backend: `choice.explain()` has one line for each."""
        return self._reception.choice

    @property
    def capabilities(self) -> Capabilities:
        """What probing the source found."""
        return self._reception.source.capabilities

    @property
    def fanout(self) -> int | None:
        """The number of the fanout group, for others to join; None without `fanout=`."""
        return self._reception.source.fanout

    @property
    def end(self) -> End | None:
        """Why it is over, or None while it is not."""
        reception = self._reception
        return reception.end or (End.STOPPED if self._receiver.stopping else None)

    def stats(self) -> Stats:
        """Counters since `open`."""
        self._check_open()
        return self._reception.stats()

    def fileno(self) -> int:
        """What to poll for readability, in an event loop of any kind: then call `drain()` and look at `end`.

        Not the source's own descriptor. Stays readable while packets wait inside linkrx, and once it is over.
        """
        self._check_open()
        return self._reception.fileno()

    def __repr__(self) -> str:
        if not hasattr(self, "_reception"):
            return "<Dispatcher that failed to open>"
        state = "closed" if self._closed else self.end.name if self.end else "open"
        return f"<Dispatcher {self.backend} on {self.capabilities.title}, {state}>"

    # Ways to receive.

    def dispatch(self, timeout: float | None = None) -> bool:
        """Wait for packets, receive one batch and deliver it in order.

        Waits `timeout` seconds at most, for ever with None: that is idle time, for what is there is delivered at once.
        True: call again, also after a timeout with nothing received. False: it is over, and `end` says why. What
        `deliver` raises comes out of here; the packets behind are delivered first by the next call.
        """
        self._dispatch(timeout)
        return not self._reception.over()

    def drain(self) -> int:
        """Never blocks: deliver at most one batch of what is there now. Returns how many packets were delivered."""
        return self._dispatch(0)

    def run(self) -> End:
        """`dispatch()` until it is over, and say why."""
        while self.dispatch():
            pass
        end = self.end
        assert end is not None
        return end

    def batches(self, timeout: float | None = None) -> Batches:
        """Iterate over batches, with `for` or `async for`, until the end or `timeout` seconds without a packet.

        That is idle time: on a busy network it never runs out.
        """
        self._check_open()
        deadline_after(timeout)  # raises for what is none
        return Batches(self, timeout)

    def recv(self, timeout: float | None = None) -> Packet:
        """The next packet. Raises TimeoutError after `timeout` seconds without one, EOFError when it is over."""
        deadline = deadline_after(timeout)
        while True:
            packet = self._step(seconds_left(deadline), self._receiver.take_packet)
            if packet is not None:
                return packet
            end = self.end
            if end is not None:
                raise EOFError(f"reception is over: {end.value}")
            if seconds_left(deadline) == 0:
                raise TimeoutError(f"no packet within {timeout} seconds")

    def __iter__(self) -> Iterator[Packet]:
        receiver = self._receiver
        while True:
            yield from receiver  # all that waits, unless it was stopped, or somebody receives
            if self._closed or (self._step(None, object) is None and self.end is not None):
                self._check_open()
                return

    async def __aiter__(self) -> AsyncIterator[Packet]:
        self._check_open()
        while True:
            packet = self._take_unclaimed()
            if packet is None:
                if self.end is not None:
                    return
                await self._readable(None)
                packet = self._step(0, self._receiver.take_packet)
                if packet is None:
                    continue
            yield packet

    # Ways to end.

    def stop(self) -> None:
        """End reception, from any thread, signal handler or `deliver`; any number of times, at any time.

        After it returns no further `deliver` starts, except that one already running in another thread finishes.
        """
        if not self._forked:
            self._reception.stop()

    def close(self) -> None:
        """Release all that linkrx opened and restore what it changed on a borrowed descriptor. Idempotent.

        Packets and batches stay valid. From inside `deliver` or a signal handler it takes effect when the call that
        is receiving returns. Raises Busy while another thread is inside: `stop()`, and let it return.
        """
        if self._released:
            return
        claim = Claim()
        try:
            if not self._forked:
                waits_elsewhere = self._waiter is not None and not self._waiter.is_here()
                owner = claim if waits_elsewhere else self._owner.setdefault("claim", claim)
                if waits_elsewhere or owner.thread != claim.thread:
                    raise Busy(
                        "close() while another thread is receiving: call stop() and let it return first"
                    )
                if owner is not claim:
                    self._closed = True
                    self._reception.stop()
                    return
            self._closed = True
            self._release()
        finally:
            if self._owner == {"claim": claim}:
                del self._owner["claim"]

    def _release(self) -> None:
        if self._waiter is not None:
            self._waiter.settle(False)  # its task goes on, and finds the dispatcher closed
        self._reception.close(forked=self._forked)
        _alive.discard(self)
        self._released = True  # last: where an exception cut it short, close() can be called again

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_released", True):
            return
        if not self._forked:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self.close()

    # Who may come in.

    @property
    def _forked(self) -> bool:
        """Whether this is a child of the process that opened it. The C library's fork() tells Python nothing."""
        return os.getpid() != self._process

    def _check_open(self) -> None:
        if self._forked:
            raise Closed(
                "this dispatcher belongs to the parent process: after fork() a child may only close() it"
            )
        if self._closed:
            raise Closed("this dispatcher was closed: linkrx.open makes a new one")

    def _step(self, timeout: float | None, take: Callable[[], Taken]) -> Taken | None:
        """Claim the dispatcher, wait for a batch, and take from it; None when there is none.

        The claim is made in one atomic step, for threads with and without a GIL, and given up without calling
        anything: a signal handler that raises can run only where something is called.
        """
        claim = Claim()
        try:
            if self._closed or self._forked:
                self._check_open()
            owner = self._owner.setdefault("claim", claim)
            if owner is not claim:
                if owner.thread != claim.thread or owner.is_live(Dispatcher._step):
                    raise Busy(self._who_is_inside(owner))
                self._owner["claim"] = claim
            if self._closed:
                self._check_open()  # it was closed in between
            try:
                ready = self._reception.await_batch(timeout)
            finally:
                if self._reception.polled:
                    self._reception.show_pending()  # before, for there must be no call behind what `take` does
            return take() if ready else None
        finally:
            if self._owner == {"claim": claim}:
                del self._owner["claim"]
                if self._closed and not self._released:
                    self._release()  # close() was called while this was inside

    def _who_is_inside(self, owner: Claim) -> str:
        if owner.thread != threading.get_ident():
            return "another thread is receiving: a dispatcher belongs to one thread at a time, only stop() is for all"
        where = (
            "inside deliver"
            if self._receiver.delivering
            else "a signal handler while the same thread is receiving"
        )
        return f"receiving from {where}: there, only stop() and close() may be called"

    async def _readable(self, timeout: float | None) -> bool:
        """Back to the event loop before every batch, even under a flood: other tasks want to run."""
        fd = self.fileno()
        if self._waiter is not None:
            raise Busy("another task is receiving: a dispatcher belongs to one task at a time")
        self._waiter = aio.Waiter(fd)
        try:
            return await self._waiter.wait(timeout)
        finally:
            self._waiter = None

    # Handing over.

    def _dispatch(self, timeout: float | None) -> int:
        deliver = self._deliver
        if deliver is None:
            self._check_open()
            raise LinkrxError(
                "nothing to deliver to: pass deliver= to linkrx.open, or iterate over the dispatcher"
            )
        return self._step(timeout, partial(self._deliver_pending, deliver)) or 0

    def _deliver_pending(self, deliver: Deliver) -> int:
        try:
            return self._receiver.deliver(deliver)
        finally:
            if self._reception.polled:
                self._reception.show_pending()

    def _take_unclaimed(self) -> Packet | None:
        """The next packet; None if none waits, if somebody receives, or if it was stopped or closed."""
        return None if self._closed else next(self._receiver, None)

    def _next_batch(self, timeout: float | None) -> Batch | None:
        """The rest of the pending batch or the next one; None when it is over or no packet came in time."""
        deadline = None if timeout is None else deadline_after(timeout)
        while True:
            batch = self._step(
                None if deadline is None else seconds_left(deadline), self._receiver.take_batch
            )
            if batch is not None or self.end is not None or seconds_left(deadline) == 0:
                return batch


class Batches:
    """What `Dispatcher.batches` returns: an iterator of Batch, also an asynchronous one."""

    def __init__(self, dispatcher: Dispatcher, timeout: float | None) -> None:
        self._dispatcher = dispatcher
        self._timeout = timeout

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = self._dispatcher._next_batch(self._timeout)
        if batch is None:
            raise StopIteration
        return batch

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Batch:
        self._dispatcher._check_open()
        deadline = deadline_after(self._timeout)
        while self._dispatcher.end is None:
            if not await self._dispatcher._readable(seconds_left(deadline)):
                break
            batch = self._dispatcher._next_batch(0)
            if batch is not None:
                return batch
        raise StopAsyncIteration
