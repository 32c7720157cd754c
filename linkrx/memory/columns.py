"""Tables of packets. A backend fills one, classification writes another, and a batch has the columns of that.

A table of n rows has fourteen columns, one after the other. The widest come first, so that all are aligned if the table is.
`_core/columns.inc` has the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from linkrx import _core
from linkrx.memory.report import REPORT_BYTES, WORDS_BYTES, Report

# Bytes of one row: timestamp and link address 8 each; start, length, wire length, interface, file type 4 each; protocol, flags, VLAN TCI
# and TPID, link type 2 each; lengths of the link address and of the link header 1 each.
ROW_BYTES = 48


def align(offset: int) -> int:
    """The next 8-byte boundary: where the next frame or table may start."""
    return (offset + 7) & ~7


# For each column: the sum of the widths of the columns before it, its width in bytes, and its format.
_LAYOUT: dict[str, tuple[int, int, Literal["q", "Q", "I", "H", "B"]]] = {
    "timestamps": (0, 8, "q"),
    "addresses": (8, 8, "Q"),
    "starts": (16, 4, "I"),
    "lengths": (20, 4, "I"),
    "wire_lengths": (24, 4, "I"),
    "interfaces": (28, 4, "I"),
    "file_types": (32, 4, "I"),
    "protocols": (36, 2, "H"),
    "flags": (38, 2, "H"),
    "vlan_tcis": (40, 2, "H"),
    "vlan_tpids": (42, 2, "H"),
    "link_types": (44, 2, "H"),
    "address_lengths": (46, 1, "B"),
    "link_headers": (47, 1, "B"),
}

COLUMNS = tuple(_LAYOUT)


class Columns:
    """Rows of a table: fourteen columns, as memoryviews with native formats, each made when it is first asked for.

    `_count` rows from `_first` on, of `_rows` that the table has, which starts where `_table` (bytes) does.
    """

    __slots__: Iterable[str] = {
        "_count": "",
        "_first": "",
        "_rows": "",
        "address_lengths": "Bytes of each packet's link address; 0: none.",
        "addresses": "The sender's link address of each packet without link header: its bytes in order, then zeroes.",
        "file_types": "For packets of a capture file: its LINKTYPE_* number with LRX_OF_FILE. Only with the core.",
        "flags": "Each packet's `Flags`.",
        "interfaces": "The index of each packet's interface, or 0.",
        "lengths": "Bytes of each frame, link header included.",
        "link_headers": "Bytes of each packet's link header. Written by classification.",
        "link_types": "The ARPHRD_* number of each packet's device.",
        "protocols": "Each packet's EtherType. A backend writes the one that the kernel reports, or 0.",
        "starts": "Where each frame starts in `memory`.",
        "timestamps": "Each packet's time of receipt.",
        "vlan_tcis": "The tag that the kernel took out of each frame with `Flags.VLAN`.",
        "vlan_tpids": "That tag's EtherType.",
        "wire_lengths": "The length of each frame before it was cut, if the kernel reports it.",
    }

    _count: int
    _first: int
    _rows: int
    _table: memoryview
    timestamps: memoryview
    starts: memoryview
    lengths: memoryview
    wire_lengths: memoryview
    interfaces: memoryview
    file_types: memoryview
    protocols: memoryview
    flags: memoryview
    vlan_tcis: memoryview
    vlan_tpids: memoryview
    addresses: memoryview
    link_types: memoryview
    address_lengths: memoryview
    link_headers: memoryview

    def __getattr__(self, name: str) -> memoryview:
        """Make a column. Python calls this only while the column's slot is empty; a property would cost more each time."""
        try:
            offset, width, form = _LAYOUT[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}", name=name, obj=self) from None
        begin = self._rows * offset
        begin += self._first * width
        column = self._table[begin : begin + self._count * width].cast(form)
        setattr(self, name, column)
        return column


class Table(Columns):
    """A whole table of `rows` rows."""

    __slots__ = ("_table",)

    def __init__(self, table: memoryview, rows: int) -> None:
        self._table = table
        self._first = 0
        self._count = self._rows = rows


class Descriptors:
    """The result of a receive, which a backend writes: a `report` and a table of `rows` rows.

    `columns.starts` count from the place where the fill began. A backend writes `starts` and `lengths`. It writes the other
    columns where it knows them, else they are zero; a wire length of zero means the length. The results of a receive are
    stored here and not returned, because an exception of a signal handler would lose a return value.
    """

    __slots__ = ("columns", "memory", "report", "rows")

    def __init__(self, rows: int, memory: bytearray | None = None) -> None:
        """Use `memory`, or allocate it."""
        self.rows = rows
        self.memory = bytearray(REPORT_BYTES + ROW_BYTES * rows) if memory is None else memory
        self.report = Report.from_buffer(self.memory)
        self.columns = Table(memoryview(self.memory)[REPORT_BYTES:], rows)

    def address(self) -> int:
        """The address of the report, for C."""
        return _core.address(self.memory)

    def clear(self) -> None:
        """Reset everything but the pointers, before another backend writes."""
        self.memory[:WORDS_BYTES] = bytes(WORDS_BYTES)
        self.memory[REPORT_BYTES:] = bytes(len(self.memory) - REPORT_BYTES)
