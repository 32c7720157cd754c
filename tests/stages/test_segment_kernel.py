"""The kernel and linkrx segment the same super-packets into the same frames, byte for byte."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from support.queues import MAKES, Queue
from support.run import segmented
from support.super_packets import (
    ACK,
    CWR,
    ECE,
    FIN,
    NOISE,
    PSH,
    TCP,
    UDP,
    URG,
    Bench,
    Row,
    Super,
)

from linkrx.kernel.uapi import VNET_HEADER_BYTES
from linkrx.memory.framing import Framing
from linkrx.packets.headers import MALFORMED

pytestmark = pytest.mark.usefixtures("devices")

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
LONGEST = 200_000


@contextmanager
def two_queues(mode: str) -> Iterator[tuple[Queue, Queue]]:
    """A queue with super-packets, and one for which the kernel segments."""
    queues: list[Queue] = []
    try:
        for offload in (True, False):
            queues.append(Queue(mode, offload=offload))
        yield queues[0], queues[1]
    finally:
        for queue in queues:
            queue.close()


def check(mode: str, cases: list[Super]) -> None:
    """Assert that the kernel's frames equal linkrx's frames of the injected and of the received super-packet."""
    framing = Framing(mode == "tap", VNET_HEADER_BYTES)
    benches = [Bench(make, framing, 256) for make in MAKES]
    with two_queues(mode) as (whole, cut):
        for case in cases:
            vnet, frame = case.vnet(), case.frame()
            expected = cut.leaving(vnet, frame)
            arrived = whole.leaving(vnet, frame)
            assert expected, case
            segmented["frames"] += len(expected)
            segmented["packets injected"] += 1
            segmented["of them received whole"] += len(arrived) == 1 < len(expected)
            assert case.frames() == expected, case
            for bench in benches:
                for rows in ([Row(vnet + frame)], [Row(data) for data in arrived]):
                    given: list[Row] = []
                    for n in range(0, len(rows), 64):
                        given += bench.all(rows[n : n + 64])
                    assert not any(row.flags & MALFORMED for row in given), case
                    assert [row.data[VNET_HEADER_BYTES:] for row in given] == expected, case


NOPS = b"\x01"
TIMESTAMP = b"\x01\x01\x08\x0a" + bytes(range(8))
PADDING = b"\x01\x04" + bytes(4)  # PadN: six bytes of an extension header
HOP_BY_HOP, ROUTING, DESTINATION = 0, 43, 60
ROUTE = b"\x04\x00" + bytes(4)  # type 4, no segments left
EXTENSIONS = (
    (),
    ((HOP_BY_HOP, PADDING),),
    ((DESTINATION, PADDING + bytes(8)),),
    ((HOP_BY_HOP, PADDING), (ROUTING, ROUTE), (DESTINATION, PADDING)),
)


def size_for(mtu: int, case: Super) -> int:
    """The payload of one segment on a link with this MTU."""
    return mtu - (case.headers - len(case.link))


def most_of(case: Super) -> int:
    """The largest payload within IP's 65,535 bytes."""
    return 65_535 - (case.headers - len(case.link)) + (40 if case.version == 6 else 0)


def sizes_of(case: Super) -> Iterator[Super]:
    """A case with every MTU, and payloads around the limits."""
    for mtu in (576, 1280, 1500, 9000):
        size = size_for(mtu, case)
        most = min(most_of(case), 128 * size if case.protocol == UDP else 70_000)
        for payload in (size + 1, 2 * size - 1, 2 * size, 2 * size + 1, 20_001, most):
            if size < payload <= most:
                yield replace(case, payload=payload, size=size)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_sizes(mode: str, protocol: int, version: int) -> None:
    """The frames are the same for MTUs from 576 to 9,000, and payloads from one byte more than a segment to the maximum."""
    options = TIMESTAMP if protocol == TCP else b""
    base = Super(version, protocol, ethernet=mode == "tap", tcp_options=options)
    check(mode, list(sizes_of(base)))


@pytest.mark.parametrize("version", [4, 6])
def test_tiny_segments(version: int) -> None:
    """The frames are the same for hundreds and thousands of segments of a few bytes."""
    cases = [Super(version, TCP, payload, size) for size in (8, 9, 88) for payload in (size + 1, 999, 20_000)]
    cases += [Super(version, UDP, payload, size) for size in (1, 8, 9) for payload in (size + 1, 128 * size)]
    check("tap", [*cases, Super(version, TCP, 65_000, 8)])


@pytest.mark.parametrize("ecn", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_flags(version: int, ecn: bool) -> None:
    """The frames are the same with FIN and PSH, CWR with and without the ECN bit, and other flags."""
    flags = (0, ACK, ACK | PSH, ACK | FIN, ACK | FIN | PSH, ACK | URG, ACK | CWR, ACK | CWR | ECE, 0xFF)
    sequences = (0, 0xFFFFFFFF - 1448, 0xFFFFF800)
    cases = [
        Super(version, TCP, 4000, 1448, flags=flag, ecn=ecn, sequence=sequence)
        for flag, sequence in itertools.product(flags, sequences)
    ]
    check("tap", cases)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_ipv4_headers(protocol: int) -> None:
    """The frames are the same with IPv4 options, identifications that wrap, with and without DF."""
    cases = [
        Super(4, protocol, 9000, 1400, ip_options=NOPS * n, identification=number, dont_fragment=df)
        for n, number, df in itertools.product((0, 4, 40), (0, 0xFFFD, 0xFFFF), (False, True))
    ]
    check("tap", cases)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_ipv6_extension_headers(protocol: int) -> None:
    """The frames are the same with hop-by-hop, routing and destination headers."""
    cases = [
        Super(6, protocol, payload, 1200, extensions=headers)
        for headers, payload in itertools.product(EXTENSIONS, (1201, 5000, 60_000))
    ]
    check("tap", cases)
    check("tun", [Super(6, protocol, 5000, 1200, ethernet=False, extensions=head) for head in EXTENSIONS])


@pytest.mark.parametrize("tags", [(0x8100,), (0x88A8,), (0x88A8, 0x8100), (0x8100, 0x8100)])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_vlan_tags(protocol: int, version: int, tags: tuple[int, ...]) -> None:
    """The frames are the same with one or two tags of 802.1Q and 802.1ad."""
    base = Super(version, protocol, 9000, 1400, tags=tags)
    check("tap", [base, Super(version, protocol, 300, 0, tags=tags), *list(sizes_of(base))[::5]])


@pytest.mark.parametrize("n", range(0, 44, 4))
def test_tcp_options(n: int) -> None:
    """The frames are the same with TCP headers of every length."""
    cases = [Super(version, TCP, 5000, 1400, tcp_options=NOPS * n) for version in (4, 6)]
    check("tap", cases)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_plain_packets(mode: str, protocol: int, version: int) -> None:
    """The frames are the same for packets that only need their checksum, also of 64 bytes, and with a checksum of zero."""
    cases = [
        Super(version, protocol, payload, 0, ethernet=mode == "tap")
        for payload in (0, 1, 2, 3, 10, 22, 100, 101, 1000, 1400)
    ]
    check(mode, cases + [with_checksum_zero(case) for case in cases[4:]])


def with_checksum_zero(case: Super) -> Super:
    """The case with a first word of payload that makes the last frame's checksum zero."""
    at = (case.payload - 1) // case.size * case.size if case.is_super else 0
    zeroed = replace(case, data=case.data[:at] + bytes(2) + case.data[at + 2 :])
    last = zeroed.frames()[-1]
    place = case.transport + case.checksum_offset
    word = last[place : place + 2]
    return replace(case, data=case.data[:at] + word + case.data[at + 2 :])


@pytest.mark.parametrize("payload", [65_468, 65_469, 65_495, 65_496, 66_000, 150_000])
@pytest.mark.parametrize("version", [4, 6])
def test_big_tcp(version: int, payload: int) -> None:
    """The frames are the same for TCP of more than 65,535 bytes over IPv6, with and without the jumbo option, which segments lack."""
    base = Super(version, TCP, payload, 1400, data=NOISE * 3)
    check("tap", [base, replace(base, size=9000), *([replace(base, jumbo=True)] if version == 6 else [])])


@pytest.mark.parametrize("version", [4, 6])
def test_checksum_of_zero_in_a_segment(version: int) -> None:
    """A segment's checksum of zero is 0xffff in UDP, and zero in TCP."""
    cases = [with_checksum_zero(Super(version, protocol, 4000, 1400)) for protocol in (TCP, UDP)]
    for case, checksum in zip(cases, (b"\x00\x00", b"\xff\xff"), strict=True):
        place = case.transport + case.checksum_offset
        assert case.frames()[-1][place : place + 2] == checksum
    check("tap", cases)


@pytest.mark.parametrize("seed", range(8))
def test_anything(seed: int) -> None:
    """The frames are the same for random mixtures of these properties."""
    dice = random.Random(seed)
    cases = []
    for _ in range(40):
        version, protocol = dice.choice((4, 6)), dice.choice((TCP, UDP))
        size = dice.choice((0, dice.randint(1, 200), dice.randint(400, 1460), dice.randint(1460, 9000)))
        most = 128 * size if protocol == UDP else 60_000
        cases.append(
            Super(
                version,
                protocol,
                min(most, 60_000, int(size * dice.uniform(1, 60)) + 1) if size else dice.randint(0, 1400),
                size,
                tags=dice.choice(((), (), (0x8100,), (0x88A8, 0x8100))),
                ip_options=NOPS * dice.choice((0, 0, 4, 12, 40)),
                extensions=dice.choice(EXTENSIONS) if version == 6 else (),
                tcp_options=NOPS * dice.choice((0, 12, 40)) if protocol == TCP else b"",
                flags=dice.randrange(256),
                ecn=protocol == TCP and dice.choice((True, False)),
                identification=dice.randrange(1 << 16),
                dont_fragment=dice.choice((True, False)),
                sequence=dice.randrange(1 << 32),
                data=dice.randbytes(60_000),
            )
        )
    check("tap", cases)


def lie(dice: random.Random) -> tuple[bytes, bytes]:
    """A virtio-net header and a frame, of which one or both may have wrong fields."""
    version, protocol = dice.choice((4, 6)), dice.choice((TCP, UDP))
    case = Super(
        version,
        protocol,
        dice.choice((10, 99, 100, 101, 120, 500, 1500, 2000)),
        dice.choice((0, 100, 500, 1000)),
        ip_options=NOPS * dice.choice((0, 0, 4)),
        extensions=dice.choice(EXTENSIONS) if version == 6 else (),
        tcp_options=NOPS * dice.choice((0, 12)) if protocol == TCP else b"",
        flags=dice.randrange(256),
    )
    frame = bytearray(case.frame())
    said: dict[str, int] = {}
    values = {
        "flags": (0, 1, 2, 3),
        "gso_type": (0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0x85),
        "gso_size": (0, 1, 50, 100, 2000, 65_535),
        "csum_start": (0, 14, 34, 54, case.transport + 2, len(frame) - 2, 65_535),
        "csum_offset": (0, 6, 16, 30, 60_000),
    }
    for _ in range(dice.randrange(3)):
        name = dice.choice(tuple(values))
        said[name] = dice.choice(values[name])
    if dice.random() < 0.5:
        frame[dice.randrange(14, min(case.headers, len(frame)))] = dice.randrange(256)
    return case.vnet(**said), bytes(frame)


@pytest.mark.parametrize("seed", range(4))
def test_wrong_virtio_net_headers(seed: int) -> None:
    """For a wrong virtio-net header, the kernel or linkrx refuses the packet, or both give the same frames."""
    dice = random.Random(seed)
    benches = [Bench(make, Framing(True, VNET_HEADER_BYTES), 256) for make in MAKES]
    with closing(Queue("tap", offload=False)) as queue:
        for _ in range(400):
            vnet, frame = lie(dice)
            try:
                expected = queue.leaving(vnet, frame)
            except OSError as refusal:
                if refusal.errno not in (errno.EINVAL, errno.EMSGSIZE):
                    raise
                expected = []
            for bench in benches:
                given = bench.all([Row(vnet + frame)])
                made = [row.data[VNET_HEADER_BYTES:] for row in given if not row.flags & MALFORMED]
                segmented["wrong headers that both segment"] += bool(expected and made)
                assert not expected or not made or made == expected, (vnet, frame)
