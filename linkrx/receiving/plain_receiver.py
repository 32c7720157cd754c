"""The receiver in plain Python, simple rather than fast. In C: `_core/types/receive.c`, `deliver.c` and `receiver.c`.

It calls the same methods of its subclass, `linkrx.receiving.reception`, which receive.c lists. One promise is weaker than
in C: an exception of a signal handler may lose the rest of the current batch, which is then counted as undelivered. An
exception of `deliver` loses nothing.
"""

from __future__ import annotations

import errno
import math
import select
import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from linkrx.memory.columns import ROW_BYTES, Descriptors, Table
from linkrx.memory.counters import received
from linkrx.memory.framing import Framing
from linkrx.packets.plain import START, VNET_BYTES, Batch, Packet, restore
from linkrx.receiving.deadline import deadline_after, earlier, seconds_left
from linkrx.receiving.plain_claim import Claiming
from linkrx.receiving.plain_filter import Filtering, OwnFilter
from linkrx.receiving.plain_hold import SLICE, Holding
from linkrx.receiving.plain_sending import Sending
from linkrx.receiving.stats import End
from linkrx.stages.classify import classifier

if TYPE_CHECKING:
    from linkrx.packets import Deliver

# As in receive.c.
ERRORS_IN_A_ROW = 8
IDLE_WAKES = 8
PAUSE = 0.01

Result = TypeVar("Result")


class Receiver(Claiming, Filtering, Holding, Sending):
    """The part of a dispatcher that runs once per packet or once per wake-up."""

    _pending: list[Packet]  # the first `_next` of them were handed over
    _incoming: list[Packet]  # the batch that is being made
    _next = 0
    _deliver: Callable[..., object] | None
    _stopping = _flushing = _delivering = _end_follows = _link_down = _source_paused = _looped = False
    _batches = _receives = _waits = _spurious = 0
    _drops_due = 0.0
    _flush_until: tuple[int, float] | None = None  # the limits of a flush: a number of packets, and a time

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Nothing is received before _prepare()."""
        self = object.__new__(cls)
        self._claims = {}
        self._pending = []
        self._incoming = []
        self._filter = OwnFilter()
        return self

    def _prepare(
        self,
        deliver: Deliver | None,
        descriptors: bytearray,
        rows: int,
        counters: array[int],
        room: int,
        prefix: int,
        packet_info: int,
        link_header: int,
        link_type: int,
        per_packet: int,
        vnet: int,
        big_endian: bool,
        interface: int,
        may_hang_up: bool,
        source: int,
        event: int,
        epoll: int,
        latency: float,
        hold_most: int,
        /,
    ) -> None:
        described = Descriptors(rows, descriptors)
        self._stripped = Framing(
            bool(link_header), vnet, bool(packet_info), not big_endian, link_type, per_packet
        )
        self._report = described.report
        self._lengths = described.columns.lengths
        self._prepare_holding(described, room, hold_most, latency)
        make = partial(classifier, framing=self._stripped, counters=counters, interface=interface)
        self._classify: Callable[[Any, int], None] = make(described, filter=self._filter.rule)
        self._classify_held: Callable[[Any, int], None] = make(self._collected, filter=self._filter.rule)
        self._counters = counters
        self._deliver = deliver
        self._may_hang_up = may_hang_up

    # Receiving.

    def _receive(self) -> bool:
        """Receive once, without waiting. True: frames were received, even if none is a packet."""
        report = self._report
        for _ in range(ERRORS_IN_A_ROW):
            count = self._obtain()
            if report.held_back and not report.classified:
                self._collect(count)
                self._classify_collected(self._classify_held)
            elif count and not report.classified:
                self._classify(self._arena, count)
            if report.classified:
                self._take_in()
                return True
            if self._end_follows:  # nothing came before the end
                return False
            if self._was_down and not report.error:
                self._was_down = False
                report.error = errno.ENETDOWN
            if not report.error:
                return False
            self._handle_error()
            if self._ended:
                return False
        return False

    def _obtain(self) -> int:
        """Fill, unless received frames wait here already. Returns how many are neither classified nor held back."""
        report = self._report
        count = report.count
        enough = report.held_back and self._holds_full
        if not count and not report.classified and not enough and (not report.error or report.held):
            count = self._fill_filtered()
        if count and not report.classified and self._may_hang_up and not self._lengths[count - 1]:
            count = self._without_hangup(count)
        return count

    def _take_in(self) -> None:
        report, memory, framing = self._report, self._arena.view[START:], self._stripped
        count, rows, end = report.classified - 1, report.rows, report.end
        table = Table(memory[end : end + rows * ROW_BYTES], rows)
        size = framing.vnet_header_size
        vnet = (1 if framing.vnet_little_endian else 2) if size else 0
        # After an exception of a signal handler this goes on with the rows that are missing.
        packets = self._incoming
        for row in range(len(packets), count):
            start = table.starts[row]
            header = bytes(memory[start - size :][:VNET_BYTES]) if vnet else b""
            packets.append(
                restore(
                    bytes(memory[start : start + table.lengths[row]]),
                    table.timestamps[row],
                    table.wire_lengths[row],
                    table.interfaces[row],
                    table.protocols[row],
                    table.flags[row],
                    table.vlan_tcis[row],
                    table.vlan_tpids[row],
                    *self._link_of(table, row),
                    *(vnet, header, 0),  # no packet of a capture file
                )
            )
        self._pending, self._next, self._incoming = packets, 0, []
        self._batches += 1
        self._receives += report.receives
        report.classified = 0

    def _link_of(self, table: Table, row: int) -> tuple[int, bytes, int]:
        """Link type, link address, and length of the link header."""
        framing = self._stripped
        if not framing.per_packet:
            return framing.link_type, b"", framing.link_header
        link_header, size = table.link_headers[row], table.address_lengths[row]
        address = b"" if link_header else table.addresses[row].to_bytes(8, sys.byteorder)[:size]
        return table.link_types[row], address, link_header

    def _await(self, timeout: float | None) -> str:
        """Wait up to `timeout` seconds until packets are pending: "ready", "nothing" or "over".

        With a timeout of 0 it receives again if all frames were skipped, up to as many frames as a batch has rows.
        """
        deadline = deadline_after(timeout)
        before, idle = received(self._counters), 0
        while True:
            if self._source_paused:
                self._resume_source()
            if self._ended or ((self._stopping or self._end_follows) and self._over()):
                return "over"
            self._exchange()
            if self._left:
                return "ready"
            most, flushed = self._flush_until or (self._begin_flush() if self._flushing else (0, math.inf))
            looked = time.monotonic()  # after the flush began, so that one read that finds nothing ends it
            if self._flushing and received(self._counters) >= most:
                self._stopping = True
                continue
            known_down = self._link_down and not self._report.error
            if self._receive():
                self._spurious = 0
                now = time.monotonic()
                if now >= self._drops_due:
                    self._drops_due = now + self._look_at_drops()
                if self._left:
                    return "ready"
                if timeout == 0 and received(self._counters) - before < len(self._lengths):
                    continue  # there may be a packet behind the skipped frames
                return "nothing"
            if known_down:
                self._look_at_link()
            if looked >= flushed:  # it was empty once
                self._stopping = True
            if self._ended or self._stopping or self._end_follows:
                continue
            if timeout == 0:
                self._spurious += 1
                if (self._polled or self._looped) and self._spurious > IDLE_WAKES:
                    self._pause_source()
                return "nothing"
            left = seconds_left(deadline)
            if left == 0:
                return "nothing"
            if self._flushing:  # the event is set, so only the source is polled
                select.select([self._wakeup.source], [], [], min(PAUSE, flushed - looked))
                continue
            idle += self._wait(SLICE if left is None else min(left, SLICE), idle < IDLE_WAKES, deadline)

    def _begin_flush(self) -> tuple[int, float]:
        most, seconds = self._flush_limits()
        self._flush_until = received(self._counters) + most, time.monotonic() + seconds
        return self._flush_until

    def _wait(self, seconds: float, on_source: bool, deadline: float | None) -> bool:
        if self._readable:
            self._set_readable()
        self._waits += 1
        if not on_source:
            self._wakeup.sleep(min(seconds, PAUSE))
            return False
        readable = self._wakeup.wait(seconds)
        if not readable:
            self._look_at_owner()
        if readable and self._latency:
            self._hold(deadline)
        return readable

    @property
    def _has_something(self) -> bool:
        report = self._report
        reported = (report.count, report.held_back, report.classified, report.error, report.held)
        ending = (self._ended, self._end_follows, self._stopping, self._flushing, self._was_down)
        return self._left > 0 or any(reported) or any(ending)

    @property
    def _was_full(self) -> bool:
        """Whether the last receive may have ended because the batch was full, by rows or by bytes."""
        return self._report.rows >= len(self._lengths) or self._report.end > self._hold_most

    # Receiving.

    def dispatch(self, timeout: float | None = None) -> bool:
        """Wait for packets, receive one batch and deliver it in order. False: reception is over."""

        def step() -> bool:
            self._deliver_what_comes(timeout)
            return self._is_over()

        return not self._inside(step) and not self._closed

    def _is_over(self) -> bool:
        """Whether reception is over. Needs the claim, because it may drop pending packets."""
        return self._ended or (
            (self._stopping or self._end_follows) and not self._closed and bool(self._over())
        )

    def run(self, *, count: int | None = None, duration: float | None = None) -> End | None:
        """`dispatch()` until the end, or `count` packets were delivered, or `duration` seconds have passed.

        Returns the End, or None if a limit was reached.
        """
        if count is not None and not isinstance(count, int):
            raise TypeError(f"count={count!r}: give a number of packets, or None for no limit")
        if count is not None and count < 1:
            raise ValueError(f"count={count!r}: give a number of packets above 0, or None for no limit")
        deadline = deadline_after(duration, "duration")

        def step() -> tuple[int, bool]:
            delivered = self._deliver_what_comes(seconds_left(deadline), count, deadline)
            return delivered, self._is_over()

        over = self._inside(lambda: False)  # raises Closed and Busy also with a duration of 0
        while not over and count != 0 and seconds_left(deadline) != 0 and not self._closed:
            delivered, over = self._inside(step)
            if count is not None:
                count -= delivered
        end: End | None = self.end
        return end

    def drain(self) -> int:
        """Receive without waiting, and deliver at most one batch. Returns the number of packets."""
        return self._inside(lambda: self._deliver_what_comes(0))

    def _deliver_what_comes(
        self, timeout: float | None, most: int | None = None, deadline: float | None = None
    ) -> int:
        if self._deliver is None:
            self._without_deliver()
        delivered = 0
        if self._await(timeout) == "ready":
            self._delivering = True
            try:
                while self._left and not (self._stopping or self._filter.exchanging) and delivered != most:
                    packet = self._pending[self._next]
                    remote, local, protocol = packet.remote, packet.local, packet.protocol
                    # No signal handler runs between here and the first instruction of `deliver`: nothing is called.
                    self._next += 1
                    delivered += 1
                    self._deliver(remote, local, protocol, packet)
                    if deadline is not None and time.monotonic() >= deadline:
                        break
            finally:
                self._delivering = False
        return delivered

    def recv(self, timeout: float | None = None) -> Packet:
        """The next packet. Raises TimeoutError after `timeout` seconds, and Ended after the end."""
        deadline = deadline_after(timeout)

        def step() -> Packet:
            while True:
                outcome = self._await(seconds_left(deadline))
                if outcome == "ready":
                    return self._take_next()
                if outcome == "over":
                    self._raise_ended()
                if seconds_left(deadline) == 0:
                    raise TimeoutError(f"no packet within {timeout} seconds")

        return self._inside(step)

    def __iter__(self) -> Self:
        return self._inside(lambda: self)

    def __next__(self) -> Packet:
        def step() -> Packet | None:
            while (outcome := self._await(None)) == "nothing":
                pass
            return self._take_next() if outcome == "ready" else None

        packet = self._inside(step)
        if packet is None:
            raise StopIteration
        return packet

    def _next_batch(self, timeout: float | None, until: float | None, /) -> Batch | None:
        deadline = earlier(deadline_after(timeout), until)
        if seconds_left(until) == 0:
            return None

        def step() -> Batch | None:
            while True:
                outcome = self._await(seconds_left(deadline))
                if outcome == "ready":
                    batch = Batch._of(self._pending[self._next :])
                    self._pending, self._next = [], 0
                    return batch
                if outcome == "over" or seconds_left(deadline) == 0:
                    return None

        return self._inside(step)

    def _poll(self) -> bool:
        return self._inside(lambda: self._await(0)) != "nothing"

    def _take(self) -> Packet | None:
        return self._inside(lambda: self._take_next() if not self._is_over() and self._left else None)

    # For the subclass.

    def _take_next(self) -> Packet:
        packet = self._pending[self._next]
        self._next += 1
        return packet

    @property
    def _left(self) -> int:
        return len(self._pending) - self._next

    def _use(self, mechanism: int, /) -> None:
        return

    def _drop(self) -> None:
        if self._report.classified and not self._left:
            self._take_in()
        self._count_undelivered(self._pending[self._next :])
        self._pending, self._next = [], 0

    def _release(self) -> bool:
        self._pending, self._next = [], 0
        return True

    def _copy_held(self) -> None:
        return
