"""The packets of one receive, as columns over one arena."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterable, Iterator
from sys import getrefcount

from linkrx import arena
from linkrx.columns import COLUMNS, ROW_BYTES, Columns, Table
from linkrx.framing import Framing
from linkrx.packet import Packet


class Batch(Columns):
    """Packets received together. Indexing and iteration give packets, the columns one element for each.

    `memory` (bytes) and all columns are read-only memoryviews with native formats: `starts`, `lengths` and
    `wire_lengths` uint32; `protocols`, `flags` (see `Flags`), `vlan_tcis` and `vlan_tpids` uint16; `timestamps` int64 in
    nanoseconds since 1970, 0 where there is none. `memory[starts[i] : starts[i] + lengths[i]]` is frame i. Nothing of a
    batch ever changes, however long it is kept. Who keeps is who refers to it in this process: what the kernel is still to
    read, as of MSG_ZEROCOPY or io_uring, is given a `copy()`.
    """

    __slots__: Iterable[str] = {
        "_begin": "",
        "_buffer": "",
        "_table_at": "",
        "_table_buffer": "",
        "framing": "What stands in front of the data of each frame.",
        "memory": "The frames, and nothing of any other batch.",
    }

    memory: memoryview

    def __init__(
        self,
        buffer: mmap.mmap | bytes,
        begin: int,
        table: int,
        rows: int,
        count: int,
        framing: Framing,
        table_buffer: mmap.mmap | bytes | None = None,
    ) -> None:
        """Frames lie in `buffer` from `begin` on, and behind them, `table` bytes into it, a table of `rows` rows, of
        which the first `count` are used. With a `table_buffer` the table lies there instead.

        Every view is made when it is first asked for. Holding the buffer keeps an arena from being used again.
        """
        self._buffer = buffer
        self._begin = begin
        self._table_at = table
        self._table_buffer = table_buffer
        self._rows = rows
        self._first = 0
        self._count = count
        self.framing = framing

    def __getattr__(self, name: str) -> memoryview:
        """As for columns."""
        if name == "memory":
            end = self._table_at if self._table_buffer is None else len(self._buffer)
            self.memory = memoryview(self._buffer)[self._begin : end].toreadonly()
            return self.memory
        return super().__getattr__(name)

    @property
    def _table(self) -> memoryview:  # type: ignore[override]
        return memoryview(self._table_buffer or self._buffer).toreadonly()[self._table_at :]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Packet:
        index = operator.index(index)
        count = self._count
        if not -count <= index < count:
            raise IndexError(f"packet {index} of a batch of {count}")
        packet = Packet()
        packet._batch = self
        packet._index = index % count
        return packet

    def __iter__(self) -> Iterator[Packet]:
        # A packet that nobody else has any more is given again: to make one takes longer than to count. Two take turns, for
        # who asks for the next has the last one in a variable still.
        packet, last = Packet(), Packet()
        # No more than the variable and the argument, should a tracer have looked at this frame's variables.
        unheld = min(2, getrefcount(packet)) if arena.REFERENCE_COUNTS_ARE_EXACT else 0
        packet._batch = last._batch = self
        for index in range(self._count):
            if getrefcount(packet) != unheld:
                packet = Packet()
                packet._batch = self
            packet._index = index
            yield packet
            packet, last = last, packet

    def behind(self, first: int) -> Batch:
        """The packets from `first` on, over the same memory."""
        if not first:
            return self
        rest = Batch(
            self._buffer,
            self._begin,
            self._table_at,
            self._rows,
            self._count - first,
            self.framing,
            self._table_buffer,
        )
        rest._first = self._first + first
        return rest

    def copy(self) -> Batch:
        """The same packets in memory of their own, no larger than they need."""
        return self.pick(0, self._count)

    def pick(self, first: int, last: int) -> Batch:
        """A copy of packets `first` to `last`, each with its virtio-net header in front."""
        vnet = self.framing.vnet_header_size
        memory = bytearray()
        rows = last - first
        new = Table(memoryview(table := bytearray(ROW_BYTES * rows)), rows)
        for row, index in enumerate(range(first, last)):
            start, length = self.starts[index], self.lengths[index]
            new.starts[row] = len(memory) + vnet
            memory += self.memory[start - vnet : start + length]
        for name in COLUMNS:
            if name != "starts":
                getattr(new, name)[:] = getattr(self, name)[first:last]
        return Batch(bytes(memory), 0, 0, rows, rows, self.framing, bytes(table))

    def __repr__(self) -> str:
        return f"<Batch of {self._count} packets, {sum(self.lengths)} bytes>"
