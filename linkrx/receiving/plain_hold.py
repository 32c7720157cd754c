"""Holding packets back for `latency` in plain Python. `_core/types/hold.c` has the same in C, and says how it works."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any

from linkrx.memory.columns import COLUMNS, ROW_BYTES, Descriptors
from linkrx.memory.report import Report
from linkrx.packets.plain import START, Owner
from linkrx.receiving.callbacks import Callbacks
from linkrx.receiving.deadline import HOLD

SLICE = 1.0  # as in receive.c


class Holding(Callbacks):
    """The part of a receiver that holds packets back, and hands over those of several fills together."""

    _report: Report
    _stopping: bool
    _flushing: bool
    _closed: bool
    _ended: bool
    _end_follows: bool
    _inside: Callable[[Callable[[], bool]], bool]
    _obtain: Callable[[], int]

    @property
    def _left(self) -> int:
        raise NotImplementedError

    def _prepare_holding(self, described: Descriptors, room: int, hold_most: int, latency: float) -> None:
        self._described, self._room, self._hold_most, self._latency = described, room, hold_most, latency
        # A mechanism that ignores `report.most` may report as many packets as it has rows, behind others.
        rows = described.rows * (2 if latency else 1)
        self._arena = Owner(START + room + rows * ROW_BYTES)
        self._collected = Descriptors(rows)
        self._collected.report = described.report
        self._collected_end = self._collected_receives = 0

    @property
    def _offset(self) -> int:
        """The offset of the next frame from the first one: those that are held back come before it."""
        return self._collected_end if self._report.held_back else 0

    @property
    def _holds_full(self) -> bool:
        return self._report.held_back >= self._described.rows or self._offset > self._hold_most

    def _fill_behind(self) -> int:
        """Let the mechanism fill the memory behind the frames that are held back."""
        offset = self._offset
        self._arena.cursor = START + offset
        return self._fill(self._arena, self._room - offset)

    def _collect(self, count: int) -> None:
        """Hold back the `count` frames of the last fill."""
        report, offset = self._report, self._offset
        if not count:
            return
        at = report.held_back
        given, taken = self._described.columns, self._collected.columns
        for name in COLUMNS:
            getattr(taken, name)[at : at + count] = getattr(given, name)[:count]
        taken.starts[at : at + count] = array("I", [offset + start for start in given.starts[:count]])
        receives = self._collected_receives if at else 0
        # Nothing is called from here on, so no signal handler runs.
        self._collected_end = offset + report.end
        self._collected_receives = receives + report.receives
        report.held_back = at + count
        report.count = 0

    def _classify_collected(self, classify: Callable[[Any, int], None]) -> None:
        report = self._report
        report.end, report.receives = self._collected_end, self._collected_receives
        self._arena.cursor = START
        classify(self._arena, report.held_back)

    @property
    def _is_to_end(self) -> bool:
        """Whether the receiver is to end."""
        return any((self._stopping, self._flushing, self._ended, self._closed, self._end_follows))

    def _hold_more(self) -> bool:
        """Receive what is in the queue, and hold it back. True: hand over what is held back now."""
        report, count = self._report, -1
        while count:
            if self._is_to_end or not self._latency or self._left or report.classified:
                return True
            count = self._obtain()
            self._collect(count)
            if not report.held_back or report.error or report.held:
                return True
            if self._holds_full or self._is_to_end:
                return True
        return False

    def _hold_back(self) -> bool:
        return self._inside(self._hold_more)

    def _hold(self, deadline: float | None) -> None:
        """Hold back what comes until the latency is over, a batch is full, or something else is to be done."""
        until = time.monotonic() + self._latency
        if deadline is not None:
            until = min(until, deadline)
        while not self._is_to_end and (left := until - time.monotonic()) > 0:
            if self._wakeup.sleep(min(left, HOLD)):
                return
            if left <= HOLD:
                continue
            before = self._report.held_back
            if self._hold_more():
                return
            left = until - time.monotonic() - HOLD
            if self._report.held_back == before and left > 0 and not self._wakeup.wait(min(left, SLICE)):
                self._look_at_owner()
