"""The packets of one receive, as columns over one arena."""

from __future__ import annotations

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

    __slots__ = ("_columns", "_count", "_first", "_rows", "_table", "framing", "memory")

    def __init__(self, memory: memoryview, table: int, rows: int, count: int, framing: Framing) -> None:
        """A table of `rows` rows, of which the first `count` are used, lies `table` bytes into `memory`."""
        self.memory = memory
        self.framing = framing
        self._table = table
        self._rows = rows
        self._first = 0
        self._count = count
        self._columns: Columns | None = None

    @property
    def columns(self) -> Columns:
        """All columns, VLAN tags included. Made when first asked for."""
        if self._columns is None:
            first = self._first
            self._columns = Columns(self.memory[self._table :], self._rows, first, first + self._count)
        return self._columns

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
        rest = Batch(self.memory, self._table, self._rows, self._count - first, self.framing)
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
        copied = Batch(memoryview(bytes(memory)), 0, rows, rows, self.framing)
        copied._columns = Columns(memoryview(bytes(table)), rows)
        return copied

    def __repr__(self) -> str:
        return f"<Batch of {self._count} packets, {sum(self.lengths)} bytes>"
