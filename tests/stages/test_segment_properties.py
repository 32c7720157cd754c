"""Segmentation of super-packets: C against Python on random input, and both against frames that were built field by field."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.super_packets import TCP, UDP, Bench, Make, Row, Super

from linkrx import _core
from linkrx.kernel.uapi import VNET_HEADER_BYTES
from linkrx.memory.columns import align
from linkrx.memory.framing import Framing
from linkrx.packets.headers import CHECKSUM_UNFINISHED, TIMESTAMP, TRUNCATED, VLAN
from linkrx.stages import segmentation as segment

MAKES: tuple[Make, ...] = (segment.PythonSegmenter, segment.CSegmenter)
PLAIN = Framing(ethernet=True, vnet_header_size=VNET_HEADER_BYTES)
STRIPPED = struct.pack("=HH", 0x0001, 0x0008)  # struct tun_pi with TUN_PKT_STRIP
WHOLE = struct.pack("=HH", 0x0102, 0x0008)

sizes = st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 1500))
supers = st.builds(
    Super,
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from([TCP, UDP]),
    payload=st.one_of(st.integers(0, 100), st.integers(0, 3000)),
    size=sizes,
    tags=st.sampled_from([(), (), (0x8100,), (0x88A8, 0x8100), (0x8100,) * 3]),
    ip_options=st.sampled_from([b"", b"", b"\1" * 4, b"\1" * 40]),
    extensions=st.sampled_from(
        [(), (), ((0, bytes(6)),), ((43, bytes(14)), (60, bytes(6))), ((44, bytes(6)),)]
    ),
    tcp_options=st.sampled_from([b"", b"\1" * 12, b"\1" * 40]),
    flags=st.integers(0, 255),
    ecn=st.booleans(),
    identification=st.integers(0, 0xFFFF),
    sequence=st.integers(0, 0xFFFFFFFF),
)
uint16 = st.integers(0, 0xFFFF)
lies = st.fixed_dictionaries(
    {},
    optional={
        "flags": st.integers(0, 3),
        "gso_type": st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84, 0x85, 0x21]),
        "gso_size": st.one_of(st.integers(0, 3), uint16),
        "csum_start": st.one_of(st.integers(0, 120), uint16),
        "csum_offset": st.one_of(st.integers(0, 20), uint16),
    },
)


@st.composite
def rows_of_anything(draw: st.DrawFn, framing: Framing) -> Row:
    """A super-packet that may be cut, overwritten, or have a wrong header, or random bytes."""
    case = replace(draw(supers), ethernet=framing.ethernet)
    order = "<" if framing.vnet_little_endian else ">"
    vnet = case.vnet(order, **draw(st.one_of(st.just({}), lies))) + bytes(
        framing.vnet_header_size - VNET_HEADER_BYTES
    )
    information = draw(st.sampled_from([WHOLE, WHOLE, STRIPPED])) if framing.packet_info else b""
    frame = bytearray(case.frame())
    for at, value in draw(st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=2)):
        if at < len(frame):
            frame[at] = value
    data = information + vnet + frame
    cut = draw(st.one_of(st.none(), st.none(), st.integers(0, 150)))
    wire_length = draw(st.sampled_from([0, 0, 1, len(data), len(data) + 1]))
    flags = draw(st.sampled_from([0, 0, CHECKSUM_UNFINISHED, VLAN | TIMESTAMP, TRUNCATED]))
    return Row(
        data[:cut], flags, wire_length, draw(st.integers(-(2**63), 2**63 - 1)), draw(uint16), draw(uint16)
    )


framings = st.builds(
    Framing,
    ethernet=st.booleans(),
    vnet_header_size=st.sampled_from([10, 10, 12, 24]),
    packet_info=st.booleans(),
    vnet_little_endian=st.sampled_from([True, True, False]),
)


@pytest.mark.skipif(_core.lib is None, reason=f"compares with the C core: {_core.reason}")
@settings(max_examples=400, deadline=None)
@given(st.data(), framings, st.integers(1, 6), st.randoms(use_true_random=False))
def test_c_and_python_agree(data: st.DataObject, framing: Framing, rows: int, dice: random.Random) -> None:
    """In each call C and Python leave the same memory, descriptors and counts, until all rows are given."""
    taken = data.draw(st.lists(rows_of_anything(framing), max_size=4))
    benches = [Bench(make, framing, rows, n) for n, make in enumerate(MAKES)]
    for bench in benches:
        bench.take(taken, 3, 77)
    largest = align(max((len(one.data) for one in taken), default=0))
    while True:
        room = dice.choice((largest, 2 * largest, 20_000)) + dice.randrange(8)
        room = dice.randint(0, room) if dice.random() < 0.2 else room
        left = []
        for bench in benches:
            given = bench.give(room)
            memory = (bytes(bench.taken.memory), bytes(bench.given.memory))
            left.append((given, memory, bench.segmenter.waiting))
        assert left[0] == left[1]
        if not benches[0].segmenter.waiting:
            return
        assert left[0][0] or room < largest


@pytest.mark.parametrize("make", MAKES if _core.lib else MAKES[:1])
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        supers.filter(lambda case: len(case.tags) < 3 and (44, bytes(6)) not in case.extensions), max_size=4
    )
)
def test_super_packets_of_every_kind(make: Make, cases: list[Super]) -> None:
    """For any headers, the frames equal those that were built field by field."""
    cases = [replace(case, ecn=case.ecn and case.protocol == TCP) for case in cases]
    blank = bytes(VNET_HEADER_BYTES)
    expected = [Row(blank + frame) for case in cases for frame in case.frames()]
    taken = [Row(case.vnet() + case.frame()) for case in cases]
    assert Bench(make, PLAIN, 7).all(taken, 9000) == expected
