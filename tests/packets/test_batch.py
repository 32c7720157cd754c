"""A batch, in C and in plain Python: columns over one memory, packets by index and in order, copies."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.received import (
    BARE,
    ETHERNET,
    C,
    Kind,
    Ring,
    Row,
    Source,
    batch_of,
    every_kind,
    fields,
    frame,
    needs_core,
    numbered,
    vnet_bytes,
)
from support.run import that_take

import linkrx
from linkrx import VnetHeader, packets
from linkrx.memory.framing import Framing
from linkrx.packets.headers import header_bytes

FORMATS: dict[str, tuple[str, type[np.generic]]] = {
    "timestamps": ("q", np.int64),
    "starts": ("I", np.uint32),
    "lengths": ("I", np.uint32),
    "wire_lengths": ("I", np.uint32),
    "interfaces": ("I", np.uint32),
    "protocols": ("H", np.uint16),
    "flags": ("H", np.uint16),
    "vlan_tcis": ("H", np.uint16),
    "vlan_tpids": ("H", np.uint16),
}
every_column = pytest.mark.parametrize("name", FORMATS)


def some(count: int) -> list[Row]:
    """`count` rows with different numbers."""
    return [
        Row(numbered(n, 14 + n), b"", 2000 + n, 1000 + n, n, -n, 3000 + n, 4000 + n, 5000 + n)
        for n in range(1, count + 1)
    ]


# Columns.


@every_kind
@every_column
def test_column(kind: Kind, name: str) -> None:
    """Each column is a read-only memoryview of its native format with one element per packet, for any size of its table."""
    for spare in (0, 1, 7):
        column = getattr(batch_of(kind, some(3), spare=spare), name)
        assert type(column) is memoryview
        form, dtype = FORMATS[name]
        assert (column.format, column.shape, column.strides) == (form, (3,), (column.itemsize,))
        assert (column.itemsize, column.readonly, column.c_contiguous) == (
            np.dtype(dtype).itemsize,
            True,
            True,
        )
        with pytest.raises(TypeError, match="read-only"):
            column[0] = 1
        assert column.cast("B").nbytes == 3 * column.itemsize


@every_kind
@pytest.mark.parametrize("name", [*FORMATS, "memory"])
def test_a_view_that_is_released_breaks_no_other(kind: Kind, name: str) -> None:
    """Releasing a view of a column or of the frames does not invalidate other views."""
    batch = batch_of(kind, some(3))
    other = getattr(batch, name)
    before = other.tolist()
    for _ in range(2):
        with getattr(batch, name) as view:
            assert view.tolist() == before
    assert other.tolist() == before


@every_kind
def test_columns_tell_the_rows(kind: Kind) -> None:
    """A column has the numbers of the rows, in order."""
    rows = some(5)
    batch = batch_of(kind, rows)
    assert batch.lengths.tolist() == [len(row.frame) for row in rows]
    assert batch.wire_lengths.tolist() == [row.wire_length for row in rows]
    assert batch.protocols.tolist() == [row.protocol for row in rows]
    assert batch.flags.tolist() == [row.flags for row in rows]
    assert batch.timestamps.tolist() == [row.timestamp for row in rows]
    assert batch.interfaces.tolist() == [row.interface for row in rows]
    assert batch.vlan_tcis.tolist() == [row.vlan_tci for row in rows]
    assert batch.vlan_tpids.tolist() == [row.vlan_tpid for row in rows]


@every_kind
@every_column
@pytest.mark.parametrize("copied", [False, True])
def test_column_as_array(kind: Kind, name: str, copied: bool) -> None:
    """numpy.frombuffer and numpy.asarray accept each column, and the array is read-only with the same numbers."""
    batch = batch_of(kind, some(5))
    column = getattr(batch.copy() if copied else batch, name)
    for array in (np.frombuffer(column, dtype=FORMATS[name][1]), np.asarray(column)):
        assert array.dtype == FORMATS[name][1]
        assert array.tolist() == column.tolist()
        assert not array.flags.writeable


@every_kind
@every_column
def test_columns_outlive_the_batch(kind: Kind, name: str) -> None:
    """A column does not change after its batch is gone and the memory is used again."""
    source = Source(kind)
    batch = source.batch(some(5))
    column = getattr(batch, name)
    wanted = column.tolist()
    part = column[1:3]
    del batch
    for _ in range(4):
        source.batch([Row(bytes(14))] * 9)
    assert column.tolist() == wanted
    assert part.tolist() == wanted[1:3]


@every_kind
def test_whole_frames_by_columns(kind: Kind) -> None:
    """memory[start : start + length] is a frame, also for NumPy."""
    rows = [Row(frame(bytes([n]) * n)) for n in range(9)]
    batch = batch_of(kind, rows)
    taken = [
        bytes(batch.memory[start : start + n]) for start, n in zip(batch.starts, batch.lengths, strict=True)
    ]
    assert taken == [row.frame for row in rows]
    starts = np.frombuffer(batch.starts, dtype=np.uint32)
    lengths = np.frombuffer(batch.lengths, dtype=np.uint32)
    memory = np.frombuffer(batch.memory, dtype=np.uint8)
    taken = [memory[s : s + n].tobytes() for s, n in zip(starts, lengths, strict=True)]
    assert taken == [row.frame for row in rows]


@every_kind
def test_memory_is_read_only_bytes(kind: Kind) -> None:
    """The memory is one read-only memoryview of bytes that ends with the last frame."""
    batch = batch_of(kind, some(3))
    memory = batch.memory
    assert (type(memory), memory.format, memory.ndim, memory.readonly) == (memoryview, "B", 1, True)
    assert len(memory) == batch.starts[2] + batch.lengths[2]
    with pytest.raises(TypeError, match="read-only"):
        memory[0] = 1


@every_kind
def test_a_batch_is_no_buffer(kind: Kind) -> None:
    """A batch itself is refused where bytes are needed, such as by socket.send, so it is not sent as one frame by mistake."""
    batch = batch_of(kind, some(3))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as alone:
        takers: list[Callable[[Any], object]] = [
            memoryview,
            io.BytesIO().write,
            struct.Struct("B").unpack,
            alone.send,
        ]
        for take in takers:
            with pytest.raises(TypeError, match="a bytes-like object is required"):
                take(batch)
    assert batch[0] != batch
    assert memoryview(batch.memory) == batch.memory


def other_bytes(batch: Any, prefix: int) -> bytes:
    """The bytes of `memory` outside the frames and the virtio-net headers in front of them."""
    shown = bytearray(batch.memory)
    for start, length in zip(batch.starts, batch.lengths, strict=True):
        shown[start - prefix : start + length] = bytes(prefix + length)
    return bytes(shown)


@every_kind
@pytest.mark.parametrize("framing", [ETHERNET, Framing(True, 10), Framing(True, 12, True)], ids=str)
def test_memory_shows_no_other_frame(kind: Kind, framing: Framing) -> None:
    """Between frames `memory` has zeroes, and no bytes of earlier batches, runts, packet information, or packets that were taken before."""
    source = Source(kind, framing)
    secret = Row(b"\xaa" * 500, b"\xaa" * framing.prefix)
    for _ in range(3):
        source.batch([secret] * 20)
    rows = [Row(numbered(n, 15 + n), bytes(framing.prefix)) for n in range(10)]
    batch = source.batch(rows, gap=b"\xaa" * 24)
    assert b"\xaa" not in bytes(batch.memory)
    assert not any(other_bytes(batch, framing.vnet_header_size if kind is C else 0))
    assert batch.frames() == [row.frame for row in rows]
    # The rest of a batch, after some packets were taken.
    source.fill([secret, secret, *rows])
    for _ in range(2):
        source.receiver.take_packet()
    rest = source.receiver.take_batch()
    assert rest is not None
    assert b"\xaa" not in bytes(rest.memory)
    assert rest.frames() == [row.frame for row in rows]
    assert b"\xaa" not in bytes(rest.copy().memory)


@every_kind
def test_memory_of_a_rest_does_not_clear_what_was_taken(kind: Kind) -> None:
    """Packets that were taken before do not change when `memory` of the rest of their batch is read."""
    source = Source(kind)
    source.fill([Row(numbered(n)) for n in range(6)])
    taken = [source.receiver.take_packet() for _ in range(4)]

    def deliver(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        taken.append(packet)
        raise LookupError

    with pytest.raises(LookupError):
        source.receiver.deliver(deliver)
    rest = source.receiver.take_batch()
    assert rest is not None
    assert bytes(rest.memory[rest.starts[0] :]) == numbered(5)
    assert [packet[:] for packet in taken if packet] == [numbered(n) for n in range(5)]
    assert taken == [numbered(n) for n in range(5)]


# A sequence of packets.


@every_kind
def test_indexing(kind: Kind) -> None:
    """Packets are found by index from both ends, as in a list."""
    rows = [Row(frame(bytes([n]))) for n in range(4)]
    batch = batch_of(kind, rows)
    for index in range(-4, 4):
        assert batch[index] == rows[index].frame
    assert batch[np.int64(2)] == rows[2].frame


@every_kind
@pytest.mark.parametrize("index", [3, 4, -4, -5, 2**31, 2**63, -(2**63), 2**70, -(2**70)])
def test_index_out_of_range(kind: Kind, index: int) -> None:
    """An index beyond either end raises IndexError with the number of packets."""
    with pytest.raises(IndexError, match=rf"packet {index} of a batch of 3"):
        batch_of(kind, some(3))[index]


@every_kind
@pytest.mark.parametrize("wrong", ["1", None, 1.0, slice(1), (0,)], ids=repr)
def test_index_of_another_type(kind: Kind, wrong: Any) -> None:
    """An index that is not an integer raises TypeError."""
    with pytest.raises(TypeError):
        batch_of(kind, some(3))[wrong]


@every_kind
def test_iteration(kind: Kind) -> None:
    """Each iteration gives the packets in order, and its length hint is the number of remaining packets."""
    batch = batch_of(kind, [Row(frame(bytes([n]))) for n in range(4)])
    for _ in range(2):
        assert [packet[-1] for packet in batch] == [0, 1, 2, 3]
    assert len(list(batch)) == len(batch) == 4
    assert [packet[-1] for packet in reversed(batch)] == [3, 2, 1, 0]
    packets_of = iter(batch)
    assert iter(packets_of) is packets_of
    next(packets_of)
    assert packets_of.__length_hint__() == 3  # type: ignore[attr-defined]
    assert len(list(packets_of)) == 3
    for _ in range(3):
        assert next(packets_of, None) is None
    assert packets_of.__length_hint__() == 0  # type: ignore[attr-defined]


@every_kind
def test_kept_packets_of_a_batch_do_not_change(kind: Kind) -> None:
    """Kept packets of iteration and of indexing do not change."""
    batch = batch_of(kind, some(9))
    kept = list(batch) + [batch[index] for index in range(9)] + [packet for packet in batch if packet[-1] % 2]
    wanted = [row.frame for row in some(9)]
    assert kept[:18] == wanted + wanted
    assert kept[18:] == [sent for sent in wanted if sent[-1] % 2]


@every_kind
def test_frames(kind: Kind) -> None:
    """frames() returns a new list with one `bytes` per frame."""
    batch = batch_of(kind, some(5))
    made = batch.frames()
    assert made == [row.frame for row in some(5)]
    assert {type(one) for one in made} == {bytes}
    made.clear()
    assert len(batch.frames()) == 5


@every_kind
def test_the_rest_of_a_batch(kind: Kind) -> None:
    """After some packets were taken, take_batch returns a batch of the others, in every column."""
    source = Source(kind)
    rows = some(5)
    source.fill(rows)
    for row in rows[:2]:
        assert source.receiver.take_packet() == row.frame
    rest = source.receiver.take_batch()
    assert rest is not None
    assert source.receiver.take_batch() is None
    assert (len(rest), source.receiver.left) == (3, 0)
    assert [fields(packet) for packet in rest] == [fields(packet) for packet in batch_of(kind, rows[2:])]
    whole = batch_of(kind, rows)
    for name in FORMATS:
        if name != "starts":
            assert getattr(rest, name).tolist() == getattr(whole, name).tolist()[2:]
    assert [
        bytes(rest.memory[s : s + n]) for s, n in zip(rest.starts, rest.lengths, strict=True)
    ] == rest.frames()


@every_kind
def test_batch_repr(kind: Kind) -> None:
    """A batch shows how many packets and bytes it holds."""
    assert repr(batch_of(kind, [Row(frame(b"1")), Row(frame(b"22"))])) == "<Batch of 2 packets, 31 bytes>"


@every_kind
def test_nothing_of_a_batch_can_be_set(kind: Kind) -> None:
    """Columns, packets and new attributes cannot be written, and only linkrx can make a batch."""
    batch: Any = batch_of(kind, some(3))
    for name in (*FORMATS, "memory", "copy", "anything"):
        with pytest.raises(AttributeError):
            setattr(batch, name, None)
        with pytest.raises(AttributeError):
            delattr(batch, name)
    with pytest.raises(TypeError):
        batch[0] = batch[1]
    batch_type: Any = kind.module.Batch
    for use in (
        batch_type,
        lambda: object.__new__(batch_type) if kind is C else batch_type(),
        lambda: copy.copy(iter(batch)) if kind is C else batch_type(),
    ):
        with pytest.raises(TypeError):
            use()


@every_kind
def test_released_columns(kind: Kind) -> None:
    """After `memory` was released, the batch makes a new view. Views that were made before stay valid."""
    batch = batch_of(kind, some(3))
    memory = batch.memory
    part = memory[batch.starts[1] :][:3]
    memory.release()
    assert part == some(3)[1].frame[:3]
    if kind is C:
        assert bytes(batch.memory)[batch.starts[1] :][:3] == part
    part.release()
    assert batch.frames() == [row.frame for row in some(3)]


# Copies.


@every_kind
def test_batches_are_not_made_by_users(kind: Kind) -> None:
    """Making a batch by the constructor, by a subclass, by pickle or by copy raises TypeError. `copy()` and packets do it."""
    batch = Source(kind).batch(some(2))
    with pytest.raises(TypeError, match="cannot create"):
        kind.module.Batch()
    with pytest.raises(TypeError, match="not an acceptable base"):
        type("Mine", (kind.module.Batch,), {})
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle"):
            use(batch)
    assert pickle.loads(pickle.dumps(list(batch))) == list(batch)


@every_kind
def test_batch_copy(kind: Kind) -> None:
    """A copy has the same columns, is in a bytes object, and does not change when the memory is used again."""
    source = Source(kind)
    batch = source.batch(some(5), spare=50)
    copied = batch.copy()
    assert type(copied.memory.obj) is bytes
    wanted = {name: getattr(batch, name).tolist() for name in FORMATS}
    original = [fields(packet) for packet in batch]
    del batch
    for _ in range(4):
        source.batch([Row(bytes(20))] * 9)
    assert {name: getattr(copied, name).tolist() for name in FORMATS} == wanted
    assert [fields(packet) for packet in copied] == original
    assert [fields(packet) for packet in copied.copy()] == original
    assert copied.frames() == [row.frame for row in some(5)]


# Random rows.

uint16 = st.integers(0, 0xFFFF)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Row], Framing]:
    """Rows with any contents and any framing."""
    framing = Framing(
        ethernet=draw(st.booleans()),
        vnet_header_size=draw(st.sampled_from([0, 10, 12, 24])),
        packet_info=draw(st.booleans()),
        vnet_little_endian=draw(st.booleans()),
    )
    row = st.builds(
        Row,
        frame=st.binary(min_size=framing.link_header or 1, max_size=60),
        prefix=st.binary(min_size=framing.prefix, max_size=framing.prefix),
        wire_length=st.integers(0, 2**32 - 1),
        protocol=uint16,
        flags=uint16,
        timestamp=st.integers(-(2**63), 2**63 - 1),
        interface=st.integers(0, 2**32 - 1),
        vlan_tci=uint16,
        vlan_tpid=uint16,
    )
    return draw(st.lists(row, min_size=1, max_size=8)), framing


def vnet_of(words: tuple[int, ...], frame: bytes) -> VnetHeader:
    """The virtio-net header with a super-packet's header length, which test_header_length_of_a_super_packet tests."""
    header = VnetHeader(*words)
    return header._replace(hdr_len=header_bytes(header, memoryview(frame))) if header.super_packet else header


def expected(row: Row, framing: Framing) -> dict[str, Any]:
    """The expected attributes of a packet of this row."""
    header = framing.link_header
    vnet = row.prefix[framing.packet_info_size :][:10]
    order = "<" if framing.vnet_little_endian else ">"
    return {
        "frame": row.frame,
        "link_header": row.frame[:header],
        "data": row.frame[header:],
        "protocol": row.protocol,
        "remote": row.frame[6:12] if framing.ethernet else None,
        "local": row.frame[:6] if framing.ethernet else None,
        "wire_length": row.wire_length or len(row.frame),
        "interface": row.interface,
        "truncated": bool(row.flags & 1),
        "outgoing": bool(row.flags & 2),
        "checksum_unfinished": bool(row.flags & 16),
        "timestamp_ns": row.timestamp if row.flags & 8 else None,
        "vlan": (row.vlan_tpid, row.vlan_tci) if row.flags & 4 else None,
        "link_type": framing.link_type,
        "vnet": vnet_of(struct.unpack(f"{order}BBHHHH", vnet), row.frame) if vnet else None,
    }


def hold_against(batch: Any, rows: list[Row], wanted: list[dict[str, Any]]) -> None:
    """Assert that all contents of a batch are those of these rows."""
    assert [fields(packet) for packet in batch] == wanted
    assert [fields(batch[index - len(rows)]) for index in range(len(rows))] == wanted
    assert batch.frames() == [row.frame for row in rows]
    assert batch.lengths.tolist() == [len(row.frame) for row in rows]
    assert batch.timestamps.tolist() == [row.timestamp for row in rows]
    taken = [bytes(batch.memory[s : s + n]) for s, n in zip(batch.starts, batch.lengths, strict=True)]
    assert taken == batch.frames()


@every_kind
@settings(max_examples=100, deadline=None)
@given(table=tables(), spare=st.integers(0, 3), first=st.integers(0, 7), ring=st.booleans())
def test_any_batch(kind: Kind, table: tuple[list[Row], Framing], spare: int, first: int, ring: bool) -> None:
    """A batch of an arena or of a ring, its rest, and copies of both have the contents of their rows, also after further batches."""
    rows, framing = table
    source = Ring(framing) if ring and kind is C else Source(kind, framing)
    first = min(first, len(rows) - 1)
    wanted = [expected(row, framing) for row in rows]
    source.fill(rows, spare)
    taken = [source.receiver.take_packet() for _ in range(first)]
    rest = source.receiver.take_batch()
    whole = source.batch(rows, spare)
    shown = [(rest, rows[first:], wanted[first:]), (whole, rows, wanted), (whole.copy(), rows, wanted)]
    for _ in range(4):
        for case in shown:
            hold_against(*case)
        source.batch([Row(b"\xcc" * 90, bytes(framing.prefix))] * 9)
        assert taken == [row.frame for row in rows[:first]]


# Invalid reports, as of a defective backend.


def filled(size: int = 64) -> tuple[Source, Any, memoryview]:
    """A source whose arena has one frame, and the table with its row."""
    source = Source(C)
    arena = source.receiver.arena()
    arena.view[64 : 64 + size] = numbered(1, size)
    table = source.table(memoryview(b""), 3)
    source.describe([Row(numbered(1, size))], [0], table, 3, size)
    return source, arena, table


@needs_core
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("starts", 1),
        ("starts", 2**32 - 1),
        ("starts", 2**31),
        ("lengths", 65),
        ("lengths", 2**32 - 1),
        ("lengths", 2**31),
        ("lengths", 13),
        ("lengths", 0),
    ],
)
def test_a_frame_that_is_not_in_the_arena(column: str, value: int) -> None:
    """A row whose frame is outside the arena, or shorter than its link header, raises ValueError, which says so."""
    source, arena, table = filled()
    offset = {"starts": 16, "lengths": 20}[column]
    struct.pack_into("=I", table, 3 * offset, value)
    with pytest.raises(ValueError, match="the backend reports packet 0 at"):
        source.receiver.make_batch(arena)
    assert source.receiver.left == 0
    assert not arena.held


@needs_core
@pytest.mark.parametrize("start", [0, 9])
def test_a_frame_without_room_for_its_header(start: int) -> None:
    """With virtio-net headers in front of frames, a frame without room for its header raises ValueError."""
    source = Source(C, Framing(True, 10))
    arena = source.receiver.arena()
    source.describe([Row(numbered(1))], [start], source.table(memoryview(b""), 1), 1, 192)
    with pytest.raises(ValueError, match=f"packet 0 at {start}"):
        source.receiver.make_batch(arena)


@needs_core
@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("end", 2**32 - 1),
        ("end", 70_000),
        ("rows", 2**32 - 1),
        ("rows", 0),
        ("classified", 2**32 - 1),
        ("classified", 5),
    ],
)
def test_a_report_that_is_wrong(word: str, value: int) -> None:
    """A report whose table is outside the arena raises ValueError."""
    source, arena, _ = filled()
    setattr(source.descriptors.report, word, value)
    with pytest.raises(ValueError, match=r"backend reports|nothing to take in"):
        source.receiver.make_batch(arena)


@needs_core
@pytest.mark.parametrize("keeps", [True, False])
def test_a_report_that_comes_between_two_fills(keeps: bool) -> None:
    """Frames that are reported without a fill change no batch that was handed over, kept or not, and no other memory."""
    source = Source(C, rows=1)
    batch: Any = source.batch([Row(numbered(1))], spare=0)
    if not keeps:
        batch = None
    source.descriptors.columns.lengths[0] = 20
    report = source.descriptors.report
    report.end, report.receives, report.count = 24, 1, 1
    if keeps:
        with pytest.raises(BufferError, match="another batch still uses this memory"):
            source.receiver.rx._poll()
        assert list(batch.lengths) == [64]
        assert batch.frames() == [numbered(1)]
    else:
        source.receiver.rx._poll()
        assert len(source.receiver.take_packet()) == 20


@needs_core
def test_a_fill_that_clears_the_report() -> None:
    """A fill in Python may clear the whole report before it reports packets."""
    source = Source(C)
    report, columns = source.descriptors.report, source.descriptors.columns

    def fill(arena: Any, _room: int) -> int:
        ctypes.memset(ctypes.addressof(report), 0, ctypes.sizeof(report))
        arena.view[arena.cursor : arena.cursor + 64] = numbered(7)
        columns.starts[0], columns.lengths[0] = 0, 64
        report.receives, report.end, report.count = 1, 64, 1
        return 1

    source.receiver.rx._fill = fill
    assert source.receiver.rx._poll()
    assert source.receiver.take_packet() == numbered(7)


@needs_core
def test_owners() -> None:
    """An owner refuses invalid sizes and addresses. Only an arena's memory is accessible, through `view`."""
    for size in (-1, 1, 64, 2**32):
        with pytest.raises(ValueError, match=f"size={size}"):
            C.module.Owner(size)
    arena, ring = C.module.Owner(4096), C.module.Owner(0)
    assert (arena.limit, ring.limit, len(arena.view)) == (4096, 0, 4096)
    with pytest.raises(AttributeError):
        arena.address = 0
    with pytest.raises(AttributeError):
        arena.cursor = 0
    for use in (lambda: memoryview(arena), lambda: memoryview(ring), lambda: ring.view):
        with pytest.raises(BufferError):
            use()
    with pytest.raises(TypeError):
        ring.address = "x"
    with pytest.raises(AttributeError):
        del ring.address


# Through a dispatcher.


def test_a_batch_of_a_closed_dispatcher() -> None:
    """A batch, the rest of its iteration, columns and packets do not change when the dispatcher is closed."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        rx = linkrx.open(left)
        for number in range(8):
            right.send(numbered(number))
        batch = next(rx.batches(10))
        iterated, untouched = iter(batch), iter(batch)
        first, by_index = next(iterated), batch[1]
        rx.close()
        sent = [numbered(number) for number in range(8)]
        assert [first, *iterated] == sent
        assert list(untouched) == sent
        assert [by_index, batch[7]] == [sent[1], sent[7]]
        assert batch.frames() == sent
        assert type(batch) is packets.Batch
        assert isinstance(batch, linkrx.Batch)
        with pytest.raises(linkrx.Closed):
            rx.recv(0)


def test_interfaces(devices: None) -> None:
    """On a packet socket the column has the index of the interface. On other sources it is zero."""
    from linkrx.testing import rigs

    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right, linkrx.open(left) as rx:
        right.send(numbered(1))
        batch = next(rx.batches(10))
        assert (batch.interfaces.tolist(), batch[0].interface) == ([0], 0)
    for name in that_take("packet"):
        with rigs.interface() as rig, rig.open(name) as rx:
            rig.send(rig.frame(100))
            batch = next(rx.batches(10))
            index = socket.if_nametoindex(str(rig.source))
            assert (set(batch.interfaces), batch[0].interface) == ({index}, index)


BARE_ROW = Row(b"\x45" + bytes(30), protocol=0x0800)


@every_kind
def test_vnet_headers_of_a_ring_are_in_its_memory(kind: Kind) -> None:
    """Each packet of a batch has the virtio-net header in front of it, in any layout of the frames."""
    framing = Framing(False, 10)
    rows = [Row(BARE_ROW.frame, vnet_bytes(n, 0, n, n, n, n), protocol=0x0800) for n in range(5)]
    source = Ring(framing) if kind is C else Source(kind, framing)
    batch = source.batch(rows)
    bytes(batch.memory)
    assert [packet.vnet for packet in batch] == [VnetHeader(n, 0, n, n, n, n) for n in range(5)]
    assert BARE.link_header == 0
