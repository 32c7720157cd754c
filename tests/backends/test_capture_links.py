"""Link types of capture files: the link header of a packet gives its protocol, sender, interface and direction."""

from __future__ import annotations

import io
import pickle
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest
from support import captures
from support.captures import Interface, Recorded, frame

import linkrx
from linkrx import _core
from linkrx.capture import plain

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)

IPV4, IPV6 = b"\x45" + bytes(27), b"\x60" + bytes(47)
SENDER = bytes.fromhex("020000000009")


def sll(kind: int, hardware: int, address: bytes, protocol: int) -> bytes:
    """LINKTYPE_LINUX_SLL."""
    return struct.pack("!HHH8sH", kind, hardware, len(address), address, protocol)


def sll2(kind: int, hardware: int, address: bytes, protocol: int, interface: int) -> bytes:
    """LINKTYPE_LINUX_SLL2."""
    return struct.pack("!HHIHBB8s", protocol, 0, interface, hardware, kind, len(address), address)


def metadata(packet: linkrx.Packet) -> tuple[Any, ...]:
    """The metadata of a packet."""
    return (
        bytes(packet),
        packet.protocol,
        packet.link_type,
        packet.remote,
        packet.local,
        packet.interface,
        packet.outgoing,
    )


# Link type, record, and the packet's metadata.
CASES = {
    "ethernet": (1, frame(60), (frame(60), 0x88B5, 1, captures.REMOTE, captures.LOCAL, 0, False)),
    "raw4": (101, IPV4, (IPV4, 0x0800, 0xFFFE, None, None, 0, False)),
    "raw6": (101, IPV6, (IPV6, 0x86DD, 0xFFFE, None, None, 0, False)),
    "raw12": (12, IPV4, (IPV4, 0x0800, 0xFFFE, None, None, 0, False)),
    "ipv4": (228, IPV4, (IPV4, 0x0800, 0xFFFE, None, None, 0, False)),
    "ipv6": (229, IPV6, (IPV6, 0x86DD, 0xFFFE, None, None, 0, False)),
    "null": (0, struct.pack("<I", 2) + IPV4, (IPV4, 0x0800, 0xFFFE, None, None, 0, False)),
    "null, another host's": (0, struct.pack(">I", 30) + IPV6, (IPV6, 0x86DD, 0xFFFE, None, None, 0, False)),
    "loop": (108, struct.pack(">I", 24) + IPV6, (IPV6, 0x86DD, 0xFFFE, None, None, 0, False)),
    "sll": (113, sll(0, 1, SENDER, 0x0800) + IPV4, (IPV4, 0x0800, 1, SENDER, None, 0, False)),
    "sll out": (113, sll(4, 772, b"", 0x86DD) + IPV6, (IPV6, 0x86DD, 772, None, None, 0, True)),
    "sll, any protocol": (
        113,
        sll(0, 1, SENDER, 0x0806) + b"arp!",
        (b"arp!", 0x0806, 1, SENDER, None, 0, False),
    ),
    "sll2": (276, sll2(0, 1, SENDER, 0x0800, 7) + IPV4, (IPV4, 0x0800, 1, SENDER, None, 7, False)),
    "sll2 out": (276, sll2(4, 65534, b"", 0x86DD, 9) + IPV6, (IPV6, 0x86DD, 65534, None, None, 9, True)),
    "802.11": (105, b"\x80\x00" + bytes(30), (b"\x80\x00" + bytes(30), 0, 801, None, None, 0, False)),
    "802.11 radiotap": (
        127,
        b"\0\0\x08\0" + bytes(9),
        (b"\0\0\x08\0" + bytes(9), 0, 803, None, None, 0, False),
    ),
    "802.15.4": (195, b"\x41\x88" + bytes(9), (b"\x41\x88" + bytes(9), 0, 804, None, None, 0, False)),
    "PPP": (9, b"\xff\x03\x00\x21" + IPV4, (b"\xff\x03\x00\x21" + IPV4, 0, 512, None, None, 0, False)),
    "CAN": (227, bytes(16), (bytes(16), 0, 280, None, None, 0, False)),
    "netlink": (253, bytes(20), (bytes(20), 0, 824, None, None, 0, False)),
    "sll netlink": (113, sll(0, 824, b"", 0) + bytes(20), (bytes(20), 0, 824, None, None, 0, False)),
    "unknown": (147, b"whatever", (b"whatever", 0, 0xFFFF, None, None, 0, False)),
    "the last": (0xFFFF, b"whatever", (b"whatever", 0, 0xFFFF, None, None, 0, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_link_types(name: str) -> None:
    """The link header of each type is parsed and is not part of the packet. Packets of unknown types are delivered with protocol 0."""
    link_type, record, expected = CASES[name]
    for order in "<>":
        data = captures.pcap([Recorded(record, len(record) + 3, 5000)] * 2, link_type=link_type, order=order)
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
            packets = list(rx)
        assert [metadata(packet) for packet in packets] == [expected] * 2
        assert packets[0].wire_length == len(packets[0]) + 3
        assert packets[0].truncated
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
            (batch,) = [batch.copy() for batch in rx.batches()]
        assert [metadata(packet) for packet in batch] == [expected] * 2
        assert list(batch.link_types) == [expected[2]] * 2


def test_all_in_one_file() -> None:
    """A pcapng file has a link type for each interface, and each packet is parsed by its own."""
    made, expected = captures.section(), []
    for number, (link_type, record, known) in enumerate(CASES.values()):
        made += Interface(link_type).block() + captures.enhanced("<", number, 5, record, len(record))
        expected.append((*known[:5], number + 1, known[6]))
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(made))) as rx:
        assert [metadata(packet) for packet in rx] == expected


def test_delivered_addresses() -> None:
    """`deliver` gets the sender in a cooked header, and no destination."""
    calls: list[tuple[Any, ...]] = []
    link_type, record, _ = CASES["sll"]
    data = captures.pcap([Recorded(record, len(record), 5000)], link_type=link_type)
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), lambda *call: calls.append(call[:3])) as rx:
        rx.run()
    assert calls == [(SENDER, None, 0x0800)]


@pytest.mark.parametrize(("link_type", "size"), [(0, 4), (108, 4), (113, 16), (276, 20)])
def test_headers_that_are_cut(link_type: int, size: int) -> None:
    """A record that ends within its header counts as malformed, one that ends with it as empty. Other packets are delivered."""
    good = bytes(2) + b"\x00\x01" + bytes(10) + b"\x08\x00" if link_type == 113 else struct.pack("!I", 2)
    good = sll2(0, 1, SENDER, 0x0800, 7) if link_type == 276 else good
    records = [good + IPV4, *(good[:short] for short in range(1, size)), good[:size], good + IPV4]
    data = captures.pcap([Recorded(one, len(one), 5000) for one in records], link_type=link_type)
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
        assert [bytes(packet) for packet in rx] == [IPV4, IPV4]
        assert rx.stats().malformed == size - 1
        assert rx.stats().empty == 1


@pytest.mark.parametrize("form", ["pcapng", "pcap"])
@pytest.mark.parametrize("name", CASES)
def test_recorded_again(tmp_path: Path, name: str, form: Any) -> None:
    """A packet that is recorded again is read as the same packet. Packets that linkrx does not parse keep their link type."""
    link_type, record, expected = CASES[name]
    path = tmp_path / "out"
    data = captures.pcap([Recorded(record, len(record) + 3, 5000)] * 2, link_type=link_type)
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx, linkrx.PcapWriter(path, format=form) as out:
        batch = next(iter(rx.batches())).copy()
        out.write(batch)
        out.write(pickle.loads(pickle.dumps(batch[1])))
    assert link_types_of(path) == [RECORDED_AS.get(link_type, link_type)]
    with linkrx.open(path) as rx:
        packets = list(rx)
    assert [(*metadata(one)[:5], metadata(one)[6]) for one in packets] == [(*expected[:5], expected[6])] * 3
    assert {one.wire_length - len(one) for one in packets} == {3}


# The link header is not part of the packet. For these types, recording writes an equivalent header or none.
RECORDED_AS = {0: 101, 12: 101, 108: 101, 113: 276, 228: 101, 229: 101}


def link_types_of(path: Path) -> list[int]:
    """The link types in a file."""
    data = path.read_bytes()
    if int.from_bytes(data[:4], "little") == captures.NANOSECONDS:
        return [int.from_bytes(data[20:24], "little")]
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        if kind == 1:
            found.append(int(struct.unpack_from("<H", data, at + 8)[0]))
        at += length
    return found


@pytest.mark.parametrize("hardware", [280, 0xFFFF])
def test_a_device_without_a_link_type(tmp_path: Path, hardware: int) -> None:
    """Recording a frame of a device whose hardware type has no link type raises an error that names it."""
    packet = linkrx.packets.restore_packet(1, b"whatever", 0, 8, 1, 0, 0, 0, 0, hardware, b"", 0, 0, b"", 0)
    with linkrx.PcapWriter(tmp_path / "out") as out:
        with pytest.raises(ValueError, match=f"hardware type {hardware}"):
            out.write(packet)
        assert out.packets == 0


@pytest.mark.parametrize("form", ["pcapng", "pcap"])
def test_a_link_type_of_too_many_bits(form: str) -> None:
    """A link type with more than 16 bits raises an error that shows it. pcapng has no room for it."""
    data = captures.pcap([Recorded(b"whatever", 8, 5000)], link_type=0x10001)
    if form == "pcapng":
        data = captures.section() + Interface(0xFFFF).block()
        assert captures.read(io.BytesIO(data)) == []
        return
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx,
        pytest.raises(linkrx.DamagedCapture, match="link type 65537 does not fit into 16 bits"),
    ):
        list(rx)


def test_all_metadata_of_a_packet(tmp_path: Path) -> None:
    """Packets of a file with every link type keep all metadata when they are recorded again.

    These are bytes, protocol, addresses, device, direction, time in nanoseconds and true length, and each interface's name and
    link type.
    """
    made, types = captures.section(), []
    for number, (link_type, *_) in enumerate(CASES.values()):
        made += Interface(link_type, name=f"if{number}", resolution=9).block()
        types.append(RECORDED_AS.get(link_type, link_type))
    for round_ in range(3):
        for number, (_, record, known) in enumerate(CASES.values()):
            flags = struct.pack("<I", 2 if known[6] or round_ == 1 else 1)
            options = captures.option("<", 2, flags) + captures.option("<", 0, b"")
            time = 10**18 + 1000 * round_ + number
            made += captures.enhanced("<", number, time, record, len(record) + 3 * round_, options)

    def tells(source: Any) -> list[tuple[Any, ...]]:
        with linkrx.open(source) as rx:
            return [
                (
                    *metadata(one)[:5],
                    rx.interface_name(one.interface),
                    one.outgoing,
                    one.timestamp_ns,
                    one.wire_length,
                    one.truncated,
                    one.vlan,
                    one.vnet,
                )
                for one in rx
            ]

    for name in ("batch", "packet"):
        with (
            linkrx.open(linkrx.CaptureFile(io.BytesIO(made))) as rx,
            linkrx.PcapWriter(tmp_path / name, source=rx) as out,
        ):
            if name == "batch":
                for batch in rx.batches():
                    out.write(batch)
            else:
                for packet in rx:
                    out.write(packet)
        before, again = tells(linkrx.CaptureFile(io.BytesIO(made))), tells(tmp_path / name)
        assert again == before
        assert len(again) == 3 * len(CASES)
        assert link_types_of(tmp_path / name) == types


def test_two_link_types_in_pcap(tmp_path: Path) -> None:
    """A pcap file has one link type. A packet of another raises an error that names pcapng, and the written packets stay."""
    made = captures.section() + Interface(1).block() + Interface(101).block()
    made += captures.enhanced("<", 0, 5, frame(60), 60) + captures.enhanced("<", 1, 5, IPV4, len(IPV4))
    path = tmp_path / "out"
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(made))) as rx,
        linkrx.PcapWriter(path, format="pcap") as out,
    ):
        with pytest.raises(
            ValueError, match=r"link type 101 cannot go into a pcap file of link type 1: .*pcapng"
        ):
            for batch in rx.batches():
                out.write(batch)
        assert out.packets == 1
    with linkrx.open(path) as rx:
        assert [bytes(packet) for packet in rx] == [frame(60)]


def test_the_plain_twin() -> None:
    """Without the core the records of each link type are the same, byte for byte."""
    for name, (link_type, record, _) in CASES.items():
        data = captures.pcap([Recorded(record, len(record) + 3, 5000)], link_type=link_type)
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
            packet = next(iter(rx)).copy()
        keys = array("Q")
        for pcapng in (True, False):
            fast, slow = bytearray(200), bytearray(200)
            missing = _core.types.record(packet, 0, keys, fast, 0, pcapng, 5)
            assert plain.record(packet, 0, keys, slow, 0, pcapng, 5) == missing, name
            keys.append(missing[2])
            assert _core.types.record(packet, 0, keys, fast, 0, pcapng, 5) == plain.record(
                packet, 0, keys, slow, 0, pcapng, 5
            )
            assert fast == slow, name
            keys.pop()
