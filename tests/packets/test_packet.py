"""A packet, in C and in plain Python: a read-only buffer of its frame, and its metadata."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import multiprocessing
import pickle
import socket
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.received import (
    BARE,
    ETHERNET,
    LOCAL,
    REMOTE,
    C,
    Kind,
    Ring,
    Row,
    Source,
    batch_of,
    every_kind,
    fields,
    frame,
    loaded_in,
    needs_core,
    numbered,
    one,
    vnet_bytes,
)

from linkrx import Flags, Gso, Vlan, VnetHeader, packets
from linkrx.memory.framing import Framing
from linkrx.packets import plain
from linkrx.packets.headers import mac

PAYLOAD = bytes(range(200))
FRAME = frame(PAYLOAD)


# The packet as a buffer.


@every_kind
def test_it_is_a_sequence_of_bytes(kind: Kind) -> None:
    """len, indexing from both ends, iteration and `in` work as for the frame's bytes."""
    packet = one(kind, Row(FRAME))
    assert len(packet) == len(FRAME)
    assert [packet[index] for index in range(-len(FRAME), len(FRAME))] == [*FRAME, *FRAME]
    assert type(packet[0]) is int
    assert list(packet) == list(FRAME)
    assert isinstance(packet, Iterable)
    assert 0x88 in packet
    assert LOCAL in packet
    assert b"nowhere" not in packet
    assert packet[np.uint16(12)] == 0x88
    assert packet[True] == FRAME[1]


@every_kind
@pytest.mark.parametrize(
    "index", [len(FRAME), -len(FRAME) - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**70, -(2**70)]
)
def test_index_out_of_range(kind: Kind, index: int) -> None:
    """An index beyond either end raises IndexError, however far."""
    packet = one(kind, Row(FRAME))
    with pytest.raises(IndexError):
        packet[index]
    with pytest.raises(IndexError):
        packet.u16(index)
    with pytest.raises(IndexError):
        packet.u32(index)


@every_kind
@pytest.mark.parametrize("wrong", ["12", None, 1.0, (1, 2), b"\0"])
def test_index_of_another_type(kind: Kind, wrong: Any) -> None:
    """An index that is not an integer raises TypeError."""
    packet = one(kind, Row(FRAME))
    for use in (lambda: packet[wrong], lambda: packet.u16(wrong), lambda: packet.u32(wrong)):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(TypeError):
        packet[: wrong or "x"]


bounds = st.one_of(st.none(), st.integers(-300, 300), st.sampled_from([2**63 - 1, -(2**63), 2**64, -(2**64)]))


@every_kind
@given(first=bounds, last=bounds, step=bounds)
@example(first=None, last=None, step=-1)
@example(first=12, last=14, step=None)
@example(first=5, last=-(2**64), step=-(2**63))
def test_slice(kind: Kind, first: int | None, last: int | None, step: int | None) -> None:
    """A slice with any bounds and step returns the same bytes as a slice of the frame. A step of zero raises ValueError."""
    packet = one(kind, Row(FRAME))
    if step == 0:
        with pytest.raises(ValueError, match="zero"):
            packet[first:last:step]
        return
    part = packet[first:last:step]
    assert type(part) is bytes
    assert part == FRAME[first:last:step]


@every_kind
@given(st.binary(min_size=1, max_size=80), st.integers(-90, 90))
def test_numbers(kind: Kind, data: bytes, offset: int) -> None:
    """u16 and u32 read big-endian numbers at an offset, which counts from the end if negative. Outside the frame they raise IndexError."""
    packet = one(kind, Row(data), BARE)
    for size, read in ((2, packet.u16), (4, packet.u32)):
        at = offset + len(data) if offset < 0 else offset
        if 0 <= at <= len(data) - size:
            assert read(offset) == int.from_bytes(data[at : at + size], "big")
        else:
            with pytest.raises(IndexError, match=f"{size} bytes at {offset} of a frame of {len(data)} bytes"):
                read(offset)


@every_kind
def test_bytes(kind: Kind) -> None:
    """bytes() and tobytes() are the frame, as exact bytes objects."""
    packet = one(kind, Row(FRAME))
    for made in (bytes(packet), packet.tobytes(), packet[:]):
        assert type(made) is bytes
        assert made == FRAME
    assert bytearray(packet) == bytearray(FRAME)
    assert b"-".join([packet, packet]) == FRAME + b"-" + FRAME


@every_kind
def test_the_method_that_bytes_calls(kind: Kind) -> None:
    """`__bytes__` can be kept, called again, held beside others, and outlive the packet's name; it takes no arguments."""
    first, second = one(kind, Row(FRAME)), one(kind, Row(FRAME[::-1]))
    before = sys.getrefcount(first)
    methods = [packet.__bytes__ for packet in (first, second, first)]
    assert [method() for method in methods * 2] == [FRAME, FRAME[::-1], FRAME] * 2
    assert bytes(second) == FRAME[::-1]  # while others are held
    for arguments, names in (((1,), {}), ((), {"of": 1}), ((1,), {"of": 1})):
        with pytest.raises(TypeError):
            methods[0](*arguments, **names)
    assert sys.getrefcount(first) == before + 2
    del methods[:]
    assert sys.getrefcount(first) == before
    del second
    assert one(kind, Row(FRAME)).__bytes__() == FRAME


@every_kind
def test_functions_that_take_a_buffer_take_a_packet(kind: Kind) -> None:
    """struct, int.from_bytes, hashlib, NumPy, files and sockets read the frame from a packet."""
    packet = one(kind, Row(FRAME))
    assert struct.unpack_from("!H", packet, 12) == (0x88B5,)
    assert struct.Struct(f"{len(FRAME)}s").unpack(packet) == (FRAME,)
    assert int.from_bytes(packet, "big") == int.from_bytes(FRAME, "big")
    assert hashlib.sha256(packet).digest() == hashlib.sha256(FRAME).digest()
    array_of = np.frombuffer(packet, np.uint8)  # type: ignore[call-overload]
    assert array_of.tobytes() == FRAME
    assert not array_of.flags.writeable
    file = io.BytesIO()
    assert file.write(packet) == len(FRAME)
    assert file.getvalue() == FRAME
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        assert left.send(packet) == len(FRAME)
        assert right.recv(1000) == FRAME
        assert left.sendmsg([packet, packet]) == 2 * len(FRAME)
        assert right.recv(1000) == FRAME + FRAME


@every_kind
def test_views(kind: Kind) -> None:
    """frame, link_header, data and memoryview(packet) are read-only, contiguous views of bytes."""
    packet = one(kind, Row(FRAME))
    for view, shown in (
        (packet.frame, FRAME),
        (packet.link_header, FRAME[:14]),
        (packet.data, PAYLOAD),
        (memoryview(packet), FRAME),
    ):
        assert type(view) is memoryview
        assert view == shown
        assert (view.format, view.ndim, view.itemsize, view.readonly) == ("B", 1, 1, True)
        assert view.c_contiguous
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
    assert packet.data[9] == PAYLOAD[9]


@every_kind
def test_views_outlive_the_packet(kind: Kind) -> None:
    """A view of a packet does not change after the packet is gone and its memory is used again."""
    source = Source(kind)
    source.fill([Row(numbered(1)), Row(numbered(2)), Row(numbered(3))])
    views = []
    for _ in range(3):
        packet = source.receiver.take_packet()
        assert packet is not None
        views += [packet.data, packet.frame, memoryview(packet), packet.link_header]
    del packet
    for number in range(10, 14):
        source.packet_of(number)
    gc.collect()
    for index, view in enumerate(views):
        sent = numbered(index // 4 + 1)
        assert view == [sent[14:], sent, sent, sent[:14]][index % 4]


@every_kind
def test_released_views(kind: Kind) -> None:
    """A released view raises ValueError, and the packet and its other views stay valid."""
    packet = one(kind, Row(FRAME))
    views = [packet.frame, packet.frame, packet.data]
    slices = [view[3:9] for view in views]
    for view in reversed(views):
        view.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
    assert slices == [FRAME[3:9], FRAME[3:9], PAYLOAD[3:9]]
    assert packet != views[0]
    assert packet == FRAME
    with memoryview(packet) as view:
        assert view == FRAME
    assert packet.frame == FRAME


@every_kind
def test_a_writable_buffer_is_refused(kind: Kind) -> None:
    """A request for a writable buffer of a packet raises the same exception as for bytes."""
    packet = one(kind, Row(FRAME))
    with pytest.raises((BufferError, TypeError)):
        io.BytesIO(b"x" * 300).readinto(packet)
    with pytest.raises((BufferError, TypeError)):
        struct.pack_into("B", packet, 0, 1)
    with pytest.raises(TypeError):
        packet[0] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        del packet[0]  # type: ignore[attr-defined]
    assert packet == FRAME


# Comparison.


EQUAL: dict[str, Any] = {
    "bytes": FRAME,
    "bytearray": bytearray(FRAME),
    "memoryview": memoryview(FRAME),
    "a view of another format": memoryview(FRAME).cast("H"),
    "every other byte": memoryview(bytes(byte for byte in FRAME for _ in range(2)))[::2],
    "array": array("B", FRAME),
    "numpy": np.frombuffer(FRAME, np.uint8),
}
OTHERS: dict[str, Any] = {
    "longer": FRAME + b"\0",
    "shorter": FRAME[:-1],
    "other bytes": FRAME[:-1] + b"\0",
    "a longer array": array("B", FRAME + b"\0"),
    "nothing": b"",
    "a string": FRAME.decode("latin-1"),
    "a list": list(FRAME),
    "None": None,
    "a number": 5,
}


@every_kind
@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_any_buffer_of_the_same_bytes(kind: Kind, name: str) -> None:
    """== and != compare the frame with the bytes of any buffer."""
    packet = one(kind, Row(FRAME))
    assert bool(packet == EQUAL[name]) is True
    assert bool(packet != EQUAL[name]) is False
    if name not in ("numpy", "a view of another format"):  # these compare element by element
        assert EQUAL[name] == packet
        assert (EQUAL[name] != packet) is False


@every_kind
@pytest.mark.parametrize("name", OTHERS)
def test_unequal_to_anything_else(kind: Kind, name: str) -> None:
    """A packet is unequal to a buffer with another length or other bytes, and to an object that is no buffer."""
    packet = one(kind, Row(FRAME))
    assert bool(packet == OTHERS[name]) is False
    assert bool(packet != OTHERS[name]) is True


@every_kind
def test_packets_compare_by_their_frames(kind: Kind) -> None:
    """Packets with the same bytes are equal, also with different metadata. They and their bytes are the same key of a dictionary."""
    batch = batch_of(kind, [Row(FRAME), Row(FRAME, flags=2, timestamp=9), Row(frame(b"other"))])
    first, second, third = batch
    assert first == second == batch[0].copy()
    assert first != third
    assert hash(first) == hash(second) == hash(FRAME)
    assert {first: 1}[second] == 1
    assert {FRAME: 1}[first] == 1  # type: ignore[index]
    assert len({first, second, third, FRAME}) == 2
    assert [first, third].index(FRAME) == 0  # type: ignore[arg-type]


@every_kind
def test_packets_cannot_be_ordered(kind: Kind) -> None:
    """Ordering packets raises TypeError."""
    batch = batch_of(kind, [Row(FRAME), Row(FRAME)])
    for use in (
        lambda: batch[0] < batch[1],  # type: ignore[operator]
        lambda: batch[0] >= FRAME,  # type: ignore[operator]
        lambda: sorted(batch),  # type: ignore[type-var]
    ):
        with pytest.raises(TypeError, match="not supported"):
            use()


@every_kind
def test_equal_to_a_buffer_that_is_released(kind: Kind) -> None:
    """A packet is unequal to a released memoryview."""
    packet = one(kind, Row(FRAME))
    released = memoryview(FRAME)
    released.release()
    assert packet != released
    assert (packet == released) is False


@every_kind
@pytest.mark.since(3, 12)  # PEP 688: buffers that are written in Python
@pytest.mark.parametrize("error", [BufferError, ValueError, TypeError, KeyboardInterrupt, MemoryError])
def test_compared_with_a_buffer_that_raises(kind: Kind, error: type[BaseException]) -> None:
    """A packet is unequal to an object that gives no buffer. Another exception, such as of Ctrl-C, propagates."""

    class Raises:
        def __buffer__(self, _flags: int) -> memoryview:
            raise error

    packet = one(kind, Row(FRAME))
    if error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            _ = packet == Raises()
    else:
        assert packet != Raises()


# The fields.


@every_kind
def test_ethernet_fields(kind: Kind) -> None:
    """The link header is the first 14 bytes. Its source is `remote`, its destination `local`."""
    packet = one(kind, Row(frame(b"abc"), interface=7))
    assert packet.frame == frame(b"abc")
    assert packet.link_header == frame(b"")
    assert bytes(packet.data) == b"abc"
    assert (packet.remote, packet.local, packet.protocol) == (REMOTE, LOCAL, 0x88B5)
    assert packet.interface == 7


@every_kind
def test_fields_without_ethernet(kind: Kind) -> None:
    """Without a link header the data is the frame, and there are no addresses."""
    packet = one(kind, Row(b"\x45rest", protocol=0x0800), BARE)
    assert bytes(packet.frame) == bytes(packet.data) == b"\x45rest"
    assert len(packet.link_header) == 0
    assert (packet.remote, packet.local, packet.protocol) == (None, None, 0x0800)


@every_kind
def test_frame_without_data(kind: Kind) -> None:
    """A frame of 14 bytes has a link header and no data, and is true."""
    packet = one(kind, Row(frame(b"")))
    assert (len(packet.data), len(packet)) == (0, 14)
    assert packet


@every_kind
def test_plain_packet(kind: Kind) -> None:
    """A packet without flags is not truncated or outgoing, has a finished checksum, and has no tag or timestamp."""
    packet = one(kind, Row(frame(), timestamp=5, vlan_tci=6, vlan_tpid=7))
    assert (packet.truncated, packet.outgoing, packet.checksum_unfinished) == (False, False, False)
    assert (packet.timestamp_ns, packet.vlan, packet.vnet) == (None, None, None)
    assert packet.wire_length == len(packet)
    assert packet.tagged() == frame()


@every_kind
@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (Flags.TRUNCATED, "truncated"),
        (Flags.OUTGOING, "outgoing"),
        (Flags.CHECKSUM_UNFINISHED, "checksum_unfinished"),
    ],
)
def test_flag(kind: Kind, flag: Flags, name: str) -> None:
    """Each flag, and no other, makes its property True."""
    assert getattr(one(kind, Row(frame(), flags=flag)), name) is True
    assert getattr(one(kind, Row(frame(), flags=0xFFFF & ~flag)), name) is False


@every_kind
@pytest.mark.parametrize(
    ("tci", "number", "priority", "dei"),
    [
        (0, 0, 0, False),
        (5, 5, 0, False),
        (0x2005, 5, 1, False),
        (0x1FFF, 0xFFF, 0, True),
        (0xFFFF, 0xFFF, 7, True),
    ],
)
def test_vlan(kind: Kind, tci: int, number: int, priority: int, dei: bool) -> None:
    """The flag says whether there was a tag, also of value 0. tagged() has the tag behind the addresses."""
    packet = one(kind, Row(frame(b"abc"), flags=Flags.VLAN, vlan_tci=tci, vlan_tpid=0x88A8))
    assert packet.vlan == Vlan(tpid=0x88A8, tci=tci) == (0x88A8, tci)
    assert (packet.vlan.id, packet.vlan.priority, packet.vlan.dei) == (number, priority, dei)
    assert packet.tagged() == LOCAL + REMOTE + struct.pack("!HH", 0x88A8, tci) + b"\x88\xb5abc"
    assert type(packet.tagged()) is bytes
    assert packet == frame(b"abc")


@every_kind
@pytest.mark.parametrize("when", [0, 1, 1_700_000_000_123_456_789, -1, 2**63 - 1, -(2**63)])
def test_timestamp(kind: Kind, when: int) -> None:
    """The flag says whether there is a timestamp, also of value 0."""
    assert one(kind, Row(frame(), flags=Flags.TIMESTAMP, timestamp=when)).timestamp_ns == when


@every_kind
def test_wire_length_and_interface(kind: Kind) -> None:
    """wire_length is independent of the packet's length. wire_length and interface have 32 bits."""
    packet = one(kind, Row(frame(), wire_length=2**32 - 1, interface=2**32 - 1, flags=Flags.TRUNCATED))
    assert (packet.wire_length, packet.truncated, len(packet)) == (2**32 - 1, True, len(frame()))
    assert packet.interface == 2**32 - 1


@every_kind
@pytest.mark.parametrize("size", [10, 12, 24])
@pytest.mark.parametrize("packet_info", [False, True])
@pytest.mark.parametrize("little", [False, True])
def test_vnet_header(kind: Kind, size: int, packet_info: bool, little: bool) -> None:
    """The ten bytes of the virtio-net header are read in its byte order, with any bytes in front and behind."""
    header = VnetHeader(1, 0x81, 54, 1448, 34, 16)
    raw = struct.pack("<BBHHHH" if little else ">BBHHHH", *header)
    prefix = (b"\xaa" * 4 if packet_info else b"") + raw + b"\xbb" * (size - 10)
    packet = one(kind, Row(frame(), prefix), Framing(True, size, packet_info, little))
    assert packet.vnet == header
    assert packet == frame()
    assert packet.copy().vnet == header


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
    """A packet with a segmentation type other than none is a super-packet. The ECN bit alone is no type."""
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
    """The type of a super-packet is a member of Gso, without the ECN bit. An unknown type is a number."""
    header = VnetHeader(0, gso_type, 0, 0, 0, 0)
    assert (header.gso, header.ecn) == (gso, ecn)


@pytest.mark.parametrize(("flags", "valid"), [(0, False), (1, False), (2, True), (3, True)])
def test_vnet_checksum_valid(flags: int, valid: bool) -> None:
    """Bit 1 of the flags says that the checksum was verified."""
    assert VnetHeader(flags, 0, 0, 0, 0, 0).checksum_valid is valid


@every_kind
@pytest.mark.parametrize(
    ("header", "header_bytes"),
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
def test_header_length_of_a_super_packet(kind: Kind, header: VnetHeader, header_bytes: int) -> None:
    """hdr_len of a super-packet is computed from the transport header at csum_start. Without a checksum it is the kernel's value."""
    tcp = bytes(12) + b"\x80" + bytes(19)
    packet = one(kind, Row((bytes(34) + tcp).ljust(100), vnet_bytes(*header)), Framing(True, 10))
    assert packet.vnet == header._replace(hdr_len=header_bytes)


@every_kind
def test_packet_repr(kind: Kind) -> None:
    """A packet is printed as its protocol, its addresses if there are any, its length, and whether it was cut."""
    assert (
        repr(one(kind, Row(frame(b"abc"))))
        == "<Packet 0x88b5 02:00:00:00:00:02 > 02:00:00:00:00:01 17 bytes>"
    )
    cut = one(kind, Row(b"\x45", protocol=0x0800, flags=Flags.TRUNCATED), BARE)
    assert repr(cut) == str(cut) == f"{cut}" == "<Packet 0x0800 1 bytes truncated>"


def test_mac() -> None:
    """mac() writes an address with colons, and None as a dash."""
    assert mac(LOCAL) == "02:00:00:00:00:01"
    assert mac(None) == "-"


# Forbidden operations.


@every_kind
def test_nothing_of_a_packet_can_be_set(kind: Kind) -> None:
    """Setting or deleting an attribute of a packet raises AttributeError, and setting one of its type in C TypeError."""
    packet: Any = one(kind, Row(frame()))
    before = fields(packet)
    for name in (*before, "copy", "tobytes", "anything", "_flags", "_timestamp"):
        with pytest.raises(AttributeError):
            setattr(packet, name, b"")
        with pytest.raises(AttributeError):
            delattr(packet, name)
    assert fields(packet) == before
    if kind is C:
        with pytest.raises(TypeError, match="immutable"):
            type(packet).copy = None


@every_kind
def test_packets_are_not_made_by_users(kind: Kind) -> None:
    """Making a packet by the constructor, by a subclass, or by other means raises TypeError."""
    packet_type: Any = kind.module.Packet
    for use in (packet_type, lambda: packet_type(b"frame"), lambda: packet_type.__new__(packet_type)):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(TypeError):
        object.__new__(packet_type)
    with pytest.raises((TypeError, AttributeError)):
        one(kind, Row(frame())).__class__ = object  # type: ignore[assignment]
    with pytest.raises(TypeError, match="not an acceptable base"):
        type("Mine", (packet_type,), {})


# Copies, and pickles.

FULL = Row(
    frame(b"abc"),
    vnet_bytes(1, 1, 54, 1448, 34, 16),
    wire_length=9000,
    protocol=0x88B5,
    flags=int(Flags.TRUNCATED | Flags.OUTGOING | Flags.VLAN | Flags.TIMESTAMP | Flags.CHECKSUM_UNFINISHED),
    timestamp=-(2**63),
    interface=2**32 - 1,
    vlan_tci=0xFFFF,
    vlan_tpid=0x88A8,
)
ROWS: dict[str, tuple[Row, Framing]] = {
    "with all there is": (FULL, Framing(True, 10)),
    "with big-endian headers": (FULL, Framing(True, 10, vnet_little_endian=False)),
    "Ethernet": (Row(frame()), ETHERNET),
    "IP": (Row(b"\x45rest", protocol=0x0800), BARE),
}
every_row = pytest.mark.parametrize("name", ROWS)


@every_kind
@every_row
def test_copies(kind: Kind, name: str) -> None:
    """copy(), copy.copy and copy.deepcopy return equal packets, which do not change when the packet's memory is used again."""
    source = Source(kind, ROWS[name][1])
    source.fill([ROWS[name][0]])
    packet = source.receiver.take_packet()
    assert packet is not None
    wanted = fields(packet)
    made = [packet.copy(), copy.copy(packet), copy.deepcopy(packet), copy.deepcopy({"a": [packet]})["a"][0]]
    del packet
    source.fill([Row(bytes(20), bytes(source.framing.prefix))])
    source.receiver.drop()
    assert [fields(copied) for copied in made] == [wanted] * 4
    assert [type(copied) for copied in made] == [kind.module.Packet] * 4


@every_kind
@every_row
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(kind: Kind, name: str, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of any protocol restores all attributes of a packet, in both implementations."""
    packet = one(kind, *ROWS[name])
    pickled = pickle.dumps(packet, protocol)
    wanted = fields(packet)
    for other in (kind, C if C.module else kind, kind.__class__("plain", plain)):
        with monkeypatch.context() as patch:
            loaded_in(other, patch)
            loaded = pickle.loads(pickled)
        assert type(loaded) is other.module.Packet
        assert fields(loaded) == wanted
        assert pickle.dumps(loaded, protocol) == pickled


def state_of(packet: Any) -> tuple[Any, ...]:
    """The fields of a packet in its pickle, starting with the version."""
    restore, state = packet.__reduce__()
    assert restore is packets.restore_packet
    return tuple(state)


@every_kind
@pytest.mark.parametrize("version", [0, 2, -1, "1", None])
def test_a_pickle_of_another_version(kind: Kind, version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of another version raises ValueError, which names both versions."""
    loaded_in(kind, monkeypatch)
    _, *state = state_of(one(kind, Row(frame())))
    with pytest.raises(ValueError, match=f"format {version}, and this linkrx reads format 1"):
        packets.restore_packet(version, *state)


STATE = (
    "frame",
    "timestamp",
    "wire_length",
    "interface",
    "protocol",
    "flags",
    "tci",
    "tpid",
    "link_type",
    "address",
    "link_header",
    "vnet",
    "raw",
    "file_type",
)
WRONG: dict[str, list[Any]] = {
    "frame": [b"", b"short", "text", None, 5, bytearray(20), memoryview(bytes(20))],
    "timestamp": [2**63, -(2**63) - 1, None, 1.5, "1"],
    "wire_length": [2**32, -1, None, 1.5, "1"],
    "interface": [2**32, -1, None, 1.5],
    "protocol": [2**16, 2**32 + 1, -1, 2**70, None, "1"],
    "flags": [2**16, 2**32 + 1, -1, 2**70, None],
    "tci": [2**16, -1, 2**70, None],
    "tpid": [2**16, -1, 2**70, None],
    "link_type": [2**16, -1, 2**70, None],
    "address": [bytes(9), "text", None, 5],
    "link_header": [13, -14, 2**8, 2**32 + 14, 2**70, None, b""],
    "vnet": [0, 3, -1, 2**32 + 1, None],
    "raw": [b"", bytes(9), bytes(11), "text", None],
    "file_type": [2**32, -1, None, 1.5],
}


@every_kind
@pytest.mark.parametrize(("field", "value"), [(field, value) for field in STATE for value in WRONG[field]])
def test_a_damaged_pickle(kind: Kind, field: str, value: Any) -> None:
    """A field of the wrong type or out of range raises ValueError or TypeError."""
    _, *state = state_of(one(kind, FULL, Framing(True, 10)))
    kind.restore(*state)
    state[STATE.index(field)] = value
    with pytest.raises((ValueError, TypeError)):
        kind.restore(*state)


@every_kind
@pytest.mark.parametrize("size", [*range(14), 15, 20])
def test_a_pickle_of_another_length(kind: Kind, size: int) -> None:
    """Too few or too many fields raise TypeError."""
    _, *state = state_of(one(kind, Row(frame())))
    with pytest.raises(TypeError):
        kind.restore(*(state * 2)[:size])


@every_kind
@given(data=st.data())
def test_a_pickle_with_any_byte_changed(kind: Kind, data: st.DataObject) -> None:
    """A pickle with any byte changed gives a packet that can be read, or an exception of unpickling."""
    protocol = data.draw(st.sampled_from([0, 2, 5]))
    pickled = bytearray(pickle.dumps(one(kind, FULL, Framing(True, 10)), protocol))
    at = data.draw(st.integers(0, len(pickled) - 1))
    # The opcode BYTEARRAY8 makes pickle allocate as many bytes as the next field says.
    pickled[at] = data.draw(st.integers(0, 255).filter(lambda value: value != pickle.BYTEARRAY8[0]))
    with pytest.MonkeyPatch.context() as patch:
        loaded_in(kind, patch)
        try:
            # The unpickler in Python: the one in C allocates as many references as a damaged number says.
            loaded = pickle._loads(bytes(pickled))  # type: ignore[attr-defined]
        except Exception:
            return
    if type(loaded) is kind.module.Packet:
        assert len(bytes(loaded)) == len(loaded)
        fields(loaded)
        repr(loaded)


def echo(inbox: Any, outbox: Any) -> None:
    """Send back each packet, and its bytes."""
    packet = inbox.get()
    outbox.put((packet, bytes(packet), packet.vlan))


@pytest.mark.repeats
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_through_a_queue_to_another_process() -> None:
    """A packet can be sent through a multiprocessing queue and back."""
    kind = C if C.module else Kind("plain", plain)
    packet = one(kind, FULL, Framing(True, 10))
    # Not "spawn", which leaves a descriptor of its resource tracker open.
    context = multiprocessing.get_context("fork")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=echo, args=(inbox, outbox))
    process.start()
    try:
        inbox.put(packet)
        returned, shown, vlan = outbox.get(timeout=60)
    finally:
        process.join()
        process.close()
        for queue in (inbox, outbox):
            queue.close()
            queue.join_thread()
    assert fields(returned) == fields(packet)
    assert (shown, vlan) == (bytes(packet), packet.vlan)


# Buffers written in Python came with Python 3.12 (PEP 688).
buffers_in_python = pytest.mark.since(3, 12)

# Hostile buffers. They need an exporter in Python, or NumPy.


@buffers_in_python
@every_kind
def test_compared_with_a_buffer_that_looks_back(kind: Kind) -> None:
    """Comparison is correct with a buffer whose exporter copies the packet and uses its memory again."""
    source = Source(kind)
    packet = source.packet_of(1)

    class Looks:
        def __buffer__(self, flags: int) -> memoryview:
            for number in range(2, 6):
                source.packet_of(number)
            return memoryview(numbered(1))

    assert packet == Looks()
    assert packet == numbered(1)


class Index:
    """An object whose `__index__` calls a function."""

    def __init__(self, number: int, act: Any) -> None:
        self.number, self.act = number, act

    def __index__(self) -> int:
        self.act()
        return self.number


@every_kind
def test_an_index_that_receives(kind: Kind) -> None:
    """An `__index__` that receives does not change the bytes that are read."""
    source = Source(kind)

    def receive() -> None:
        for number in range(2, 6):
            source.packet_of(number)

    sent = numbered(1)
    uses: list[tuple[Callable[[Any], object], object]] = [
        (lambda packet: packet[Index(20, receive)], sent[20]),
        (lambda packet: packet[Index(3, receive) : Index(50, receive) : Index(2, receive)], sent[3:50:2]),
        (lambda packet: packet[Index(14, receive) :], sent[14:]),
        (lambda packet: packet.u16(Index(15, receive)), int.from_bytes(sent[15:17], "big")),
        (lambda packet: packet.u32(Index(-4, receive)), int.from_bytes(sent[-4:], "big")),
    ]
    for use, wanted in uses:
        assert use(source.packet_of(1)) == wanted


@needs_core
def test_an_index_that_raises() -> None:
    """An exception of `__index__` propagates."""
    packet = one(C, Row(FRAME))

    def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        packet[Index(1, fail)]
    with pytest.raises(LookupError, match="no"):
        packet[Index(1, fail) : 3]
    with pytest.raises(LookupError, match="no"):
        packet.u32(Index(1, fail))


# Packets in a ring.


@needs_core
def test_a_packet_in_a_ring_is_read_in_place() -> None:
    """Indexing, slices, numbers, lengths and fields of a fresh packet read the ring's memory. After bytes() they read the copy."""
    ring = Ring()
    ring.fill([Row(numbered(1))])
    packet = ring.receiver.take_packet()
    assert packet is not None
    ring.memory[20] = 0xAB
    assert (packet[20], packet[20:21], packet.u16(19) & 0xFF) == (0xAB, b"\xab", 0xAB)
    assert packet.tobytes()[20] == 0xAB
    ring.memory[20] = 0xCD
    assert packet[20] == 0xAB


@needs_core
def test_a_ring_that_is_not_mapped() -> None:
    """If the guard says that the ring is not mapped in this process, every read of its memory raises RuntimeError with the reason."""
    ring = Ring(Framing(True, 10))
    row = Row(numbered(1), vnet_bytes(0, 0, 0, 0, 0, 0))
    ring.fill([row, row])
    packet = ring.receiver.take_packet()
    assert packet is not None
    ring.guard.value = 0
    for use in (
        lambda: packet[0],
        lambda: packet[1:3],
        lambda: packet[::-1],
        lambda: packet.u16(0),
        lambda: packet.u32(0),
        lambda: bytes(packet),
        packet.tobytes,
        packet.copy,
        lambda: packet.frame,
        lambda: packet.data,
        lambda: packet.link_header,
        lambda: memoryview(packet),
        lambda: packet.remote,
        lambda: packet.local,
        lambda: hash(packet),
        lambda: packet == numbered(1),
        lambda: packet == packet,
        lambda: list(packet),
        lambda: 5 in packet,
        lambda: pickle.dumps(packet),
        lambda: repr(packet),
        lambda: copy.deepcopy(packet),
        lambda: struct.unpack_from("!H", packet, 12),
        ring.receiver.take_packet,
        lambda: ring.receiver.deliver(print),
    ):
        with pytest.raises(RuntimeError, match=r"fork with os\.fork\(\)"):
            use()
    assert (len(packet), packet.protocol, packet.wire_length, packet != b"x") == (64, 0x88B5, 64, True)
    ring.guard.value = 1
    assert packet == numbered(1)
    ring.receiver.copy_held()
    ring.guard.value = 0
    assert packet == numbered(1)


@needs_core
def test_a_ring_that_is_not_mapped_is_not_read_by_deliver() -> None:
    """If the ring is not mapped, delivery raises RuntimeError and loses no packet, also without a virtio-net header."""
    ring = Ring()
    ring.fill([Row(numbered(1))])
    ring.guard.value = 0
    with pytest.raises(RuntimeError, match=r"fork with os\.fork\(\)"):
        ring.receiver.deliver(print)
    ring.guard.value = 1
    got: list[bytes] = []
    assert ring.receiver.deliver(lambda _r, _l, _p, packet: got.append(bytes(packet))) == 1
    assert got == [numbered(1)]
