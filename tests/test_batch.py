"""A batch and its packets: columns, fields, copies."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linkrx import Batch, Flags, Gso, Packet, Vlan, VnetHeader
from linkrx.columns import ROW_BYTES, Table, align
from linkrx.framing import Framing
from linkrx.headers import header_bytes, mac

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
ETHERNET = Framing(ethernet=True)
BARE = Framing(ethernet=False)

FORMATS = {
    "timestamps": ("q", np.int64),
    "starts": ("I", np.uint32),
    "lengths": ("I", np.uint32),
    "wire_lengths": ("I", np.uint32),
    "protocols": ("H", np.uint16),
    "flags": ("H", np.uint16),
}


@dataclass(frozen=True)
class Row:
    """One packet as it is to lie in a batch."""

    frame: bytes
    prefix: bytes = b""
    wire_length: int = 0
    protocol: int = 0x0800
    flags: int = 0
    timestamp: int = 0
    vlan_tci: int = 0
    vlan_tpid: int = 0


def frame(payload: bytes = b"payload", protocol: int = 0x88B5) -> bytes:
    """An Ethernet frame."""
    return LOCAL + REMOTE + protocol.to_bytes(2, "big") + payload


def batch_of(rows: list[Row], framing: Framing = ETHERNET, spare: int = 2) -> Batch:
    """A batch over memory as classification leaves it: frames, then a table with `spare` rows unused."""
    frames = bytearray()
    starts = []
    for row in rows:
        assert len(row.prefix) == framing.prefix
        starts.append(len(frames) + framing.prefix)
        frames += row.prefix + row.frame
        frames += bytes(align(len(frames)) - len(frames))
    count = len(rows) + spare
    table = bytearray(b"\xee" * (ROW_BYTES * count))
    columns = Table(memoryview(table), count)
    for index, row in enumerate(rows):
        columns.timestamps[index] = row.timestamp
        columns.starts[index] = starts[index]
        columns.lengths[index] = len(row.frame)
        columns.wire_lengths[index] = row.wire_length or len(row.frame)
        columns.protocols[index] = row.protocol
        columns.flags[index] = row.flags
        columns.vlan_tcis[index] = row.vlan_tci
        columns.vlan_tpids[index] = row.vlan_tpid
    return Batch(bytes(frames + table), 0, len(frames), count, len(rows), framing)


def one(row: Row, framing: Framing = ETHERNET) -> Packet:
    """The packet of a batch of one."""
    return batch_of([row], framing)[0]


def fields(packet: Packet) -> dict[str, Any]:
    """Everything that a packet tells, views as bytes."""
    return {
        name: bytes(value) if isinstance(value := getattr(packet, name), memoryview) else value
        for name in (
            "frame",
            "link_header",
            "data",
            "protocol",
            "remote",
            "local",
            "wire_length",
            "truncated",
            "outgoing",
            "checksum_unfinished",
            "timestamp_ns",
            "vlan",
            "vnet",
        )
    }


# Table.


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, (form, _) in FORMATS.items()])
def test_column_format(name: str, form: str) -> None:
    """Each column is a read-only memoryview of its format with one element per packet."""
    column = getattr(batch_of([Row(frame())] * 3), name)
    assert isinstance(column, memoryview)
    assert (column.format, column.shape, column.readonly) == (form, (3,), True)
    with pytest.raises(TypeError, match="read-only"):
        column[0] = 1


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind) in FORMATS.items()])
def test_column_as_array(name: str, kind: type[np.generic], copied: bool) -> None:
    """numpy.frombuffer takes each column, and the array is read-only and says the same."""
    rows = [Row(frame(b"x" * n), b"", 2000 + n, 1000 + n, n, -n) for n in range(5)]
    batch = batch_of(rows)
    column = getattr(batch.copy() if copied else batch, name)
    array = np.frombuffer(column, dtype=kind)
    assert array.tolist() == list(column)
    assert len(array) == 5
    assert not array.flags.writeable


def test_columns_after_use_as_arrays() -> None:
    """Whole frames can be taken out of memory by the columns alone."""
    rows = [Row(frame(bytes([n]) * n)) for n in range(9)]
    batch = batch_of(rows)
    starts = np.frombuffer(batch.starts, dtype=np.uint32)
    lengths = np.frombuffer(batch.lengths, dtype=np.uint32)
    memory = np.frombuffer(batch.memory, dtype=np.uint8)
    taken = [memory[s : s + n].tobytes() for s, n in zip(starts, lengths, strict=True)]
    assert taken == [row.frame for row in rows]


def test_memory_is_read_only_bytes() -> None:
    """The memory is one read-only memoryview of bytes."""
    memory = batch_of([Row(frame())]).memory
    assert (memory.format, memory.ndim, memory.readonly) == ("B", 1, True)


# The batch as a sequence.


def test_indexing() -> None:
    """Packets are found by index from both ends, as in a list."""
    rows = [Row(frame(bytes([n]))) for n in range(4)]
    batch = batch_of(rows)
    for index in range(-4, 4):
        assert bytes(batch[index]) == rows[index].frame


@pytest.mark.parametrize("index", [3, 4, -4, -5, 2**70])
def test_index_out_of_range(index: int) -> None:
    """An index beyond either end raises IndexError and tells how many there are."""
    with pytest.raises(IndexError, match="of a batch of 3"):
        batch_of([Row(frame())] * 3)[index]


def test_iteration() -> None:
    """Iteration gives the packets in order, each time anew."""
    batch = batch_of([Row(frame(bytes([n]))) for n in range(4)])
    assert [bytes(packet)[-1] for packet in batch] == [0, 1, 2, 3]
    assert len(list(batch)) == len(batch) == 4


def test_behind() -> None:
    """The rest of a batch lies over the same memory, and the rest of the rest does too."""
    batch = batch_of([Row(frame(bytes([n]))) for n in range(5)])
    assert batch.behind(0) is batch
    rest = batch.behind(2)
    assert [bytes(packet)[-1] for packet in rest] == [2, 3, 4]
    assert [bytes(packet)[-1] for packet in rest.behind(1)] == [3, 4]
    assert list(rest.starts) == list(batch.starts)[2:]
    assert rest.memory.obj is batch.memory.obj
    assert len(batch.behind(5)) == 0
    assert list(batch.behind(5)) == []


def test_batch_repr() -> None:
    """A batch shows how many packets and bytes it holds."""
    assert repr(batch_of([Row(frame(b"1")), Row(frame(b"22"))])) == "<Batch of 2 packets, 31 bytes>"


# The fields of a packet.


def test_ethernet_fields() -> None:
    """The link header is the first 14 bytes, the source in it is remote, the destination local."""
    packet = one(Row(frame(b"abc"), protocol=0x88B5))
    assert bytes(packet.frame) == frame(b"abc")
    assert bytes(packet.link_header) == frame(b"")
    assert bytes(packet.data) == b"abc"
    assert (packet.remote, packet.local, packet.protocol) == (REMOTE, LOCAL, 0x88B5)


def test_fields_without_ethernet() -> None:
    """Without a link header the data is the frame, and there are no addresses."""
    packet = one(Row(b"\x45rest"), BARE)
    assert bytes(packet.frame) == bytes(packet.data) == b"\x45rest"
    assert bytes(packet.link_header) == b""
    assert (packet.remote, packet.local, packet.protocol) == (None, None, 0x0800)


def test_frame_without_data() -> None:
    """A frame of 14 bytes has a link header and no data, and is true all the same."""
    packet = one(Row(frame(b"")))
    assert (bytes(packet.data), len(packet)) == (b"", 14)
    assert packet


def test_views_are_read_only() -> None:
    """None of a packet's views can be written through."""
    packet = one(Row(frame()))
    assert packet.frame.readonly
    assert packet.link_header.readonly
    assert packet.data.readonly


def test_plain_packet() -> None:
    """Without flags nothing is truncated, outgoing, unfinished, tagged or timed."""
    packet = one(Row(frame(), timestamp=5, vlan_tci=6, vlan_tpid=7))
    assert not packet.truncated
    assert not packet.outgoing
    assert not packet.checksum_unfinished
    assert packet.timestamp_ns is None
    assert packet.vlan is None
    assert packet.vnet is None
    assert packet.wire_length == len(packet)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (Flags.TRUNCATED, "truncated"),
        (Flags.OUTGOING, "outgoing"),
        (Flags.CHECKSUM_UNFINISHED, "checksum_unfinished"),
    ],
)
def test_flag(flag: Flags, name: str) -> None:
    """Each flag, and no other, makes its property True."""
    assert getattr(one(Row(frame(), flags=flag)), name) is True
    assert getattr(one(Row(frame(), flags=0xFFFF & ~flag)), name) is False


@pytest.mark.parametrize("tci", [0, 5, 0x2005, 0xFFFF])
def test_vlan(tci: int) -> None:
    """The flag tells that there was a tag, not its value: a tag of 0 is one."""
    packet = one(Row(frame(), flags=Flags.VLAN, vlan_tci=tci, vlan_tpid=0x88A8))
    assert packet.vlan == Vlan(tci=tci, tpid=0x88A8)


@pytest.mark.parametrize("when", [0, 1, 1_700_000_000_123_456_789, -1])
def test_timestamp(when: int) -> None:
    """The flag tells that there is a timestamp, not its value."""
    assert one(Row(frame(), flags=Flags.TIMESTAMP, timestamp=when)).timestamp_ns == when


def test_wire_length() -> None:
    """The length on the wire is its own number beside the length kept."""
    packet = one(Row(frame(), wire_length=9000, flags=Flags.TRUNCATED))
    assert (packet.wire_length, packet.truncated, len(packet)) == (9000, True, len(frame()))


@pytest.mark.parametrize("size", [10, 12, 24])
@pytest.mark.parametrize("packet_info", [False, True])
@pytest.mark.parametrize("little", [False, True])
def test_vnet_header(size: int, packet_info: bool, little: bool) -> None:
    """The header's ten bytes are read in its own byte order, whatever stands in front and behind."""
    told = VnetHeader(1, 0x81, 54, 1448, 34, 16)
    raw = struct.pack("<BBHHHH" if little else ">BBHHHH", *told)
    prefix = (b"\xaa" * 4 if packet_info else b"") + raw + b"\xbb" * (size - 10)
    framing = Framing(True, size, packet_info, little)
    packet = one(Row(frame(), prefix), framing)
    assert packet.vnet == told
    assert bytes(packet) == frame()
    assert packet.copy().vnet == told


@pytest.mark.parametrize(
    ("flags", "needs_checksum"), [(0, False), (1, True), (2, False), (3, True), (0xFE, False)]
)
def test_vnet_needs_checksum(flags: int, needs_checksum: bool) -> None:
    """Bit 0 of the flags says that the checksum is unfinished."""
    assert VnetHeader(flags, 0, 0, 0, 0, 0).needs_checksum is needs_checksum


@pytest.mark.parametrize(
    ("gso_type", "is_super"), [(0, False), (0x80, False), (1, True), (0x81, True), (4, True), (5, True)]
)
def test_vnet_super_packet(gso_type: int, is_super: bool) -> None:
    """A segmentation type other than none makes a super-packet; the ECN bit alone is no type."""
    assert VnetHeader(0, gso_type, 0, 0, 0, 0).super_packet is is_super


@pytest.mark.parametrize(
    ("gso_type", "gso", "ecn"),
    [
        (0, Gso.NONE, False),
        (0x81, Gso.TCPV4, True),
        (4, Gso.TCPV6, False),
        (5, Gso.UDP_L4, False),
        (0x60, 0x60, False),
    ],
)
def test_vnet_gso(gso_type: int, gso: Gso | int, ecn: bool) -> None:
    """The type of a super-packet has a name, without the bit for ECN; one that linkrx does not know is a number."""
    told = VnetHeader(0, gso_type, 0, 0, 0, 0)
    assert (told.gso, told.ecn) == (gso, ecn)


@pytest.mark.parametrize(("flags", "valid"), [(0, False), (1, False), (2, True), (3, True)])
def test_vnet_checksum_valid(flags: int, valid: bool) -> None:
    """Bit 1 of the flags says that the checksum was looked at."""
    assert VnetHeader(flags, 0, 0, 0, 0, 0).checksum_valid is valid


@pytest.mark.parametrize(
    ("told", "header_bytes"),
    [
        (VnetHeader(1, 1, 999, 1448, 34, 16), 34 + 32),
        (VnetHeader(1, 0x84, 999, 1448, 34, 16), 34 + 32),
        (VnetHeader(1, 5, 999, 1448, 34, 6), 34 + 8),
        (VnetHeader(0, 1, 999, 1448, 34, 16), 999),
        (VnetHeader(1, 3, 999, 1448, 34, 6), 999),
        (VnetHeader(1, 1, 999, 1448, 100, 16), 999),
        (VnetHeader(1, 1, 999, 1448, 90, 16), 999),
        (VnetHeader(1, 0, 999, 0, 34, 16), 999),
    ],
)
def test_header_length_of_a_super_packet(told: VnetHeader, header_bytes: int) -> None:
    """How long the headers are is found where the checksum starts; without one the kernel's hint stands."""
    tcp = bytes(12) + b"\x80" + bytes(19)
    packet = one(Row((bytes(34) + tcp).ljust(100), struct.pack("=BBHHHH", *told)), Framing(True, 10))
    assert packet.vnet == told._replace(hdr_len=header_bytes)


def test_packet_repr() -> None:
    """A packet shows its protocol, its route where there is one, its length, and whether it was cut."""
    assert repr(one(Row(frame(b"abc"), protocol=0x88B5))) == (
        "<Packet 0x88b5 02:00:00:00:00:02 > 02:00:00:00:00:01 17 bytes>"
    )
    cut = Row(b"\x45", flags=Flags.TRUNCATED)
    assert repr(one(cut, BARE)) == "<Packet 0x0800 1 bytes truncated>"


def test_mac() -> None:
    """An address is written with colons, none as a dash."""
    assert mac(LOCAL) == "02:00:00:00:00:01"
    assert mac(None) == "-"


# Copies.


def test_packet_copy_has_memory_of_its_own_size() -> None:
    """A copied packet lies in bytes that are exactly as long as its frame."""
    packet = batch_of([Row(frame(b"first" * 10)), Row(frame(b"second"))])[1]
    memory = packet.copy().frame.obj
    assert type(memory) is bytes
    assert memory == frame(b"second")


def test_packet_copy_takes_its_vnet_header_along() -> None:
    """With a virtio-net header the copy is longer by it, and packet information is left behind."""
    framing = Framing(True, 12, True)
    packet = one(Row(frame(), b"info" + bytes(range(12))), framing)
    copied = packet.copy()
    assert copied.frame.obj == bytes(range(12)) + frame()
    assert copied.vnet == packet.vnet


def test_batch_copy_has_memory_of_its_own_size() -> None:
    """A copied batch lies in bytes that are exactly as long as its frames."""
    rows = [Row(frame(bytes(n))) for n in range(5)]
    copied = batch_of(rows, spare=50).copy()
    assert type(copied.memory.obj) is bytes
    assert copied.memory.obj == b"".join(row.frame for row in rows)
    assert copied.memory.readonly


def test_copy_outlives_what_it_was_taken_from() -> None:
    """A copy does not change when the memory that it was taken from does."""
    framing = BARE
    table = bytearray(ROW_BYTES)
    columns = Table(memoryview(table), 1)
    columns.lengths[0], columns.protocols[0] = 8, 0x0800
    memory = bytearray(b"\x45before!" + table)
    batch = Batch(bytes(memory), 0, 8, 1, 1, framing)
    copies = (batch.copy()[0], batch[0].copy())
    memory[:] = bytes(len(memory))
    for copied in copies:
        assert bytes(copied) == b"\x45before!"
        assert copied.protocol == 0x0800


def test_copy_of_nothing() -> None:
    """A copy of no packets is a batch of none."""
    copied = batch_of([Row(frame())]).behind(1).copy()
    assert len(copied) == 0
    assert list(copied.lengths) == []
    with pytest.raises(IndexError):
        copied[0]


# Anything at all.

uint16 = st.integers(0, 0xFFFF)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Row], Framing]:
    """Rows of any content under any framing."""
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
        vlan_tci=uint16,
        vlan_tpid=uint16,
    )
    return draw(st.lists(row, max_size=8)), framing


def vnet_of(words: tuple[int, ...], frame: bytes) -> VnetHeader:
    """The header with the length of a super-packet's headers, which test_header_length_of_a_super_packet looks at."""
    told = VnetHeader(*words)
    return told._replace(hdr_len=header_bytes(told, memoryview(frame))) if told.super_packet else told


def expected(row: Row, framing: Framing) -> dict[str, Any]:
    """What a packet of this row has to tell."""
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
        "truncated": bool(row.flags & 1),
        "outgoing": bool(row.flags & 2),
        "checksum_unfinished": bool(row.flags & 16),
        "timestamp_ns": row.timestamp if row.flags & 8 else None,
        "vlan": (row.vlan_tci, row.vlan_tpid) if row.flags & 4 else None,
        "vnet": vnet_of(struct.unpack(f"{order}BBHHHH", vnet), row.frame) if vnet else None,
    }


@settings(max_examples=100, deadline=None)
@given(table=tables(), spare=st.integers(0, 3), first=st.integers(0, 8))
def test_any_batch(table: tuple[list[Row], Framing], spare: int, first: int) -> None:
    """Packets, copies of packets, the rest of a batch and its copy all tell what was put in."""
    rows, framing = table
    batch = batch_of(rows, framing, spare)
    first = min(first, len(rows))
    wanted = [expected(row, framing) for row in rows]
    assert [fields(packet) for packet in batch] == wanted
    assert [fields(batch[index - len(rows)]) for index in range(len(rows))] == wanted
    assert [fields(packet.copy()) for packet in batch] == wanted
    assert [fields(packet) for packet in batch.copy()] == wanted
    assert [fields(packet) for packet in batch.behind(first)] == wanted[first:]
    assert [fields(packet) for packet in batch.behind(first).copy()] == wanted[first:]
    for packet, row in zip(batch, rows, strict=True):
        assert bytes(packet) == row.frame
        assert len(packet) == len(row.frame)


@settings(max_examples=50, deadline=None)
@given(table=tables())
def test_columns_of_any_batch(table: tuple[list[Row], Framing]) -> None:
    """The columns of a batch and of its copy hold one element for each packet, in order."""
    rows, framing = table
    for batch in (batch_of(rows, framing), batch_of(rows, framing).copy()):
        assert list(batch.lengths) == [len(row.frame) for row in rows]
        assert list(batch.protocols) == [row.protocol for row in rows]
        assert list(batch.flags) == [row.flags for row in rows]
        assert list(batch.timestamps) == [row.timestamp for row in rows]
        assert list(batch.wire_lengths) == [row.wire_length or len(row.frame) for row in rows]
        starts, lengths = list(batch.starts), list(batch.lengths)
        taken = [bytes(batch.memory[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
        assert taken == [row.frame for row in rows]
        for name, (form, kind) in FORMATS.items():
            column = getattr(batch, name)
            assert (column.format, column.readonly) == (form, True)
            assert np.array_equal(np.frombuffer(column, dtype=kind), list(column))
