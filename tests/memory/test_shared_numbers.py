"""Numbers that are defined in both C and Python are equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from linkrx import _core, packets
from linkrx.memory import columns, framing, report
from linkrx.memory import counters as slots
from linkrx.memory import layouts as buffers
from linkrx.packets import headers, plain
from linkrx.sources import options

# The name in C, and Python's number with the same meaning.
SHARED: dict[str, int] = {
    "LRX_ROW_BYTES": columns.ROW_BYTES,
    "LRX_PER_PACKET_NO_HEADER": framing.PER_PACKET_NO_HEADER,
    "LRX_PER_PACKET_LINK_TYPE": framing.PER_PACKET_LINK_TYPE,
    "LRX_NO_LINK_HEADER": framing.NO_LINK_HEADER,
    "LRX_OF_FILE": framing.OF_FILE,
    "LRX_FILE_SWAPPED": framing.FILE_SWAPPED,
    "LRX_FILE_LINK_TYPE": framing.FILE_LINK_TYPE,
    "LRX_TRUNCATED": headers.Flags.TRUNCATED,
    "LRX_OUTGOING": headers.Flags.OUTGOING,
    "LRX_VLAN": headers.Flags.VLAN,
    "LRX_TIMESTAMP": headers.Flags.TIMESTAMP,
    "LRX_CHECKSUM_UNFINISHED": headers.Flags.CHECKSUM_UNFINISHED,
    "LRX_MALFORMED": headers.MALFORMED,
    "LRX_PACKETS": slots.PACKETS,
    "LRX_BYTES": slots.BYTES,
    "LRX_RUNTS": slots.RUNTS,
    "LRX_EMPTY": slots.EMPTY,
    "LRX_UNKNOWN_PROTOCOL": slots.UNKNOWN_PROTOCOL,
    "LRX_CUT": slots.CUT,
    "LRX_COUNT_MALFORMED": slots.MALFORMED,
    "LRX_FILTERED": slots.FILTERED,
    "LRX_COUNTERS": len(slots.new_counters()),
    "LRX_SIZES_MAX": buffers.SIZES_MAX,
    "LRX_MESSAGES_MAX": options.BATCH_SIZE_MAX,
}

needs_core = pytest.mark.skipif(_core.lib is None, reason=f"compares with the C core: {_core.reason}")


@needs_core
@pytest.mark.parametrize(("name", "number"), SHARED.items())
def test_number(name: str, number: int) -> None:
    """C and Python have the same number under this name."""
    assert getattr(_core.lib, name) == number


@needs_core
def test_shared_files_hold_nothing_else() -> None:
    """Every number of the header that declares what C and Python share is compared above."""
    header = Path(_core.__file__).with_name("report.h")
    if not header.exists():
        pytest.skip("installed from a wheel, which brings no C sources")
    assert set(re.findall(r"#define (LRX_\w+)", header.read_text())) <= set(SHARED)


def test_arenas_start_alike() -> None:
    """Frames start at the same offset in every arena, in C and in Python."""
    starts = {packets.ARENA_START, packets.Owner(4096).cursor, plain.START, plain.Owner(4096).cursor}
    assert starts == {packets.ARENA_START}


def test_plain_flags_are_the_enum() -> None:
    """The plain flag numbers of the hot path are the members of Flags, in order."""
    plain = (
        headers.TRUNCATED,
        headers.OUTGOING,
        headers.VLAN,
        headers.TIMESTAMP,
        headers.CHECKSUM_UNFINISHED,
    )
    assert plain == tuple(headers.Flags)
    assert all(type(number) is int for number in plain)
    assert not headers.MALFORMED & sum(headers.Flags)


def test_counters_have_a_slot_for_each() -> None:
    """The counters are exactly as many 64-bit words as there are slots."""
    places = {
        slots.PACKETS,
        slots.BYTES,
        slots.RUNTS,
        slots.EMPTY,
        slots.UNKNOWN_PROTOCOL,
        slots.CUT,
        slots.MALFORMED,
        slots.FILTERED,
    }
    counters = slots.new_counters()
    assert places == set(range(len(counters)))
    assert counters.itemsize == 8


@needs_core
def test_the_report_is_laid_out_alike() -> None:
    """Each field of the report has the offset and width of C, and the table starts aligned after the last one."""
    declared = _core.fields("struct lrx_report")
    assert declared == {
        name: (getattr(report.Report, name).offset, getattr(report.Report, name).size) for name in declared
    }
    assert list(declared) == [name for name, _ in report.Report._fields_]
    assert report.REPORT_BYTES % 8 == 0
    assert sum(size for _, size in declared.values() if size == 4) == report.WORDS_BYTES


def test_row_is_the_sum_of_its_columns() -> None:
    """The columns of one row fill ROW_BYTES exactly, without a gap or an overlap."""
    table = bytearray(columns.ROW_BYTES)
    row = columns.Table(memoryview(table), 1)
    views = [getattr(row, name) for name in columns.COLUMNS]
    assert sum(view.nbytes for view in views) == columns.ROW_BYTES
    for view in views:
        view.cast("B")[:] = b"\xff" * view.nbytes
    assert table == b"\xff" * columns.ROW_BYTES
