"""The packets of one receive, as columns over one arena."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterator

from linkrx.columns import COLUMNS, ROW_BYTES, Columns
from linkrx.framing import Framing
from linkrx.packet import Packet


class Batch:
    """Packets received together. Indexing and iteration give packets, the columns one element for each.

    `memory` (bytes) and all columns are read-only memoryviews with native formats: `starts`, `lengths` and
    `wire_lengths` uint32, `protocols` and `flags` uint16 (see `Flags`), `timestamps` int64 in nanoseconds since
    1970, 0 where there is none. `memory[starts[i] : starts[i] + lengths[i]]` is frame i. Nothing of a batch ever
    changes, however long it is kept.
    """

    __slots__ = (
        "_begin",
        "_buffer",
        "_columns",
        "_count",
        "_first",
        "_memory",
        "_rows",
        "_table",
        "_table_buffer",
        "framing",
    )

    def __init__(
        self,
        buffer: mmap.mmap | memoryview | bytes,
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
        self._table = table
        self._table_buffer = table_buffer
        self._rows = rows
        self._first = 0
        self._count = count
        self.framing = framing
        self._memory: memoryview | None = None
        self._columns: Columns | None = None

    @property
    def memory(self) -> memoryview:
        """The frames, and nothing of any other batch."""
        memory = self._memory
        if memory is None:
            end = self._table if self._table_buffer is None else len(self._buffer)
            memory = self._memory = memoryview(self._buffer)[self._begin : end].toreadonly()
        return memory

    @property
    def columns(self) -> Columns:
        """All columns, VLAN tags included."""
        columns = self._columns
        if columns is None:
            table = memoryview(self._table_buffer or self._buffer).toreadonly()[self._table :]
            columns = self._columns = Columns(table, self._rows, self._first, self._first + self._count)
        return columns

    @property
    def starts(self) -> memoryview:
        """Where each frame starts in `memory`."""
        return self.columns.starts

    @property
    def lengths(self) -> memoryview:
        """Bytes of each frame, link header included."""
        return self.columns.lengths

    @property
    def wire_lengths(self) -> memoryview:
        """The length of each frame before anything cut it, where the kernel tells it."""
        return self.columns.wire_lengths

    @property
    def protocols(self) -> memoryview:
        """Each packet's EtherType."""
        return self.columns.protocols

    @property
    def timestamps(self) -> memoryview:
        """Each packet's time of receipt."""
        return self.columns.timestamps

    @property
    def flags(self) -> memoryview:
        """Each packet's `Flags`."""
        return self.columns.flags

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
        for index in range(self._count):
            packet = Packet()
            packet._batch = self
            packet._index = index
            yield packet

    def behind(self, first: int) -> Batch:
        """The packets from `first` on, over the same memory."""
        if not first:
            return self
        rest = Batch(
            self._buffer,
            self._begin,
            self._table,
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
        old, vnet = self.columns, self.framing.vnet_header_size
        memory = bytearray()
        rows = last - first
        new = Columns(memoryview(table := bytearray(ROW_BYTES * rows)), rows)
        for row, index in enumerate(range(first, last)):
            start, length = old.starts[index], old.lengths[index]
            new.starts[row] = len(memory) + vnet
            memory += self.memory[start - vnet : start + length]
        for name in COLUMNS:
            if name != "starts":
                getattr(new, name)[:] = getattr(old, name)[first:last]
        return Batch(bytes(memory), 0, 0, rows, rows, self.framing, bytes(table))

    def __repr__(self) -> str:
        return f"<Batch of {self._count} packets, {sum(self.lengths)} bytes>"
