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

from linkrx.arena import Arena
from linkrx.backend import Backend, Receive
from linkrx.capabilities import Capabilities
from linkrx.columns import COUNT, END, RECEIVES, Descriptors, align
from linkrx.packet import TRUNCATED

# What preadv2 answers where a driver or the kernel does not have RWF_NOWAIT.
_NOWAIT_UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class OsReadv(Backend):
    """Works on every source. Cut packets are flagged; their true length is not known here."""

    name = "os_readv"
    rank = 10
    honours = frozenset({"buffer_sizes"})

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Nothing that has packet boundaries."""
        return None

    def __init__(self, receive: Receive, descriptors: Descriptors) -> None:
        self._fd = receive.fd
        self._layout = receive.layout
        self._descriptors = descriptors
        # The call, and its arguments behind the descriptor and the buffers. A blocking descriptor is not ours to
        # change: O_NONBLOCK would show in every process that shares it.
        self._read: Callable[..., int] = os.readv
        self._arguments: tuple[Iterator[int], ...] = ()
        self._ready: select.poll | None = None
        if not receive.capabilities.nonblocking:
            self._read = os.preadv
            self._arguments = (repeat(-1), repeat(os.RWF_NOWAIT))
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._error: OSError | None = None
        self._flagged = False

    def fill(self, arena: Arena, room: int) -> int:
        """Read until nothing is there, the descriptors are full, or a further packet might not fit."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if not self._lengths:
            self._receive(arena, room)
        count = len(self._lengths)
        if count:
            self._report(count)
        return count

    def _receive(self, arena: Arena, room: int) -> None:
        # Each length goes into the list in the same C call that read the packet: a signal handler that raises,
        # such as Ctrl-C, can run between two packets but never between a packet and its length.
        self._starts.clear()
        attempts = repeat(self._fd, self._descriptors.rows)
        try:
            self._lengths.extend(map(self._read, attempts, self._buffers(arena, room), *self._arguments))
        except BlockingIOError:
            pass  # the queue is empty
        except OSError as error:
            if self._lengths:
                self._error = error  # behind what was read
            elif error.errno in _NOWAIT_UNKNOWN and self._arguments:
                # The driver knows no RWF_NOWAIT: ask before each read. Another reader of the same queue could
                # still take the packet between the two, and make the read wait.
                self._read, self._arguments = os.readv, ()
                self._ready = select.poll()
                self._ready.register(self._fd, select.POLLIN)
                self._receive(arena, room)
            else:
                raise

    def _buffers(self, arena: Arena, room: int) -> Iterator[list[memoryview]]:
        """The iovecs of each read, one byte longer than what is kept: a packet that reaches it was cut."""
        memory = arena.view[arena.cursor : arena.cursor + room]
        starts, lengths, ready = self._starts, self._lengths, self._ready
        capacity, sizes = self._layout.capacity, self._layout.sizes
        cursor = 0
        while cursor + capacity < room and (ready is None or ready.poll(0)):
            starts.append(cursor)
            if sizes is None:
                yield [memory[cursor : cursor + capacity + 1]]
            else:
                yield _ladder(memory[cursor:], sizes)
            cursor = align(cursor + min(lengths[-1], capacity))

    def _report(self, count: int) -> None:
        descriptors, capacity = self._descriptors, self._layout.capacity
        columns = descriptors.columns
        if self._flagged:
            columns.flags[:] = array("H", bytes(2 * descriptors.rows))
            self._flagged = False
        if max(self._lengths) > capacity:
            for index, length in enumerate(self._lengths):
                if length > capacity:
                    columns.flags[index] = TRUNCATED
                    self._lengths[index] = capacity
            self._flagged = True
        columns.starts[:count] = array("I", self._starts[:count])
        columns.lengths[:count] = array("I", self._lengths)
        header = descriptors.header
        header[RECEIVES] = count
        header[END] = align(self._starts[count - 1] + self._lengths[-1])
        header[COUNT] = count
        self._lengths.clear()


def _ladder(memory: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    pieces = []
    for size in (*sizes, 1):
        pieces.append(memory[:size])
        memory = memory[size:]
    return pieces
