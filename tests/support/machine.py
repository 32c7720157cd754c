"""The rules of a state machine for a dispatcher, and its invariants."""

from __future__ import annotations

import select
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

import linkrx
from support.framed import Check, hold_arrays, hold_batch, hold_packet
from support.ledger import Ledger

KEPT_MOST = 24


class Thrown(Exception):
    """The exception that a deliver raises."""


class Machine(Ledger):
    """Rules and invariants. Subclasses provide the source."""

    @rule()
    @precondition(lambda self: self.closed)
    def use_after_close(self) -> None:
        """After close() inside deliver, every call raises Closed."""
        assert self.rx is not None
        for call in (self.rx.dispatch, self.rx.drain, self.rx.recv, self.rx.stats, self.rx.fileno):
            with pytest.raises(linkrx.Closed):
                call()

    # Calls that receive.

    @rule(what=st.sampled_from(["nothing", "raise", "stop", "close", "reenter"]), after=st.integers(0, 6))
    @precondition(Ledger.is_open)
    def dispatch(self, what: str, after: int) -> None:
        """Dispatch one batch, and do `what` inside deliver."""
        self.calls += 1
        rx = self.rx
        assert rx is not None
        inside = {"raise": self.throw, "stop": self.stop, "close": self.close_inside, "reenter": self.reenter}
        self.script, self.countdown = inside.get(what), after
        handed, due, received, stopped = self.handed, self.due, self.received(), self.stopped
        try:
            goes_on = rx.dispatch(timeout=0)
        except Thrown:
            goes_on = True
        finally:
            self.script = None
        if stopped:
            assert self.handed == handed
        if not goes_on:
            assert self.closed or (rx.end is not None and self.ends_here())
        else:
            assert not self.closed
            assert not self.stopped
            assert not due or self.handed > handed or self.received() > received, "nothing was received"

    def received(self) -> int:
        """How many frames the dispatcher has received, by its counters."""
        assert self.rx is not None
        if self.closed:
            return 0
        stats = self.rx.stats()
        return stats.packets + stats.runts + stats.empty + stats.unknown_protocol

    def throw(self) -> None:
        """Raise inside deliver."""
        raise Thrown

    def close_inside(self) -> None:
        """Close inside deliver."""
        assert self.rx is not None
        self.rx.close()
        self.closed = True

    def reenter(self) -> None:
        """Receive inside deliver."""
        assert self.rx is not None
        with pytest.raises(linkrx.LinkrxError):
            self.rx.drain()

    @rule()
    @precondition(Ledger.is_open)
    def drain(self) -> None:
        """Deliver one batch without waiting. The result is the number of delivered packets."""
        self.calls += 1
        assert self.rx is not None
        before, ends = self.handed, self.stopped
        number = self.rx.drain()
        assert number == self.handed - before
        assert not (ends and number)

    @rule(copied=st.booleans(), number=st.integers(1, 8))
    @precondition(Ledger.is_open)
    def recv(self, copied: bool, number: int) -> None:
        """Receive some packets one by one, and keep them."""
        self.calls += 1
        assert self.rx is not None
        for _ in range(number):
            due = self.due
            try:
                packet = self.rx.recv(timeout=0)
            except TimeoutError:
                return
            except EOFError:
                assert self.ends_here()
                return
            assert due
            assert not self.stopped
            self.keep(hold_packet(packet.copy() if copied else packet, self.take(packet), self.setup))

    @rule(number=st.integers(1, 5))
    @precondition(lambda self: self.is_open() and not self.stopped and self.due)
    def iterate(self, number: int) -> None:
        """Iterate over a few packets."""
        self.calls += 1
        assert self.rx is not None
        for packet in self.rx:
            self.keep(hold_packet(packet, self.take(packet), self.setup))
            number -= 1
            if not number or not self.due:
                break

    @rule(copied=st.booleans(), viewed=st.booleans(), number=st.integers(1, 3))
    @precondition(Ledger.is_open)
    def batches(self, copied: bool, viewed: bool, number: int) -> None:
        """Receive whole batches, and the rest of one."""
        self.calls += 1
        assert self.rx is not None
        for batch in self.rx.batches(timeout=0):
            assert not self.stopped
            framed = [self.take(packet) for packet in batch]
            assert framed, "a batch is never empty"
            held = batch.copy() if copied else batch
            if viewed:
                self.keep(hold_arrays(held, framed))
            self.keep(hold_batch(held, framed, self.setup))
            number -= 1
            if not number:
                break

    @rule()
    @precondition(Ledger.is_open)
    def poll(self) -> None:
        """From now on, poll the dispatcher's descriptor."""
        assert self.rx is not None
        assert self.rx.fileno() >= 0
        self.polled = True

    # Objects that are kept.

    def keep(self, check: Check) -> None:
        """Hold an object, and check it from now on."""
        self.kept.append(check)
        del self.kept[:-KEPT_MOST]

    @rule(data=st.data())
    @precondition(lambda self: self.kept)
    def drop(self, data: st.DataObject) -> None:
        """Drop some of the held objects."""
        first = data.draw(st.integers(0, len(self.kept) - 1))
        del self.kept[first : first + data.draw(st.integers(1, KEPT_MOST))]

    # Invariants.

    @invariant()
    def what_is_kept_is_true(self) -> None:
        """No kept object changes."""
        for check in self.kept:
            check()

    @invariant()
    def counters_are_true(self) -> None:
        """Until the end, the counters equal the outcomes of the first frames, as many as the counters add up to."""
        if not self.is_open() or self.stopped:
            return
        assert self.rx is not None
        stats = self.rx.stats()
        received = self.framed[: self.received()]
        kinds = Counter(framed.kind for framed in received)
        assert (stats.packets, stats.runts, stats.empty, stats.unknown_protocol) == (
            kinds["packet"],
            kinds["runts"],
            kinds["empty"],
            kinds["unknown_protocol"],
        )
        assert stats.bytes == sum(len(framed.frame) for framed in received)
        assert stats.truncated == sum(framed.truncated for framed in received)
        assert self.handed <= stats.packets
        assert (stats.undelivered, stats.demotions) == (0, 0)
        assert (self.rx.end is None) or (self.rx.end is linkrx.End.EOF and self.hung_up)

    @invariant()
    def descriptor_tells(self) -> None:
        """The descriptor is readable while packets wait, in the kernel or inside linkrx."""
        if self.is_open() and self.polled and not self.stopped and self.due:
            assert self.rx is not None
            assert select.select([self.rx], [], [], 0)[0]

    def teardown(self) -> None:
        """Receive all remaining packets, and account for every frame."""
        try:
            if self.is_open() and not self.stopped:
                assert self.rx is not None
                for _ in range(2 * len(self.waiting) + 3):
                    self.rx.drain()
                assert not self.due
                if self.hung_up:
                    assert self.rx.end is linkrx.End.EOF
            if self.is_open():
                self.settle_and_close()
            elif self.closed:
                self.close()
            waiting = self.waiting
            assert self.read_rest() == waiting
            assert self.accounted == self.sent
            self.what_is_kept_is_true()
        finally:
            self.kept.clear()
            if self.rx is not None:
                self.rx.close()
            self.stack.close()
