"""Filters on capture files: an expression accepts the same packets as `tcpdump -r FILE EXPRESSION`, for all link types."""

from __future__ import annotations

import asyncio
import io
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import captures
from support.captures import Interface, Pieces, Recorded
from support.frames import any_expression, any_frame, tagged, udp
from support.run import thorough

import linkrx
from linkrx import _core
from linkrx.sources import libpcap
from linkrx.testing.waiting import running

pytestmark = [
    pytest.mark.skipif(_core.reason is not None, reason=f"capture files take the C core: {_core.reason}"),
    pytest.mark.skipif(
        isinstance(libpcap._library(), str), reason=f"compiles expressions: {libpcap._library()}"
    ),
]
needs_tcpdump = pytest.mark.skipif(
    shutil.which("tcpdump") is None, reason="needs tcpdump: apt install tcpdump"
)

LITTLE = sys.byteorder == "little"
FRAMES = 120
ALL = [(6, 0, 0, 0xFFFFFFFF)]


def head_of(frame: bytes, chosen: random.Random) -> tuple[int, bytes]:
    """The protocol of an Ethernet frame, as in Linux cooked, and the bytes after it."""
    kind = int.from_bytes(frame[12:14], "big")
    return (kind if kind >= 0x0600 else 4), frame[14:]


def sll(frame: bytes, chosen: random.Random) -> bytes:
    """LINKTYPE_LINUX_SLL."""
    kind, body = head_of(frame, chosen)
    return struct.pack("!HHH6sxxH", chosen.randrange(5), 1, 6, frame[6:12], kind) + body


def sll2(frame: bytes, chosen: random.Random) -> bytes:
    """LINKTYPE_LINUX_SLL2."""
    kind, body = head_of(frame, chosen)
    return (
        struct.pack("!HHIHBB6sxx", kind, 0, chosen.choice((2, 3)), 1, chosen.randrange(5), 6, frame[6:12])
        + body
    )


def family(frame: bytes, order: str, chosen: random.Random) -> bytes:
    """LINKTYPE_NULL and LINKTYPE_LOOP. The number of IPv6 differs between systems."""
    kind, body = head_of(frame, chosen)
    number = {0x0800: 2, 0x86DD: chosen.choice((10, 24, 28, 30))}.get(kind, 7)
    return struct.pack(order + "I", number) + body


def ppp(frame: bytes, chosen: random.Random) -> bytes:
    """LINKTYPE_PPP."""
    kind, body = head_of(frame, chosen)
    return struct.pack("!BBH", 0xFF, 3, {0x0800: 0x21, 0x86DD: 0x57}.get(kind, 0xC021)) + body


def wlan(frame: bytes, chosen: random.Random) -> bytes:
    """LINKTYPE_IEEE802_11: data, with a SNAP header."""
    kind, body = head_of(frame, chosen)
    return (
        b"\x08\x01\x00\x00"
        + frame[:6]
        + frame[6:12] * 2
        + b"\x00\x00\xaa\xaa\x03\x00\x00\x00"
        + struct.pack("!H", kind)
        + body
    )


def ethernet(frame: bytes, chosen: random.Random) -> bytes:
    """LINKTYPE_ETHERNET, some with one or two tags."""
    for tpid in chosen.choice(((), (), (0x8100,), (0x8100, 0x88A8))):
        frame = tagged(frame, chosen.choice((5, 6, 0x2005)), tpid)
    return frame


# Link type, byte order of the file, and a function that makes a record from an Ethernet frame.
KINDS: dict[str, tuple[int, str, Any]] = {
    "ethernet": (1, "<", ethernet),
    "ethernet, the other order": (1, ">", ethernet),
    "raw": (101, "<", lambda frame, _: frame[14:]),
    "raw 12": (12, "<", lambda frame, _: frame[14:]),
    "ipv4": (228, "<", lambda frame, _: frame[14:]),
    "ipv6": (229, ">", lambda frame, _: frame[14:]),
    "cooked": (113, "<", sll),
    "cooked v2": (276, ">", sll2),
    "null": (0, "<", lambda frame, chosen: family(frame, "<", chosen)),
    "null, the other order": (0, ">", lambda frame, chosen: family(frame, ">", chosen)),
    "loop": (108, "<", lambda frame, chosen: family(frame, ">", chosen)),
    "ppp": (9, "<", ppp),
    "802.11": (105, "<", wlan),
}

# Some of them are valid for one link type only. tcpdump refuses them on the others, and so does linkrx.
SPECIAL = (
    "vlan",
    "vlan 5",
    "vlan 5 and udp",
    "not vlan",
    "vlan and vlan 6 and ip",
    "ether host 02:00:00:00:00:02",
    "ether[6:4] = 0x02000000",
    "link[0] & 1 = 1",
    "link[2:2] = 0x0800",
    "ether proto 0x0806",
    "ether broadcast",
    "wlan addr1 02:00:00:00:00:01",
    "type data",
    "less 70",
    "greater 80",
    "len = 60",
    "mpls",
    "pppoes",
    "llc",
    "ip broadcast",
    "ip multicast",
    "ip6 proto 17",
    "port 53 or port 67",
    "atalk",
    "ifindex 2",
    "lat",
    "",
)


def records_of(name: str, seed: int) -> list[bytes]:
    """The records of a file of that kind."""
    chosen = random.Random(seed)
    return [KINDS[name][2](any_frame(chosen), chosen) for _ in range(FRAMES)]


def pcap_of(name: str, records: list[bytes]) -> bytes:
    """A pcap file of that kind. The seconds of a record's timestamp are its number."""
    link_type, order, _ = KINDS[name]
    packets = [
        Recorded(record, len(record) + number % 3, number * 10**9) for number, record in enumerate(records)
    ]
    return captures.pcap(packets, link_type=link_type, order=order)


def by_tcpdump(path: Path, expression: str) -> set[int] | None:
    """The numbers of the packets that tcpdump accepts, or None if it refuses the expression."""
    ran = subprocess.run(
        ["tcpdump", "-r", str(path), "-w", "-", expression],
        capture_output=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    if ran.returncode:
        assert b"tcpdump: " in ran.stderr
        return None
    return {(one.timestamp_ns or 0) // 10**9 for one in captures.read(io.BytesIO(ran.stdout))}


def by_linkrx(file: Any, expression: str | None) -> set[int] | None:
    """The numbers of the packets that linkrx accepts, or None if it refuses the expression."""
    try:
        return {(one.timestamp_ns or 0) // 10**9 for one in captures.read(file, filter=expression)}
    except ValueError as error:
        if "libpcap says" not in str(error):
            raise
        return None


@needs_tcpdump
@pytest.mark.samples
@pytest.mark.parametrize("name", KINDS)
def test_tcpdump_agrees(name: str, tmp_path: Path) -> None:
    """For each of 35 expressions, with --all 57, linkrx and tcpdump accept the same packets of a file, or both refuse the expression."""
    chosen = random.Random(name)
    records, path = records_of(name, 7), tmp_path / "some.pcap"
    path.write_bytes(pcap_of(name, records))
    delivered = by_linkrx(path, None)  # without runts and packets without protocol
    assert delivered is not None
    assert len(delivered) > FRAMES / 3
    taken = refused = 0
    made = range(30 if thorough() else 8)
    for expression in (*SPECIAL, *(any_expression(chosen, link=chosen.random() < 0.5) for _ in made)):
        expected = by_tcpdump(path, expression)
        found = by_linkrx(path, expression)
        if expected is None and found is not None:
            assert expression == "ifindex 2", "linkrx knows interfaces of some files"
            continue
        assert found == (None if expected is None else expected & delivered), expression
        taken += len(found or ())
        refused += found is None
    assert taken > 200
    assert refused


@needs_tcpdump
@pytest.mark.parametrize("piece", [None, 700])
def test_a_file_of_every_link_type(tmp_path: Path, piece: int | None) -> None:
    """In a pcapng file with one interface per link type, linkrx accepts the packets that tcpdump accepts in one pcap file per type.

    The pieces in which the file is read do not matter.
    """
    names = [name for name in KINDS if KINDS[name][1] == "<"]
    records = {name: records_of(name, number) for number, name in enumerate(names)}
    for name in names:
        (tmp_path / name).write_bytes(pcap_of(name, records[name]))
    made = captures.section()
    for number, name in enumerate(names):
        made += Interface(KINDS[name][0], name=name, resolution=9).block()
        # Some packets come before the next interface.
        for index in range(0, FRAMES, 2):
            made += packet_block(number, index, records[name][index])
    for index in range(1, FRAMES, 2):
        for number, name in enumerate(names):
            made += packet_block(number, index, records[name][index])
    for expression in (
        "udp",
        "port 53",
        "ip[8] = 64",
        "not (udp or tcp)",
        "less 70",
        "ip6",
        "src net 10.0.0.0/8",
    ):
        file = io.BytesIO(made) if piece is None else Pieces(made, piece)
        with linkrx.open(linkrx.CaptureFile(file), filter=expression) as rx:
            found: dict[str | None, set[int]] = {name: set() for name in names}
            for packet in rx:
                found[rx.interface_name(packet.interface)].add((packet.timestamp_ns or 0) // 10**9)
        for name in names:
            expected, delivered = by_tcpdump(tmp_path / name, expression), by_linkrx(tmp_path / name, None)
            assert delivered is not None
            # tcpdump says "expression rejects all packets" for `ip6` on raw IPv4
            assert found[name] == (expected or set()) & delivered, (expression, name)


def packet_block(interface: int, number: int, record: bytes) -> bytes:
    """An enhanced packet block with the timestamp and true length of pcap_of()."""
    return captures.enhanced("<", interface, number * 10**9, record, len(record) + number % 3)


def test_as_in_the_manual(tmp_path: Path) -> None:
    """`ether host ... and vlan 5` accepts the frames with that tag from that host, in a file by path, in a pipe and in memory."""
    frames = [tagged(udp(53), tci) for tci in (5, 6, 5)] + [udp(53)]
    data = captures.pcap([Recorded(one, len(one), 0) for one in frames])
    path = tmp_path / "some.pcap"
    path.write_bytes(data)
    expression = "ether host 02:00:00:00:00:02 and vlan 5 and udp port 53"
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        for file in (path, io.BytesIO(data), cat.stdout):
            assert [one.data for one in captures.read(file, filter=expression)] == [frames[0], frames[2]]


@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_direction_and_interface(form: str) -> None:
    """If the file has direction and interface, `inbound`, `outbound` and `ifindex` use them, although tcpdump does not."""
    frames = [udp(port) for port in (1, 2, 3, 4)]
    if form == "pcap":
        records = [
            Recorded(one, len(one), 0, interface=1 + n // 2, outgoing=n % 2 == 1)
            for n, one in enumerate(frames)
        ]
        data = captures.pcap(records, magic=captures.KUZNETZOV)
    else:
        data = captures.section() + Interface().block() * 2
        for number, one in enumerate(frames):
            options = captures.option("<", 2, struct.pack("<I", 1 + number % 2))
            data += captures.enhanced("<", number // 2, 0, one, len(one), options)

    def taken(expression: str) -> list[int]:
        return [frames.index(one.data) for one in captures.read(io.BytesIO(data), filter=expression)]

    assert taken("inbound") == [0, 2]
    assert taken("outbound and udp") == [1, 3]
    assert taken("ifindex 2") == [2, 3]
    assert taken("not ifindex 2") == [0, 1]


def test_a_file_without_interfaces() -> None:
    """A packet of a pcap file has no interface, so `ifindex` rejects it for every index, and `not ifindex` accepts it."""
    data = captures.pcap([Recorded(udp(53), 60, 0)])
    assert len(captures.read(io.BytesIO(data), filter="not ifindex 2")) == 1
    assert captures.read(io.BytesIO(data), filter="ifindex 2") == []


def mixed() -> bytes:
    """A file with Ethernet, then raw IP, then Ethernet."""
    made = captures.section() + Interface(1, resolution=9).block() + Interface(101, resolution=9).block()
    for interface, port in ((0, 1), (0, 2), (1, 3), (0, 4)):
        record = udp(port)[14 * interface :]
        made += captures.enhanced("<", interface, port * 10**9, record, len(record))
    return made


def test_a_link_type_that_the_expression_does_not_suit() -> None:
    """If the filter cannot be compiled for the next packet's link type, an error follows the packets before it.

    The packet waits for another filter, and no packet passes unfiltered.
    """
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(mixed())), filter="ether host 02:00:00:00:00:02") as rx:
        got = []
        with pytest.raises(
            linkrx.UnsupportedOption, match=r"(?s)interface 2.*link type 101 \(.*set_filter"
        ) as caught:
            for packet in rx:
                got.append(packet.timestamp_ns)
        assert got == [10**9, 2 * 10**9]
        assert "libpcap says: ethernet addresses" in str(caught.value)
        with pytest.raises(linkrx.UnsupportedOption):
            rx.recv(0)
        with pytest.raises(ValueError, match="ethernet"):
            rx.set_filter("ether host 02:00:00:00:00:02")
        rx.set_filter("udp dst port 3 or udp dst port 4")
        assert [packet.timestamp_ns for packet in rx] == [3 * 10**9, 4 * 10**9]
        assert rx.end is linkrx.End.EOF


@pytest.mark.parametrize("filtered", [True, False])
def test_a_filter_that_comes_later(filtered: bool) -> None:
    """set_filter judges waiting packets by the program for their link type, or refuses and changes nothing."""
    options: dict[str, Any] = {"filter": "udp"} if filtered else {}
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(mixed())), **options) as rx:
        assert [rx.recv(0).timestamp_ns for _ in range(3)] == [10**9, 2 * 10**9, 3 * 10**9]
        with pytest.raises(ValueError, match="link type 101"):
            rx.set_filter("ether host 02:00:00:00:00:02")
        rx.set_filter("udp dst port 4 or ip6")
        rx.set_filter("udp dst port 5")
        assert list(rx) == []
        assert rx.stats().filtered == 1


@pytest.mark.parametrize("name", KINDS)
def test_waiting_packets_are_filtered_with_their_header(name: str) -> None:
    """A filter that is set while packets wait accepts the same of them as a filter given to open."""
    data = pcap_of(name, records_of(name, 3))
    for expression in ("udp", "less 80", "ip6 or arp", "link[3] & 1 = 0"):
        expected = by_linkrx(io.BytesIO(data), expression)
        assert expected is not None
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
            first = (rx.recv(0).timestamp_ns or 0) // 10**9
            rx.set_filter(expression)
            found = {(packet.timestamp_ns or 0) // 10**9 for packet in rx}
        assert found == expected - {first}


def test_instructions_read_the_record() -> None:
    """Instructions read the record in the file, as `tcpdump -y` compiles them: with the cooked header in front of the packet.

    The length that they return counts from there.
    """
    chosen = random.Random(1)
    record = sll(udp(53), chosen)
    data = captures.pcap([Recorded(record, len(record) + 9, 0)] * 2, link_type=113)
    program = [(0x28, 0, 0, 14), (0x15, 0, 1, 0x0800), (6, 0, 0, 16 + 20), (6, 0, 0, 0)]
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), filter=program) as rx:
        first, _ = packets = list(rx)
        assert [bytes(one) for one in packets] == [record[16:36]] * 2
        assert first.truncated
        assert first.wire_length == len(record) - 16 + 9
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), filter=[(6, 0, 0, 16)]) as rx:
        assert list(rx) == []
        assert rx.stats().filtered == 2


@pytest.mark.parametrize("name", ["cooked", "loop", "raw", "ethernet", "unknown"])
def test_ancillary_loads(name: str) -> None:
    """Ancillary loads give the protocol in the file, and no load reads outside a short record."""
    link_type = 147 if name == "unknown" else KINDS[name][0]
    chosen = random.Random(1)
    whole = udp(53) if name == "unknown" else KINDS[name][2](udp(53), chosen)
    for load in (0, 4, 8, 12, 28, 44, 48, 52, 60):
        program = [(0x20, 0, 0, 0xFFFFF000 + load), (0x16, 0, 0, 0)]
        records = [Recorded(whole[:size], size, 0) for size in range(len(whole) + 1)]
        data = captures.pcap(records, link_type=link_type)
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), filter=program) as rx:
            for packet in rx:
                assert len(packet) <= len(whole)
    ip = [(0x28, 0, 0, 0xFFFFF000), (0x15, 0, 1, 0x0800), ALL[0], (6, 0, 0, 0)]
    data = captures.pcap([Recorded(whole, len(whole), 0)], link_type=link_type)
    # Without a reported protocol, the first nibble is taken for the IP version. Here it is of the destination address.
    assert len(captures.read(io.BytesIO(data), filter=ip)) == (name != "unknown")


@pytest.mark.parametrize(
    "expression", ["udp port port", "ether host 1", "port nosuch", "ip and (tcp or", "host 1.2.3.4.5"]
)
@pytest.mark.parametrize("kind", ["path", "pipe"])
def test_wrong_expressions(tmp_path: Path, kind: str, expression: str) -> None:
    """`open` and `choose` raise an error for an invalid expression, before any packet is read."""
    path = tmp_path / "some"
    path.write_bytes(captures.pcap([]))
    source = path if kind == "path" else linkrx.CaptureFile(io.BytesIO(path.read_bytes()))
    for function in (linkrx.open, linkrx.choose):
        with pytest.raises(ValueError, match="libpcap says"):
            function(source, filter=expression)


def test_more_link_types_than_there_is_room_for() -> None:
    """A filter has room for the programs of 64 link types. A packet of one more raises an error."""
    made = captures.section()
    for number in range(70):
        made += Interface(1000 + number).block() + captures.enhanced("<", number, number, b"frame", 5)
    assert len(captures.read(io.BytesIO(made))) == 70
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(made)), filter=ALL) as rx:
        got = []
        with pytest.raises(linkrx.UnsupportedOption, match="of 64 link types at most"):
            for packet in rx:
                got.append(bytes(packet))
        assert got == [b"frame"] * 64
        rx.set_filter(None)
        assert len(list(rx)) == 6


def test_a_link_type_that_libpcap_does_not_know() -> None:
    """Instructions and the empty expression work for a link type that libpcap does not know; other expressions are refused."""
    data = captures.pcap([Recorded(b"frame", 5, 0)], link_type=0xFF00)
    assert len(captures.read(io.BytesIO(data), filter=ALL)) == 1
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), filter="udp") as rx,
        pytest.raises(linkrx.UnsupportedOption, match="65280"),
    ):
        rx.recv(0)


def test_asynchronously_and_from_another_thread() -> None:
    """Under asyncio the error propagates out of `async for`. While one thread receives, another can replace the filter.

    Every received packet was accepted by one of the filters.
    """

    async def take() -> list[int | None]:
        got = []
        source = linkrx.CaptureFile(io.BytesIO(mixed()))
        with (
            linkrx.open(source, filter="vlan or ether src 02:00:00:00:00:02") as rx,
            pytest.raises(linkrx.UnsupportedOption),
        ):
            async for packet in rx:
                got.append(packet.timestamp_ns)
        return got

    assert asyncio.run(take()) == [10**9, 2 * 10**9]
    made = captures.section()
    for number, link_type in enumerate((1, 101, 113, 9) * 10):
        name = next(name for name in KINDS if KINDS[name][0] == link_type)
        chosen = random.Random(number)
        made += Interface(link_type).block()
        for port in (53, 54) * 50:
            record = KINDS[name][2](udp(port), chosen)
            made += captures.enhanced("<", number, port, record, len(record))
    seen: list[int] = []
    with linkrx.open(
        linkrx.CaptureFile(Pieces(made, 4000)), lambda *call: seen.append(call[3][0]), filter="udp"
    ) as rx:
        stop = threading.Event()

        def exchange() -> None:
            while not stop.is_set():
                rx.set_filter("udp dst port 53")
                rx.set_filter("udp dst port 54")

        with running(exchange):
            try:
                rx.run()
            finally:
                stop.set()
        assert rx.end is linkrx.End.EOF
        stats = rx.stats()
        assert stats.packets == len(seen)
        assert stats.packets + (stats.filtered or 0) == 4000
