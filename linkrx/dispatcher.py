"""The outer half of the loop: the ways in which packets are handed over, and who may ask for them."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import repeat
from types import TracebackType

from linkrx import aio
from linkrx.backend import Backend
from linkrx.batch import Batch
from linkrx.capabilities import Capabilities
from linkrx.choice import Choice
from linkrx.classify import ADDRESSES
from linkrx.errors import Busy, Closed, LinkrxError
from linkrx.options import Options
from linkrx.packet import Packet
from linkrx.reception import Reception, deadline_after, seconds_left
from linkrx.source import Source
from linkrx.stats import End, Stats

# remote and local link address, protocol, packet
Deliver = Callable[["bytes | None", "bytes | None", int, Packet], object]

_alive: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _after_fork() -> None:
    for dispatcher in list(_alive):
        dispatcher._forked = True


os.register_at_fork(after_in_child=_after_fork)


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
        self._closed = True  # until all is open there is nothing for __del__ to close
        self._forked = False
        self._deliver = deliver
        self._delivering = False
        self._owner: dict[str, int] = {}
        self._waiter: aio.Waiter | None = None
        self._reception = Reception(source, options, choice, backends, deliver=deliver is not None)
        self._closed = False
        _alive.add(self)

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
    def end(self) -> End | None:
        """Why it is over, or None while it is not."""
        reception = self._reception
        return reception.end or (End.STOPPED if reception.stopping else None)

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

        Waits `timeout` seconds at most, for ever with None. True: call again, also after a timeout with nothing
        received. False: it is over, and `end` says why. What `deliver` raises comes out of here; the packets behind
        are delivered first by the next call.
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
        """Iterate over batches, with `for` or `async for`, until the end or `timeout` seconds without a packet."""
        self._check_open()
        return Batches(self, timeout)

    def recv(self, timeout: float | None = None) -> Packet:
        """The next packet. Raises TimeoutError after `timeout` seconds, EOFError when it is over."""
        deadline = deadline_after(timeout)
        while True:
            if self._await_batch(seconds_left(deadline)):
                for packet in self._hand_over():
                    return packet
            end = self.end
            if end is not None:
                raise EOFError(f"reception is over: {end.value}")
            if seconds_left(deadline) == 0:
                raise TimeoutError(f"no packet within {timeout} seconds")

    def __iter__(self) -> Iterator[Packet]:
        while self._await_batch(None) or self.end is None:
            yield from self._hand_over()

    async def __aiter__(self) -> AsyncIterator[Packet]:
        self._check_open()
        while self.end is None:
            await self._readable(None)
            if self._await_batch(0):
                for packet in self._hand_over():
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

        Packets and batches stay valid. Raises Busy while another thread is inside: `stop()`, and let it return.
        """
        if self._closed:
            return
        waiter = self._waiter
        if not self._forked:
            owner = self._owner.get("thread")
            if owner not in (None, threading.get_ident()) or (waiter is not None and not waiter.is_here()):
                raise Busy("close() while another thread is receiving: call stop() and let it return first")
            if waiter is not None:
                waiter.settle(False)  # its task goes on, and finds the dispatcher closed
        self._closed = True
        _alive.discard(self)
        if self._delivering:
            self._reception.stop()
        self._reception.close(forked=self._forked)

    def __enter__(self) -> Dispatcher:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if not self._forked:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self.close()

    # Who may come in.

    def _check_open(self) -> None:
        if self._forked:
            raise Closed(
                "this dispatcher belongs to the parent process: after fork() a child may only close() it"
            )
        if self._closed:
            raise Closed("this dispatcher was closed: linkrx.open makes a new one")

    def _enter(self) -> None:
        """Claim the dispatcher for this thread. Whoever calls this clears `_owner` on leaving."""
        self._check_open()
        me = threading.get_ident()
        # One atomic step. A claim of this thread's own is one that an interrupt left behind.
        owner = self._owner.setdefault("thread", me)
        if owner != me:
            raise Busy(
                "another thread is receiving: a dispatcher belongs to one thread at a time, only stop() is for all"
            )
        if self._delivering:
            raise Busy("receiving from inside deliver: there, only stop() and close() may be called")

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

    def _await_batch(self, timeout: float | None) -> bool:
        self._enter()
        try:
            return self._reception.await_batch(timeout)
        finally:
            self._owner.clear()
            if self._reception.pending is None:
                self._reception.show_pending()  # else whoever takes from it does

    def _dispatch(self, timeout: float | None) -> int:
        deliver = self._deliver
        if deliver is None:
            self._check_open()
            raise LinkrxError(
                "nothing to deliver to: pass deliver= to linkrx.open, or iterate over the dispatcher"
            )
        self._enter()
        try:
            return self._deliver_pending(deliver) if self._reception.await_batch(timeout) else 0
        finally:
            if not self._delivering:
                self._owner.clear()
                self._reception.show_pending()

    def _deliver_pending(self, deliver: Deliver) -> int:
        reception = self._reception
        batch = reception.pending
        assert batch is not None
        first, count = reception.next, len(batch)
        reached = first
        self._delivering = True
        try:
            # `reached` moves on in the step before the call, with nothing between that a signal could interrupt.
            if reception.addresses:
                for index, (remote, local, protocol) in enumerate(
                    addresses_of(reception.addresses, first, count), first
                ):
                    packet = Packet()
                    packet._batch = batch
                    packet._index = index
                    reached = index + 1
                    deliver(remote, local, protocol, packet)
                    if reception.stopping:
                        break
            else:
                for index, protocol in enumerate(batch.protocols[first:], first):
                    packet = Packet()
                    packet._batch = batch
                    packet._index = index
                    reached = index + 1
                    deliver(None, None, protocol, packet)
                    if reception.stopping:
                        break
        finally:
            if reached == count:
                reception.pending = None
            else:
                reception.next = reached
            self._delivering = False
        return reached - first

    def _hand_over(self) -> Iterator[Packet]:
        """The packets of the pending batch. Each counts as handed over from the moment it is given."""
        reception = self._reception
        try:
            while reception.pending is not None and not reception.stopping:
                batch, index = reception.pending, reception.next
                packet = Packet()
                packet._batch = batch
                packet._index = index
                if index + 1 == batch._count:
                    reception.pending = None
                else:
                    reception.next = index + 1
                yield packet
        finally:
            reception.show_pending()

    def _next_batch(self, timeout: float | None) -> Batch | None:
        """The rest of the pending batch or the next one; None when it is over or no packet came in time."""
        deadline = deadline_after(timeout)
        reception = self._reception
        while True:
            if self._await_batch(seconds_left(deadline)):
                assert reception.pending is not None
                batch = reception.pending.behind(reception.next)
                reception.pending = None
                reception.show_pending()
                return batch
            if self.end is not None or seconds_left(deadline) == 0:
                return None


def addresses_of(addresses: bytearray, first: int, count: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Remote, local and protocol of packets `first` to `count`.

    Most batches come from one neighbour by one protocol: then all share the three objects made for the first.
    """
    known = bytes(addresses[first * ADDRESSES.size : count * ADDRESSES.size])
    if known == known[: ADDRESSES.size] * (count - first):
        return repeat(ADDRESSES.unpack_from(known), count - first)
    return ADDRESSES.iter_unpack(known)


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
        deadline = deadline_after(self._timeout)
        while self._dispatcher.end is None:
            if not await self._dispatcher._readable(seconds_left(deadline)):
                break
            batch = self._dispatcher._next_batch(0)
            if batch is not None:
                return batch
        raise StopAsyncIteration
