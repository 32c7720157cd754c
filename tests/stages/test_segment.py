"""Segmentation of super-packets, and finishing of checksums: the rules one by one."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from support.interruptions import After, Interrupted
from support.super_packets import (
    ACK,
    CWR,
    ECE,
    FIN,
    NOISE,
    PSH,
    TCP,
    UDP,
    Bench,
    Make,
    Row,
    Super,
    ones_complement,
)

from linkrx import _core
from linkrx.memory.columns import Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.packets.headers import CHECKSUM_UNFINISHED, MALFORMED, TIMESTAMP, TRUNCATED, VLAN
from linkrx.stages import segmentation as segment

needs_core = pytest.mark.skipif(_core.lib is None, reason=f"compares with the C core: {_core.reason}")
both = pytest.mark.parametrize(
    "make",
    [
        pytest.param(segment.PythonSegmenter, id="python"),
        pytest.param(segment.CSegmenter, id="c", marks=needs_core),
    ],
)

VNET = 10
PLAIN = Framing(ethernet=True, vnet_header_size=VNET)
BARE = Framing(ethernet=False, vnet_header_size=VNET)
STRIPPED = struct.pack("=HH", 0x0001, 0x0008)  # struct tun_pi with TUN_PKT_STRIP
WHOLE = struct.pack("=HH", 0x0102, 0x0008)

EVERY_KIND = [Super(version, protocol) for version in (4, 6) for protocol in (TCP, UDP)]
every_kind = pytest.mark.parametrize("case", EVERY_KIND, ids=["tcp4", "udp4", "tcp6", "udp6"])


def row(case: Super, **changes: int) -> Row:
    """The row of a super-packet, with changes to its virtio-net header."""
    return Row(case.vnet(**changes) + case.frame())


def whole(*frames: bytes) -> list[Row]:
    """The expected rows of frames, with virtio-net headers of zeroes."""
    return [Row(bytes(VNET) + frame) for frame in frames]


BAD = Row(b"", MALFORMED)
# A frame that needs no segmentation and no checksum.
OTHER = Row(bytes(VNET) + Super(payload=10, size=0).frames()[0])


@both
@every_kind
def test_split(make: Make, case: Super) -> None:
    """The frames are those of a sender that segments itself."""
    assert Bench(make, PLAIN).all([row(case)]) == whole(*case.frames())


@both
@every_kind
@pytest.mark.parametrize("hint", [0, 1, 14, 3000, 0xFFFF])
def test_hdr_len_is_not_trusted(make: Make, case: Super, hint: int) -> None:
    """The frames are the same for any hdr_len."""
    assert Bench(make, PLAIN).all([row(case, hdr_len=hint)]) == whole(*case.frames())


@both
@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_order(make: Make, order: str) -> None:
    """The virtio-net header is read in the byte order of the framing."""
    framing = Framing(True, VNET, vnet_little_endian=order == "<")
    case = EVERY_KIND[0]
    assert Bench(make, framing).all([Row(case.vnet(order) + case.frame())]) == whole(*case.frames())


@both
@pytest.mark.parametrize("size", [10, 11, 12, 24, 4096])
@pytest.mark.parametrize("information", [b"", WHOLE])
def test_prefix(make: Make, size: int, information: bytes) -> None:
    """Every segment has the packet information, and a virtio-net header of zeroes with the same length."""
    case = EVERY_KIND[1]
    framing = Framing(True, size, packet_info=bool(information))
    taken = Row(information + case.vnet() + b"\xee" * (size - VNET) + case.frame())
    expected = [Row(information + bytes(size) + frame) for frame in case.frames()]
    assert Bench(make, framing).all([taken]) == expected


@both
def test_metadata_goes_with_every_segment(make: Make) -> None:
    """Every segment has the timestamp, VLAN tag and flags of the super-packet, but no unfinished checksum."""
    case = EVERY_KIND[0]
    flags = VLAN | TIMESTAMP
    data = row(case).data
    taken = Row(data, flags | CHECKSUM_UNFINISHED, len(data), -5, 0x2005, 0x88A8)
    for one in Bench(make, PLAIN).all([taken]):
        assert replace(one, data=b"") == Row(b"", flags, 0, -5, 0x2005, 0x88A8)


@both
@pytest.mark.parametrize("version", [4, 6])
def test_udp_checksum_of_zero(make: Make, version: int) -> None:
    """A checksum of zero becomes 0xffff in UDP and stays zero in TCP segments. A finished packet never has zero."""
    for protocol, split in ((TCP, b"\0\0"), (UDP, b"\xff\xff")):
        for size, checksum in ((1400, split), (0, b"\xff\xff")):
            case = Super(version, protocol, 1400 + 100 if size else 100, size)
            at = case.payload - 100
            zero = replace(case, data=NOISE[:at] + bytes(2) + NOISE[at + 2 :])
            place = case.transport + case.checksum_offset
            last = zero.frames()[-1][place : place + 2]
            case = replace(case, data=NOISE[:at] + last + NOISE[at + 2 :])
            given = Bench(make, PLAIN).all([row(case)])
            assert given == whole(*case.frames())
            assert given[-1].data[VNET + place : VNET + place + 2] == checksum


@both
@pytest.mark.parametrize("ecn", [False, True])
def test_flags_of_the_edges(make: Make, ecn: bool) -> None:
    """CWR is set on the first segment only, FIN and PSH on the last only, and the other flags on all."""
    case = Super(flags=ACK | FIN | PSH | CWR | ECE, ecn=ecn)
    given = Bench(make, PLAIN).all([row(case)])
    flags = [one.data[VNET + case.transport + 13] for one in given]
    assert flags == [ACK | ECE | CWR, ACK | ECE, ACK | ECE | FIN | PSH]


@both
@pytest.mark.parametrize("dont_fragment", [False, True])
def test_identification_counts(make: Make, dont_fragment: bool) -> None:
    """The IPv4 identification increases with every segment, and wraps."""
    case = Super(4, TCP, 5000, 1448, identification=0xFFFE, dont_fragment=dont_fragment)
    given = Bench(make, PLAIN).all([row(case)])
    assert [one.data[VNET + 18 : VNET + 20] for one in given] == [b"\xff\xfe", b"\xff\xff", b"\0\0", b"\0\1"]


@both
@every_kind
@pytest.mark.parametrize("payload", [0, 1, 22, 100])
def test_checksum_is_finished(make: Make, case: Super, payload: int) -> None:
    """A packet that only needs its checksum gets it, also one of 64 bytes, and its virtio-net header is zeroed."""
    case = replace(case, payload=payload, size=0)
    taken = Row(case.vnet() + case.frame(), CHECKSUM_UNFINISHED | VLAN, 4711, 0, 3)
    taken = replace(taken, wire_length=len(taken.data))
    expected = replace(taken, data=bytes(VNET) + case.frames()[0], flags=VLAN)
    assert Bench(make, PLAIN).all([taken]) == [expected]


@both
@every_kind
def test_one_segment_is_a_packet(make: Make, case: Super) -> None:
    """A packet marked as super-packet with only one segment gets its checksum, and is otherwise unchanged."""
    case = replace(case, payload=1448)
    whole_one = replace(case, size=0)
    for size in (1448, 1449, 0xFFFF):
        taken = row(
            case, gso_type=5 if case.protocol == UDP else 1 if case.version == 4 else 4, gso_size=size
        )
        taken = replace(taken, wire_length=len(taken.data))
        expected = Row(bytes(VNET) + whole_one.frames()[0], 0, taken.wire_length)
        assert Bench(make, PLAIN).all([taken]) == [expected]


@both
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_without_a_pseudo_header(make: Make, version: int) -> None:
    """Without NEEDS_CSUM the checksums of TCP segments are computed with the pseudo-header."""
    case = Super(version)
    assert Bench(make, PLAIN).all([row(case, flags=0, csum_start=0)]) == whole(*case.frames())


@both
def test_the_rest_is_copied(make: Make) -> None:
    """Packets that need nothing, or are not longer than their prefix, are copied unchanged."""
    rows = [
        OTHER,
        Row(bytes(VNET) + b"x"),
        Row(b"\1" * VNET, 31),
        Row(b"\1\1", 0, 100, 7, 8, 9),
        Row(b""),
        Row(struct.pack("<BBHHHH", 2, 0, 1, 2, 3, 4) + b"frame", CHECKSUM_UNFINISHED, 5000),
    ]
    assert Bench(make, PLAIN).all(rows) == rows


@both
@pytest.mark.parametrize("how", ["flag", "wire length", "packet information"])
def test_truncated(make: Make, how: str) -> None:
    """A cut packet keeps its unfinished checksum. A cut super-packet is malformed and flagged as cut."""
    framing = Framing(True, VNET, packet_info=True)
    head = STRIPPED if how == "packet information" else WHOLE
    for case in (Super(payload=500, size=0), Super(payload=5000)):
        data = head + row(case).data
        flags = (TRUNCATED if how == "flag" else 0) | CHECKSUM_UNFINISHED
        taken = Row(data, flags, len(data) + 1 if how == "wire length" else 0)
        given = Bench(make, framing).all([taken])
        assert given == [taken if not case.size else Row(b"", flags | MALFORMED | TRUNCATED)]


FRAGMENT = Super(4).frame()
MALFORMATIONS: dict[str, Row] = {
    "no such kind": row(Super(), gso_type=2),
    "UFO": row(Super(4, UDP), gso_type=3),
    "tunnel": row(Super(), gso_type=0x21),
    "ECN alone": row(Super(), gso_type=0x80),
    "ECN with UDP": row(Super(4, UDP), gso_type=0x85),
    "segments of nothing": row(Super(), gso_size=0),
    "IPv6 called IPv4": row(Super(6), gso_type=1),
    "IPv4 called IPv6": row(Super(4), gso_type=4),
    "UDP called TCP": row(Super(4, UDP), gso_type=1, csum_offset=16),
    "TCP called UDP": row(Super(4), gso_type=5, csum_offset=6),
    "checksum elsewhere": row(Super(), csum_start=Super().transport + 2),
    "checksum of another protocol": row(Super(), csum_offset=6),
    "UDP without NEEDS_CSUM": row(Super(4, UDP), flags=0),
    "a fragment": Row(Super().vnet() + FRAGMENT[:20] + b"\x20\x00" + FRAGMENT[22:]),
    "a later fragment": Row(Super().vnet() + FRAGMENT[:20] + b"\x00\x01" + FRAGMENT[22:]),
    "an IPv6 fragment": row(Super(6, extensions=((44, bytes(6)),))),
    "no IP": Row(Super().vnet() + FRAGMENT[:12] + b"\x88\xb5" + FRAGMENT[14:]),
    "another version": Row(Super().vnet() + FRAGMENT[:14] + b"\x65" + FRAGMENT[15:]),
    "an IPv4 header of 16 bytes": Row(Super().vnet() + FRAGMENT[:14] + b"\x44" + FRAGMENT[15:]),
    "a TCP header of 16 bytes": Row(Super().vnet() + FRAGMENT[:46] + b"\x40" + FRAGMENT[47:]),
    "three tags": row(Super(tags=(0x88A8, 0x8100, 0x8100))),
    "a segment of more than IP allows": row(Super(payload=66_000), gso_size=65_496),
    "a checksum behind the end": row(Super(payload=10, size=0), csum_start=54, csum_offset=9),
    "a checksum far behind": row(Super(payload=10, size=0), csum_start=0xFFFF, csum_offset=0xFFFF),
}


@both
@pytest.mark.parametrize("name", MALFORMATIONS)
def test_malformed(make: Make, name: str) -> None:
    """A packet that cannot be split or finished gives one malformed row, and its neighbours are not affected."""
    good = EVERY_KIND[3]
    given = Bench(make, PLAIN).all([row(good), MALFORMATIONS[name], OTHER])
    assert given == [*whole(*good.frames()), BAD, OTHER]


@both
def test_limits(make: Make) -> None:
    """A segment can be as long as IP allows, and a checksum can be the last bytes of a frame."""
    case = Super(payload=65_496, size=65_495)
    assert Bench(make, PLAIN).all([row(case)]) == whole(*case.frames())
    data = row(Super(payload=10, size=0), csum_start=54, csum_offset=8).data
    (given,) = Bench(make, PLAIN).all([Row(data)])
    # The sum includes the contents of the checksum field.
    checksum = 0xFFFF ^ ones_complement(data[VNET + 54 :])
    assert given == Row(bytes(VNET) + data[VNET:-2] + checksum.to_bytes(2, "big"))


@both
@pytest.mark.parametrize(
    "case", [Super(4), Super(4, UDP), Super(6, extensions=((0, bytes(14)),)), Super(6, UDP)]
)
def test_cut_anywhere_in_the_headers(make: Make, case: Super) -> None:
    """A super-packet that ends within its headers is malformed."""
    data = row(case).data
    bench = Bench(make, PLAIN)
    for n in range(VNET + 1, VNET + case.headers):
        assert bench.all([Row(data[:n])]) == [BAD], n


@both
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
@pytest.mark.parametrize("room", [1600, 3100, 10_000, 200_000])
def test_carry_over(make: Make, rows: int, room: int) -> None:
    """A super-packet that does not fit into the rows or the room continues in the next call, without losing or repeating a frame."""
    first, second = Super(payload=30_000), Super(6, UDP, payload=9000, size=1400)
    expected = [*whole(*first.frames()), OTHER, *whole(*second.frames()), BAD, OTHER]
    taken = [row(first), OTHER, row(second), MALFORMATIONS["UFO"], OTHER]
    assert Bench(make, PLAIN, rows).all(taken, room) == expected


@both
def test_waiting(make: Make) -> None:
    """`waiting` is true until all frames of the rows are given."""
    bench = Bench(make, PLAIN, 2)
    assert bench.segmenter.waiting == 0
    bench.take([row(Super(payload=5000)), OTHER])  # four segments
    seen = [bench.segmenter.waiting]
    while bench.segmenter.waiting:
        bench.give(100_000)
        seen.append(bench.segmenter.waiting)
    assert seen == [2, 1, 1, 0] or seen == [2, 2, 1, 0]


@both
def test_no_room(make: Make) -> None:
    """With less aligned room than the next frame needs, no row is given, and none is lost."""
    bench = Bench(make, PLAIN)
    rows = [OTHER, OTHER]
    bench.take(rows)
    size = align(len(OTHER.data))
    for room in (0, 8, size - 8, size - 1):
        assert bench.give(room) == []
        assert bench.segmenter.waiting == 2
    assert bench.give(2 * size - 1) == [OTHER]
    assert bench.give(size) == [OTHER]
    assert bench.segmenter.waiting == 0


@both
def test_error_follows_the_packets(make: Make) -> None:
    """The errno of a receive is reported with the last of its packets, or without packets."""
    bench = Bench(make, PLAIN, 2)
    bench.take([row(Super(payload=5000))], receives=9, error=77)
    bench.give(100_000)
    assert (bench.given.report.error, bench.taken.report.error) == (0, 77)
    bench.give(100_000)
    assert (bench.given.report.error, bench.taken.report.error) == (77, 0)
    bench.take([], receives=0, error=9)
    assert bench.give(100_000) == []
    assert (bench.given.report.error, bench.taken.report.error) == (9, 0)
    bench.take([OTHER])
    bench.give(100_000)
    assert bench.given.report.error == 9  # until it is handled


@both
def test_receives_are_counted_once(make: Make) -> None:
    """The number of receives is reported once, with the first packets."""
    bench = Bench(make, PLAIN, 2)
    bench.take([row(Super(payload=5000))], receives=9)
    seen = []
    for _ in range(3):
        bench.give(100_000)
        seen.append(bench.given.report.receives)
    assert (seen, bench.taken.report.receives, bench.taken.report.count) == ([9, 0, 0], 0, 0)


def test_which_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The segmenter is in C with the compiled core, and in Python without."""
    made = [segment.segmenter(Descriptors(1), Descriptors(1), PLAIN)] if _core.lib else []
    monkeypatch.setattr(_core, "lib", None)
    made.append(segment.segmenter(Descriptors(1), Descriptors(1), PLAIN))
    assert [type(one) for one in made] == [segment.CSegmenter, segment.PythonSegmenter][-len(made) :]


@pytest.mark.only(3, 11)  # the interruptions depend on its instructions
def test_interrupted() -> None:
    """A signal handler that raises anywhere in the Python segmenter loses and repeats no frame."""
    case = Super(payload=5000)
    bench = Bench(segment.PythonSegmenter, PLAIN, 2)
    for events in range(1000):
        bench.given.clear()
        bench.take([row(case), OTHER], receives=9, error=77)
        before = bytes(bench.taken.memory)
        try:
            with After(events):
                bench.segmenter.segment(bench.staging, bench.arena, 100_000)
        except Interrupted:
            interrupted = True
            # The rows are whole, and the next pass continues at the same place.
            if not bench.given.report.count:
                assert bytes(bench.taken.memory) == before
                bench.segmenter.segment(bench.staging, bench.arena, 100_000)
        else:
            interrupted = False
        given = bench.described()
        while bench.segmenter.waiting:
            given += bench.give(100_000)
        assert given == [*whole(*case.frames()), OTHER]
        if not interrupted:
            break
    assert 40 < events < 999
