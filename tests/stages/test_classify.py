"""Classification: the rules one by one, and C against Python on random frames."""

from __future__ import annotations

import random
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import ANYWHERE, Maker, packed

from linkrx import _core
from linkrx.kernel import bpf
from linkrx.memory.columns import ROW_BYTES, Descriptors, Table, align
from linkrx.memory.counters import BYTES, CUT, EMPTY, FILTERED, PACKETS, RUNTS, UNKNOWN_PROTOCOL, new_counters
from linkrx.memory.counters import MALFORMED as COUNT_MALFORMED
from linkrx.memory.framing import PER_PACKET_LINK_TYPE, PER_PACKET_NO_HEADER, Framing
from linkrx.packets import Owner
from linkrx.packets.headers import MALFORMED, Flags
from linkrx.stages.classify import Classify, Filter, classifier


class Make(Protocol):
    """One of the two implementations."""

    def __call__(
        self,
        descriptors: Descriptors,
        framing: Framing,
        counters: array[int],
        *,
        interface: int = 0,
        filter: Filter | None = None,
    ) -> Classify: ...


def core_classifier(
    descriptors: Descriptors,
    framing: Framing,
    counters: array[int],
    *,
    interface: int = 0,
    filter: Filter | None = None,
) -> Classify:
    """Call lrx_classify() as the receiver in C does."""
    described = _core.new(
        "struct lrx_classifier *",
        descriptors=descriptors.address(),
        rows=descriptors.rows,
        prefix=framing.prefix,
        packet_info=framing.packet_info_size,
        link_header=framing.link_header,
        link_type=framing.link_type,
        per_packet=framing.per_packet,
        interface=interface,
        counters=_core.address(counters),
    )
    rule = filter or Filter()
    program = bytearray(packed(rule.program))
    if program:
        described.filter.program = _core.at("struct lrx_instruction *", _core.address(program))
        described.filter.tags = rule.tags

    def classify(arena: Owner, count: int) -> None:
        region = arena.address + arena.cursor
        assert bool(program) == bool(rule.program)  # kept alive
        _core.lib.lrx_classify(described, region, count, region + descriptors.report.end)

    return classify


needs_core = pytest.mark.skipif(_core.lib is None, reason=f"compares with the C core: {_core.reason}")
IMPLEMENTATIONS = [
    pytest.param(classifier, id="python"),
    pytest.param(core_classifier, id="c", marks=needs_core),
]
both = pytest.mark.parametrize("make", IMPLEMENTATIONS)

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
ETHERNET = Framing(ethernet=True)
BARE = Framing(ethernet=False)
STRIPPED = struct.pack("=HH", 0x0001, 0x0008)  # struct tun_pi with TUN_PKT_STRIP
WHOLE = struct.pack("=HH", 0, 0x0008)

ROOM = 4096  # bytes for the frames of one receive, the table behind them


@dataclass(frozen=True)
class Received:
    """One packet of a backend: its row, and its bytes in memory."""

    data: bytes
    wire_length: int = 0
    flags: int = 0
    timestamp: int = 0
    vlan_tci: int = 0
    vlan_tpid: int = 0
    interface: int = 0
    protocol: int = 0
    link_type: int = 0
    address: bytes = b""


@dataclass
class Outcome:
    """The result of classification."""

    count: int
    table: Table
    counters: array[int]
    frames: list[bytes] = field(default_factory=list)

    def counted(self) -> dict[int, int]:
        """The counters that are not zero."""
        return {slot: number for slot, number in enumerate(self.counters) if number}


def run(make: Make, framing: Framing, packets: Sequence[Received], interface: int = 0) -> Outcome:
    """Write the packets into memory as a backend does, and classify them."""
    descriptors = Descriptors(len(packets) + 3)
    arena = Owner(2 * ROOM)
    cursor = 0
    for index, packet in enumerate(packets):
        arena.view[arena.cursor + cursor : arena.cursor + cursor + len(packet.data)] = packet.data
        columns = descriptors.columns
        columns.starts[index] = cursor
        columns.lengths[index] = len(packet.data)
        columns.wire_lengths[index] = packet.wire_length
        columns.flags[index] = packet.flags
        columns.timestamps[index] = packet.timestamp
        columns.vlan_tcis[index] = packet.vlan_tci
        columns.vlan_tpids[index] = packet.vlan_tpid
        columns.interfaces[index] = packet.interface
        columns.protocols[index] = packet.protocol
        columns.link_types[index] = packet.link_type
        columns.addresses[index] = int.from_bytes(packet.address.ljust(8, b"\0"), sys.byteorder)
        columns.address_lengths[index] = len(packet.address)
        cursor = align(cursor + len(packet.data))
    descriptors.report.count = len(packets)
    descriptors.report.end = cursor
    counters = new_counters()
    make(descriptors, framing, counters, interface=interface)(arena, len(packets))

    assert descriptors.report.count == 0
    assert descriptors.report.rows == len(packets)
    count = descriptors.report.classified - 1
    region = memoryview(bytes(arena.view[arena.cursor :]))
    table = Table(region[cursor : cursor + ROW_BYTES * len(packets)], len(packets))
    table._count = count
    outcome = Outcome(count, table, counters)
    outcome.frames = [
        bytes(region[start : start + length])
        for start, length in zip(table.starts, table.lengths, strict=True)
    ]
    return outcome


def frame(protocol: int = 0x0800, payload: bytes = b"payload") -> bytes:
    """An Ethernet frame."""
    return LOCAL + REMOTE + protocol.to_bytes(2, "big") + payload


@both
def test_ethernet_frame(make: Make) -> None:
    """The protocol comes from the header."""
    got = run(make, ETHERNET, [Received(frame(0x88B5))])
    assert got.frames == [frame(0x88B5)]
    assert list(got.table.protocols) == [0x88B5]
    assert got.counted() == {PACKETS: 1, BYTES: len(frame())}


@both
@pytest.mark.parametrize("length", range(1, 14))
def test_runt(make: Make, length: int) -> None:
    """A frame shorter than its link header is counted and skipped, and its neighbours are delivered."""
    good = [Received(frame(1537)), Received(frame(1538))]
    got = run(make, ETHERNET, [good[0], Received(b"\x42" * length), good[1]])
    assert list(got.table.protocols) == [1537, 1538]
    assert got.frames == [frame(1537), frame(1538)]
    assert got.counted() == {PACKETS: 2, BYTES: 2 * len(frame()), RUNTS: 1}


@both
@pytest.mark.parametrize("framing", [ETHERNET, BARE, Framing(True, 10), Framing(False, 0, True)])
def test_length_zero(make: Make, framing: Framing) -> None:
    """A packet of no bytes counts as empty, with or without headers in front, and not as a runt."""
    assert run(make, framing, [Received(b"")]).counted() == {EMPTY: 1}


@both
def test_link_header_alone_is_a_packet(make: Make) -> None:
    """A frame of exactly 14 bytes is delivered, with no data."""
    got = run(make, ETHERNET, [Received(frame(0x88B5, b""))])
    assert got.frames == [frame(0x88B5, b"")]
    assert got.counted() == {PACKETS: 1, BYTES: 14}


@both
@pytest.mark.parametrize("version", range(16))
def test_ip_version_tells_the_protocol(make: Make, version: int) -> None:
    """Without a link header, IP version 4 gives 0x0800 and 6 gives 0x86DD. Other versions are counted and skipped."""
    known = {4: 0x0800, 6: 0x86DD}
    data = bytes([version << 4 | 5]) + b"rest"
    got = run(make, BARE, [Received(b"\x45"), Received(data), Received(b"\x60")])
    middle = [known[version]] if version in known else []
    assert list(got.table.protocols) == [0x0800, *middle, 0x86DD]
    assert got.counters[UNKNOWN_PROTOCOL] == (version not in known)
    assert got.counters[PACKETS] == 2 + len(middle)


@both
@pytest.mark.parametrize("field", [0, 46, 1500, 1535, 1536, 0x0800, 0xFFFF])
def test_length_field_is_handed_over(make: Make, field: int) -> None:
    """The protocol is the type field, also if it is an 802.3 length."""
    assert list(run(make, ETHERNET, [Received(frame(field))]).table.protocols) == [field]


@both
@pytest.mark.parametrize("size", [10, 12, 24])
@pytest.mark.parametrize("framing", [ETHERNET, BARE])
def test_virtio_net_header_alone(make: Make, size: int, framing: Framing) -> None:
    """A message that is not longer than its virtio-net header counts as empty. With one byte more it is a frame of one byte."""
    with_header = Framing(framing.ethernet, size)
    for n in (1, size - 1, size):
        assert run(make, with_header, [Received(b"\x45" * n)]).counted() == {EMPTY: 1}
    one_more = run(make, with_header, [Received(b"\x45" * (size + 1))]).counted()
    assert one_more == ({RUNTS: 1} if framing.ethernet else {PACKETS: 1, BYTES: 1})


@both
def test_prefix_is_stripped(make: Make) -> None:
    """Packet information is first, then the virtio-net header, then the frame. Lengths are the frame's."""
    framing = Framing(True, 12, True)
    got = run(make, framing, [Received(WHOLE + b"v" * 12 + frame(), 4 + 12 + len(frame()))])
    assert got.frames == [frame()]
    assert list(got.table.wire_lengths) == [len(frame())]
    assert list(got.table.flags) == [0]
    assert got.counted() == {PACKETS: 1, BYTES: len(frame())}


@both
def test_stripped_packet_information_says_truncated(make: Make) -> None:
    """TUN_PKT_STRIP in the packet information flags the packet as truncated, which is counted."""
    framing = Framing(True, 0, True)
    got = run(make, framing, [Received(STRIPPED + frame()), Received(WHOLE + frame())])
    assert list(got.table.flags) == [Flags.TRUNCATED, 0]
    assert got.counted() == {PACKETS: 2, BYTES: 2 * len(frame()), CUT: 1}


@both
@pytest.mark.parametrize("flags", [0x0002, 0x0100, 0xFFFE])
def test_other_packet_information_flags(make: Make, flags: int) -> None:
    """Only TUN_PKT_STRIP in the packet information means truncation."""
    got = run(make, Framing(True, 0, True), [Received(struct.pack("=HH", flags, 0) + frame())])
    assert list(got.table.flags) == [0]


@both
def test_no_packet_information_no_strip(make: Make) -> None:
    """Without packet information the same bytes are part of the frame and flag nothing."""
    got = run(make, ETHERNET, [Received(STRIPPED + frame())])
    assert got.frames == [STRIPPED + frame()]
    assert list(got.table.flags) == [0]


@both
def test_wire_length(make: Make) -> None:
    """A wire length above the length flags truncation. A wire length of 0, or below the length, becomes the length."""
    size = len(frame())
    got = run(make, ETHERNET, [Received(frame(), wire) for wire in (0, size - 1, size, size + 1, 9000)])
    assert list(got.table.wire_lengths) == [size, size, size, size + 1, 9000]
    assert list(got.table.flags) == [0, 0, 0, Flags.TRUNCATED, Flags.TRUNCATED]
    assert got.counters[CUT] == 2


@both
def test_wire_length_of_a_prefixed_frame(make: Make) -> None:
    """The kernel's wire length includes the prefix, and the packet's does not."""
    got = run(make, Framing(True, 10), [Received(b"v" * 10 + frame(), 1010)])
    assert list(got.table.wire_lengths) == [1000]


@both
def test_truncated_counts_among_all(make: Make) -> None:
    """A cut packet is counted as truncated once, also if it is a runt or of unknown protocol."""
    assert run(make, ETHERNET, [Received(b"short", 100)]).counted() == {RUNTS: 1, CUT: 1}
    assert run(make, BARE, [Received(b"\0", 100)]).counted() == {UNKNOWN_PROTOCOL: 1, CUT: 1}
    flagged = Received(frame(), 100, Flags.TRUNCATED)
    assert run(make, ETHERNET, [flagged]).counters[CUT] == 1


@both
def test_metadata_goes_with_its_packet(make: Make) -> None:
    """Timestamp, flags and VLAN tag stay with their packet if earlier packets are skipped."""
    flags = Flags.VLAN | Flags.TIMESTAMP | Flags.OUTGOING | Flags.CHECKSUM_UNFINISHED
    whole = Received(frame(), 0, int(flags), -(2**63), 0x2005, 0x88A8)
    got = run(make, ETHERNET, [Received(b""), Received(b"runt", 0, 1, 7, 8, 9), whole])
    assert got.count == 1
    table = got.table
    row = (table.timestamps[0], table.flags[0], table.vlan_tcis[0], table.vlan_tpids[0])
    assert row == (-(2**63), flags, 0x2005, 0x88A8)


@both
def test_interface(make: Make) -> None:
    """A packet's interface is the one that the backend reports, or else the source's."""
    packets = [Received(frame(), interface=interface) for interface in (0, 7, 2**32 - 1)]
    assert list(run(make, ETHERNET, packets).table.interfaces) == [0, 7, 2**32 - 1]
    assert list(run(make, ETHERNET, packets, interface=3).table.interfaces) == [3, 7, 2**32 - 1]


@both
@pytest.mark.parametrize("framing", [ETHERNET, BARE, Framing(True, 10, True)])
def test_malformed_rows_are_counted_and_not_read(make: Make, framing: Framing) -> None:
    """A row with MALFORMED counts as one malformed packet of any length, also as cut if flagged. No delivered packet has the flag."""
    whole = Received(bytes(framing.prefix) + (frame() if framing.ethernet else b"\x45"))
    bad = [Received(b"", 0, MALFORMED), Received(STRIPPED, 9000, MALFORMED)]
    got = run(make, framing, [whole, *bad, Received(b"", 0, MALFORMED | Flags.TRUNCATED), whole])
    size = len(whole.data) - framing.prefix
    assert got.counted() == {PACKETS: 2, BYTES: 2 * size, COUNT_MALFORMED: 3, CUT: 1}
    assert list(got.table.flags) == [0, 0]


@both
def test_nothing_but_bad_packets(make: Make) -> None:
    """A receive without valid packets leaves an empty table."""
    got = run(make, ETHERNET, [Received(b""), Received(b"runt")])
    assert (got.count, got.frames) == (0, [])


@both
def test_counters_add_up(make: Make) -> None:
    """The counts of one receive are added to those of earlier receives."""
    descriptors, counters, arena = Descriptors(1), new_counters(), Owner(ROOM)
    one = make(descriptors, BARE, counters)
    arena.view[arena.cursor] = 0x45
    for _ in range(3):
        descriptors.columns.lengths[0] = 20
        descriptors.report.count, descriptors.report.end = 1, 24
        one(arena, 1)
    assert (counters[PACKETS], counters[BYTES]) == (3, 60)


@dataclass(frozen=True)
class Descriptor:
    """A row with any position and metadata."""

    start: int
    length: int
    edge: int | None  # a length relative to the prefix instead, so that limits are not rare
    wire_length: int
    flags: int
    timestamp: int
    vlan_tci: int
    vlan_tpid: int
    interface: int
    inner_type: int | None  # written to the offset of the type behind an inner VLAN tag
    first_byte: int | None  # written to the start of the frame, so that known versions are not rare
    protocol: int
    link_type: int
    address: int
    address_length: int
    tun_pi_flags: int | None  # written to the offset of packet information


MEMORY = 1280  # frames may be, and overlap, anywhere in it

uint16 = st.integers(0, 0xFFFF)
descriptor_of_anything = st.builds(
    Descriptor,
    start=st.integers(0, MEMORY - 256),
    length=st.integers(0, 200),
    edge=st.one_of(st.none(), st.sampled_from([0, 1, 13, 14, 15])),
    wire_length=st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 2**32 - 1)),
    flags=st.one_of(st.just(0), uint16),
    timestamp=st.integers(-(2**63), 2**63 - 1),
    vlan_tci=uint16,
    vlan_tpid=uint16,
    interface=st.integers(0, 2**32 - 1),
    protocol=st.one_of(st.just(0), st.sampled_from([0x0800, 0x86DD, 0x8100, 0x88A8]), uint16),
    link_type=st.one_of(st.just(0), st.sampled_from([1, 519, 768, 772, 778, 0xFFFE]), uint16),
    address=st.integers(0, 2**64 - 1),
    address_length=st.integers(0, 8),
    inner_type=st.one_of(st.none(), st.sampled_from([0, 60, 0x0800, 0x86DD, 0x8100, 0x88A8])),
    first_byte=st.one_of(st.none(), st.sampled_from([0x40, 0x45, 0x4F, 0x60, 0x6F])),
    tun_pi_flags=st.one_of(st.none(), st.sampled_from([0, 1, 2, 3, 0x0100, 0xFFFF])),
)
framings = st.builds(
    Framing,
    ethernet=st.booleans(),
    vnet_header_size=st.sampled_from([0, 0, 10, 11, 12, 24]),
    packet_info=st.booleans(),
    link_type=st.sampled_from([0, 1, 772, 778, 0xFFFE]),
    per_packet=st.sampled_from([0, PER_PACKET_NO_HEADER, PER_PACKET_LINK_TYPE]),
)

_arenas: list[Owner] = []


def arena_pair() -> list[Owner]:
    """Two arenas, one for each implementation, made once."""
    while len(_arenas) < 2:
        _arenas.append(Owner(8192))
    return _arenas


@needs_core
@settings(max_examples=300, deadline=None)
@given(
    framing=framings,
    packets=st.lists(descriptor_of_anything, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    spare_rows=st.integers(0, 3),
    interface=st.integers(0, 2**32 - 1),
    counted=st.integers(0, 2**40),
    filters=st.booleans(),
    tags=st.booleans(),
)
def test_c_and_python_agree(
    framing: Framing,
    packets: list[Descriptor],
    seed: int,
    spare_rows: int,
    interface: int,
    counted: int,
    filters: bool,
    tags: bool,
) -> None:
    """C and Python leave the same memory, table, counters and report."""
    memory = random.Random(seed).randbytes(MEMORY)
    program = Maker(seed, 100, ANYWHERE, headers=(bpf.NET_OFF, bpf.LL_OFF)).program() if filters else []
    rule = Filter(program, tags)
    left: list[tuple[bytes, list[int], bytes]] = []
    for make, arena in zip((classifier, core_classifier), arena_pair(), strict=True):
        arena.view[:] = b"\xa5" * arena.limit
        cursor = arena.cursor
        arena.view[cursor : cursor + len(memory)] = memory
        descriptors = Descriptors(max(1, len(packets) + spare_rows))
        columns = descriptors.columns
        for index, packet in enumerate(packets):
            columns.starts[index] = packet.start
            edge = packet.edge
            columns.lengths[index] = packet.length if edge is None else framing.prefix + edge
            columns.wire_lengths[index] = packet.wire_length
            columns.flags[index] = packet.flags
            columns.timestamps[index] = packet.timestamp
            columns.vlan_tcis[index] = packet.vlan_tci
            columns.vlan_tpids[index] = packet.vlan_tpid
            columns.interfaces[index] = packet.interface
            columns.protocols[index] = packet.protocol
            columns.link_types[index] = packet.link_type
            columns.addresses[index] = packet.address
            columns.address_lengths[index] = packet.address_length
            at = cursor + packet.start
            if packet.tun_pi_flags is not None:
                struct.pack_into("=H", arena.view, at, packet.tun_pi_flags)
            if packet.first_byte is not None:
                arena.view[at + framing.prefix] = packet.first_byte
            if packet.inner_type is not None:
                struct.pack_into("!H", arena.view, at + framing.prefix + 2, packet.inner_type)
        descriptors.report.count = len(packets)
        descriptors.report.end = MEMORY
        counters = array("Q", [counted] * len(new_counters()))
        make(descriptors, framing, counters, interface=interface, filter=rule)(arena, len(packets))
        left.append((bytes(arena.view), list(counters), bytes(descriptors.report)))
    of_python, of_c = left
    assert of_python == of_c
    # Every packet was counted exactly once.
    slots = of_c[1]
    kinds = (PACKETS, RUNTS, EMPTY, UNKNOWN_PROTOCOL, COUNT_MALFORMED, FILTERED)
    assert sum(slots[slot] - counted for slot in kinds) == len(packets)
