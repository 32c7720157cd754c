"""The table of packets that backends fill, classification writes and a batch shows, column by column.

A table of n rows is eight columns, one behind the other, the widest first so that each is aligned when the
table is. `_core/columns.inc` lays them out the same way.
"""

from __future__ import annotations

from typing import Literal

from linkrx import _core

# Bytes of one row: timestamp 8; start, length, wire length 4 each; protocol, flags, VLAN TCI and TPID 2 each.
ROW_BYTES = 28

# Words of the header in front of a backend's descriptors.
COUNT, RECEIVES, END, ERROR, CLASSIFIED, ROWS = range(6)
HEADER_BYTES = 24


def align(offset: int) -> int:
    """The next 8-byte boundary: where the next frame or table may start."""
    return (offset + 7) & ~7


class Columns:
    """The eight columns of a table, as memoryviews with native formats."""

    __slots__ = (
        "flags",
        "lengths",
        "protocols",
        "starts",
        "timestamps",
        "vlan_tcis",
        "vlan_tpids",
        "wire_lengths",
    )

    def __init__(self, table: memoryview, rows: int, first: int = 0, last: int | None = None) -> None:
        """Show rows `first` to `last` of a table of `rows` rows that starts where `table` (bytes) does."""

        def column(offset: int, width: int, form: Literal["q", "I", "H"]) -> memoryview:
            return table[offset * rows : (offset + width) * rows].cast(form)[first:last]

        self.timestamps = column(0, 8, "q")
        self.starts = column(8, 4, "I")
        self.lengths = column(12, 4, "I")
        self.wire_lengths = column(16, 4, "I")
        self.protocols = column(20, 2, "H")
        self.flags = column(22, 2, "H")
        self.vlan_tcis = column(24, 2, "H")
        self.vlan_tpids = column(26, 2, "H")


class Descriptors:
    """What a backend reports of one receive: a header of six words and a table of `rows` rows.

    `header[COUNT]` packets were received with `header[RECEIVES]` system calls; the free part of the arena
    starts `header[END]` bytes behind the place where the fill began. `columns.starts` count from that place
    too. A backend writes `starts` and `lengths`; the other columns stay zero unless it has something to say
    (a wire length of zero means: as long as the length). The other words of the header are for the C backends'
    and the classifier's own use: what is known about a receive is kept here, not in return values, which an
    exception raised by a signal handler would lose.
    """

    __slots__ = ("columns", "header", "memory", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.memory = bytearray(HEADER_BYTES + ROW_BYTES * rows)
        whole = memoryview(self.memory)
        self.header = whole[:HEADER_BYTES].cast("I")
        self.columns = Columns(whole[HEADER_BYTES:], rows)

    def address(self) -> int:
        """Where C finds it."""
        return _core.address(self.memory)
