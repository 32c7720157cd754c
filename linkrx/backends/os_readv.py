"""Pure Python: `os.readv`, one packet per system call. Needs no compiled core, and is read first by whoever
writes a backend.
"""

from __future__ import annotations

import errno
import os
import select
from array import array
from collections.abc import Callable, Iterator
from itertools import repeat

from linkrx.backend import Backend, Capabilities, Descriptors, Owner, ReceiveConfig, align
from linkrx.packets.headers import TRUNCATED

# A Python that was built with musl may lack it.
RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)

# What preadv2 answers where a driver or the kernel does not have RWF_NOWAIT.
_NOWAIT_UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


STRIDE_LEAST = 64
ARENAS = 2  # of a receiver: for no more are buffers kept, for they keep the arena
MADE_MOST = 4  # strides and counts of each


class OsReadv(Backend):
    """Works on every source. Cut packets are flagged; their true length is not known here."""

    name = "os_readv"
    rank = 10
    honours = frozenset({"buffer_sizes"})

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Nothing where each read gives one packet."""
        if capabilities.kind != "capture_file":
            return None
        return "os_readv reads one packet per system call, and a capture file is a stream of bytes"

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._fd = receive.fd
        self._layout = receive.layout
        self._descriptors = descriptors
        # The call, and its arguments behind the descriptor and the buffers. O_NONBLOCK is no help: it belongs to all who have
        # the open file, and any of them may clear it at any time. With RWF_NOWAIT no read waits, whatever they do.
        self._read: Callable[..., int] = os.preadv
        self._arguments: tuple[Iterator[int], ...] = (repeat(-1), repeat(RWF_NOWAIT or 0))
        self._ready: select.poll | None = None
        if RWF_NOWAIT is None:
            self._ask_first()
        self._stride = STRIDE_LEAST  # between the starts of two packets
        self._made: dict[Owner, dict[tuple[int, int], list[list[memoryview]]]] = {}
        self._lengths: list[int] = []
        self._flagged = False

    def fill(self, arena: Owner, room: int) -> int:
        """Read until nothing is there, the descriptors are full, or a further packet might not fit."""
        lengths = self._lengths
        if not lengths:
            self._receive(arena, room)
        count = len(lengths)
        if count > 1 or (count and lengths[0] > self._layout.capacity):
            self._report(count)
        elif count:
            self._report_one(lengths[0])
        return count

    @property
    def held(self) -> int:
        """Packets that were read when an exception came, and not reported yet."""
        return len(self._lengths)

    def close(self) -> None:
        """Let go of the arenas."""
        self._made.clear()

    def _receive(self, arena: Owner, room: int) -> None:
        # Each length goes into the list in the same C call that read the packet: a signal handler that raises,
        # such as Ctrl-C, can run between two packets but never between a packet and its length.
        try:
            buffers = self._until_long(self._buffers(arena, room))
            self._lengths.extend(map(self._read, repeat(self._fd), buffers, *self._arguments))
        except BlockingIOError:
            pass  # the queue is empty
        except OSError as error:
            if self._lengths:
                self._descriptors.report.error = error.errno or 0  # behind what was read
            elif error.errno in _NOWAIT_UNKNOWN and self._arguments:
                self._ask_first()  # the driver knows no RWF_NOWAIT
                self._receive(arena, room)
            else:
                raise

    def _ask_first(self) -> None:
        """Poll before each read, which cannot be told not to wait. Another reader of the same queue could still take the
        packet between the two, and make the read wait.
        """
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        self._ready = ready  # first: without it a read would wait
        self._read, self._arguments = os.readv, ()

    def _buffers(self, arena: Owner, room: int) -> list[list[memoryview]]:
        """The iovecs of each read: a stride apart, and each with room for the largest packet.

        They overlap, so a packet longer than the stride must be the last. One byte more than what is kept: a packet
        that reaches it was cut. Making a memoryview costs almost half of what the read does, so they are kept for
        the next time, which is in the same place when nothing is held.
        """
        last = room - self._layout.capacity - 1
        most = self._descriptors.report.most or self._descriptors.rows
        starts = range(0, last + 1, self._stride)[:most]
        if arena not in self._made and len(self._made) == ARENAS:
            self._made.clear()
        made = self._made.setdefault(arena, {})
        key = (self._stride, len(starts))
        buffers = made.get(key)
        if buffers is None:
            if len(made) >= MADE_MOST:
                made.clear()
            sizes = self._layout.sizes or (self._layout.capacity,)
            memory = arena.view[arena.cursor : arena.cursor + room]
            buffers = made[key] = [_ladder(memory[start:], sizes) for start in starts]
        return buffers

    def _until_long(self, buffers: list[list[memoryview]]) -> Iterator[list[memoryview]]:
        lengths, stride, ready = self._lengths, self._stride, self._ready
        for buffer in buffers:
            if ready is not None and not ready.poll(0):
                return
            yield buffer
            if lengths[-1] > stride:
                return

    def _report_one(self, length: int) -> None:
        """A packet that came alone, and was not cut."""
        columns, report = self._descriptors.columns, self._descriptors.report
        if self._flagged:
            columns.flags[0] = 0
        columns.starts[0] = 0
        columns.lengths[0] = length
        report.receives = 1
        report.end = align(length)
        report.count = 1
        self._lengths.clear()
        if length > self._stride:
            self._learn_stride(length)

    def _report(self, count: int) -> None:
        descriptors, capacity, stride = self._descriptors, self._layout.capacity, self._stride
        columns, report = descriptors.columns, descriptors.report
        kept, longest = self._lengths, max(self._lengths)
        if self._flagged:
            columns.flags[:] = array("H", bytes(2 * descriptors.rows))
            self._flagged = False
        if longest > capacity:
            self._flagged = True
            columns.flags[:count] = array("H", [TRUNCATED if length > capacity else 0 for length in kept])
            kept = [min(length, capacity) for length in kept]
        columns.starts[:count] = array("I", range(0, count * stride, stride))
        columns.lengths[:count] = array("I", kept)
        report.receives = count
        report.end = align((count - 1) * stride + kept[-1])
        report.count = count
        self._lengths.clear()
        self._learn_stride(longest)

    def _learn_stride(self, longest: int) -> None:
        """Room for the longest just seen, and towards shorter ones by halves: what is kept should lie close together."""
        needed = -(-longest // STRIDE_LEAST) * STRIDE_LEAST
        self._stride = max(needed, self._stride // 2 // STRIDE_LEAST * STRIDE_LEAST, STRIDE_LEAST)


def _ladder(memory: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    pieces = []
    for size in (*sizes, 1):
        pieces.append(memory[:size])
        memory = memory[size:]
    return pieces
