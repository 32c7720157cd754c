"""The filter that linkrx runs, and its replacement, in plain Python. In C: `_core/types/filter.c`."""

from __future__ import annotations

import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable

from linkrx.kernel import bpf
from linkrx.memory.counters import BYTES, CUT, FILTERED, PACKETS, RUNTS
from linkrx.memory.report import Report
from linkrx.packets.headers import TRUNCATED
from linkrx.packets.plain import Packet, restore
from linkrx.receiving.callbacks import Callbacks
from linkrx.sources.file_filter import FilePrograms
from linkrx.stages.classify import Filter


class OwnFilter:
    """The filter that classification runs, and the next one, which replaces it before the next delivery."""

    def __init__(self) -> None:
        self.rule = Filter()
        self._until: float | None = None
        self._wanted: tuple[Filter, float | None] | None = None

    def want(self, program: bytes, tags: bool, seconds: float) -> None:
        """Store the next filter. With `seconds` of 0 or more it ends when the queue was empty, but not within these seconds."""
        instructions = tuple(struct.iter_unpack("=HBBI", program))
        found = bpf.wrong(instructions) if instructions else None
        if found is not None:
            raise ValueError(f"the program is invalid: {found[1]}")
        until = None if seconds < 0 else time.monotonic() + seconds
        self._wanted = Filter(instructions, tags), until

    @property
    def exchanging(self) -> bool:
        """Whether a next filter is stored."""
        return self._wanted is not None

    def exchange(self, packets: Iterable[Packet], counters: array[int]) -> list[Packet]:
        """Take the next filter. Returns the waiting packets that it accepts."""
        if self._wanted is None:
            return list(packets)
        (wanted, until), rule = self._wanted, self.rule
        rule.program, rule.tags = wanted.program, wanted.tags
        filtered = (self._filtered(packet, counters) for packet in packets)
        left = [packet for packet in filtered if packet is not None]
        self._until, self._wanted = until, None  # last: an exception of a signal handler may come before
        return left

    def is_due(self) -> bool:
        """Whether it ends if the queue is empty now."""
        return self._until is not None and time.monotonic() >= self._until

    def end(self) -> None:
        """Remove the filter."""
        self.rule.program, self._until = (), None

    def _filtered(self, packet: Packet, counters: array[int]) -> Packet | None:
        if not self.rule.program:
            return packet
        link_header = len(packet.link_header)
        given = bpf.Filtered(
            bytes(packet),
            packet.wire_length,
            link_header,
            packet.interface,
            packet.link_type,
            packet.outgoing,
            None if packet.vlan is None else (packet.vlan.tpid, packet.vlan.tci),
            0 if link_header else packet.protocol,
        )
        kept = bpf.kept(self.rule.program, given, tags=self.rule.tags)
        counters[BYTES] -= len(packet) - kept
        if not kept or kept < link_header:
            counters[BYTES] -= kept
            counters[PACKETS] -= 1
            counters[RUNTS if kept else FILTERED] += 1
            return None
        if kept == len(packet):
            return packet
        counters[CUT] += not packet.truncated
        _, frame, timestamp, wire_length, interface, protocol, flags, *rest = packet.__reduce__()[1]
        return restore(frame[:kept], timestamp, wire_length, interface, protocol, flags | TRUNCATED, *rest)


class Filtering(Callbacks):
    """The part of a receiver that replaces its filter. It needs the claim of the dispatcher."""

    _filter: OwnFilter
    _pending: list[Packet]
    _next: int
    _closed: bool
    _counters: array[int]
    _report: Report
    _inside: Callable[[Callable[[], None]], None]
    _take_in: Callable[[], None]
    _fill_behind: Callable[[], int]

    @property
    def _left(self) -> int:
        raise NotImplementedError

    @property
    def _thread(self) -> int | None:
        raise NotImplementedError

    def _fill_filtered(self) -> int:
        """Fill. A filter for packets that were queued before ends once the queue was empty."""
        due, report = self._filter.is_due(), self._report
        count = self._fill_behind()
        if due and not any((count, report.classified, report.error, report.held, report.held_back)):
            self._filter.end()
        return count

    def _set_filter(self, program: bytes | FilePrograms, tags: bool, seconds: float, /) -> bool:
        assert isinstance(program, bytes)  # files take the core
        self._filter.want(program, tags, seconds)
        return self._exchange_filter()

    def _exchange_filter(self) -> bool:
        if not self._filter.exchanging or self._closed or self._thread == threading.get_ident():
            return True
        if self._thread is None:
            self._inside(lambda: None)
            return True
        if self._wakeup.event is not None:
            self._wakeup.event.set()  # wake the receiving thread
        return False

    def _exchange(self) -> None:
        if self._filter.exchanging:
            if self._report.classified and not self._left:
                self._take_in()
            self._pending = self._filter.exchange(self._pending[self._next :], self._counters)
            self._next = 0
            self._set_readable()
