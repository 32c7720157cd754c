"""Packets and batches of chosen rows, made by the types in C and by the types in plain Python, as in reception."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from linkrx import _core, packets
from linkrx.errors import Busy
from linkrx.memory.columns import ROW_BYTES, Descriptors, Table, align
from linkrx.memory.counters import new_counters
from linkrx.memory.framing import Framing
from linkrx.packets import plain
from linkrx.receiving import plain_receiver

if TYPE_CHECKING:
    from linkrx._core import _types

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
ETHERNET = Framing(ethernet=True)
BARE = Framing(ethernet=False)
ROOM = 64 * 1024


@dataclass(frozen=True)
class Kind:
    """One implementation of the types."""

    name: str
    module: Any

    @property
    def restore(self) -> Callable[..., _types.Packet]:
        """The function that makes a packet from the fields in its pickle."""
        made: Callable[..., _types.Packet] = (
            getattr(self.module, "restore_packet", None) or self.module.restore
        )
        return made


C = Kind("c", _core.types)
PLAIN = Kind("plain", plain)

needs_core = pytest.mark.skipif(_core.types is None, reason=f"tests the types in C: {_core.reason}")
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(C, id=C.name, marks=needs_core), pytest.param(PLAIN, id=PLAIN.name)]
)


@dataclass(frozen=True)
class Row:
    """One packet of a batch."""

    frame: bytes
    prefix: bytes = b""
    wire_length: int = 0
    protocol: int = 0x88B5
    flags: int = 0
    timestamp: int = 0
    interface: int = 0
    vlan_tci: int = 0
    vlan_tpid: int = 0
    link_type: int = 0
    address: bytes = b""
    link_header: int = 0


def frame(payload: bytes = b"payload", protocol: int = 0x88B5) -> bytes:
    """An Ethernet frame."""
    return LOCAL + REMOTE + protocol.to_bytes(2, "big") + payload


def numbered(number: int, size: int = 64) -> bytes:
    """An Ethernet frame of `size` bytes that differs from those of other numbers in every word."""
    return frame(number.to_bytes(4, "big") * (size // 4))[:size]


class SteppedReceiver:
    """A receiver whose steps a test calls one by one: fill an arena, make a batch, deliver."""

    def __init__(self, kind: Kind, framing: Framing, descriptors: Descriptors) -> None:
        stepped = self

        class Receiver(kind.module.Receiver if kind.module is _core.types else plain_receiver.Receiver):  # type: ignore[misc]
            """The methods of reception that a receiver without a source calls."""

            def _fill(self, arena: Any, _room: int) -> int:
                stepped.filling = arena
                return 0

            def _look_at_drops(self) -> float:
                return 3600.0

            def _over(self) -> bool:
                return False

            def _refuse(self, same_thread: bool) -> None:
                raise Busy

        self.filling: Any = None
        self.deliver_to: Callable[..., object] | None = None
        self.rx: Any = Receiver()
        self.mechanism = 0
        self.counters = new_counters()
        self.rx._prepare(
            lambda *arguments: stepped.deliver_to(*arguments),  # type: ignore[misc]
            descriptors.memory,
            descriptors.rows,
            self.counters,
            ROOM,
            framing.prefix,
            framing.packet_info_size,
            framing.link_header,
            framing.link_type,
            framing.per_packet,
            framing.vnet_header_size,
            not framing.vnet_little_endian,
            0,
            False,
            -1,
            -1,
            -1,
            0.0,
            0,
        )

    @property
    def left(self) -> int:
        """How many packets wait."""
        left: int = self.rx._left
        return left

    def arena(self) -> Any:
        """The arena to fill now. While packets wait, the arena of the last fill."""
        if not self.mechanism:  # a mechanism fills its own memory
            self.rx._poll()
        return self.filling

    def make_batch(self, _arena: object) -> bool:
        """Make a batch from the descriptors."""
        return bool(self.rx._poll())

    def deliver(self, deliver: Callable[..., object]) -> int:
        """Call `deliver` with each packet that waits."""
        self.deliver_to = deliver
        return int(self.rx.drain()) if self.left else 0

    def take_packet(self) -> Any:
        """The next packet, or None."""
        return self.rx._take()

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.rx._take()

    def take_batch(self) -> Any:
        """A batch of all packets that wait, or None."""
        return self.rx._next_batch(0, None) if self.left else None

    def drop(self) -> None:
        """Drop the packets that wait."""
        self.rx._drop()

    def release(self) -> None:
        """Release the memory, and start again."""
        self.rx._release()
        self.rx._use(self.mechanism)

    def copy_held(self) -> None:
        """Copy held packets out of memory that does not belong to the receiver."""
        self.rx._copy_held()


class Source:
    """A receiver, and the part of reception that fills and classifies."""

    def __init__(self, kind: Kind, framing: Framing = ETHERNET, rows: int = 256) -> None:
        self.kind = kind
        self.framing = framing
        self.descriptors = Descriptors(rows)
        self.receiver: Any = SteppedReceiver(kind, framing, self.descriptors)

    def fill(self, rows: Sequence[Row], spare: int = 2, gap: bytes = b"") -> bool:
        """Receive these rows. In memory, `gap` is in front of each prefix and frame; the bytes between them stay as they were."""
        arena = self.receiver.arena()
        view, at, starts = arena.view, arena.cursor, []
        for row in rows:
            assert len(row.prefix) == self.framing.prefix
            data = gap + row.prefix + row.frame
            view[at : at + len(data)] = data
            starts.append(at - arena.cursor + len(gap) + len(row.prefix))
            at = align(at + len(data))
        count = len(rows) + spare
        self.describe(rows, starts, self.table(view[at:], count), count, at - arena.cursor)
        return bool(self.receiver.make_batch(arena))

    def table(self, behind: memoryview, count: int) -> memoryview:
        """The memory for the table of `count` rows: where C has it, or behind the frames."""
        assert count <= self.descriptors.rows
        if not (address := self.descriptors.report.table):
            return behind[: ROW_BYTES * count]
        return memoryview((ctypes.c_uint8 * (ROW_BYTES * count)).from_address(address)).cast("B")

    def describe(
        self, rows: Sequence[Row], starts: Sequence[int], memory: memoryview, count: int, end: int
    ) -> None:
        """Write the table of `count` rows and the report, as classification does."""
        memory[:] = b"\xee" * len(memory)
        columns = Table(memory, count)
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            columns.timestamps[index] = row.timestamp
            columns.starts[index] = start
            columns.lengths[index] = len(row.frame)
            columns.wire_lengths[index] = row.wire_length or len(row.frame)
            columns.interfaces[index] = row.interface
            columns.protocols[index] = row.protocol
            columns.flags[index] = row.flags
            columns.vlan_tcis[index] = row.vlan_tci
            columns.vlan_tpids[index] = row.vlan_tpid
            if self.framing.per_packet:
                columns.link_types[index] = row.link_type
                columns.addresses[index] = int.from_bytes(row.address.ljust(8, b"\0"), sys.byteorder)
                columns.address_lengths[index] = len(row.address)
                columns.link_headers[index] = row.link_header
        report = self.descriptors.report
        report.classified, report.rows, report.end, report.receives = len(rows) + 1, count, end, 1

    def batch(self, rows: Sequence[Row], spare: int = 2, gap: bytes = b"") -> _types.Batch:
        """A batch of these rows."""
        assert self.fill(rows, spare, gap)
        batch: _types.Batch | None = self.receiver.take_batch()
        assert batch is not None
        return batch

    def batch_of(self, *numbers: int, size: int = 64) -> _types.Batch:
        """A batch of numbered frames."""
        return self.batch([Row(numbered(number, size)) for number in numbers])

    def packet_of(self, number: int, size: int = 64) -> _types.Packet:
        """The packet of a numbered frame, as `recv` returns it."""
        assert self.fill([Row(numbered(number, size))])
        packet: _types.Packet | None = self.receiver.take_packet()
        assert packet is not None
        return packet


class _Mechanism(ctypes.Structure):
    """struct lrx_mechanism."""

    FILL = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_uint32
    )
    RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32)
    _fields_ = [
        ("fill", FILL),
        ("state", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("release", RELEASE),
    ]


class _Slots(ctypes.Structure):
    """struct lrx_slots."""

    _fields_ = [
        ("frames", ctypes.c_size_t * 2),
        ("unreleased", ctypes.c_uint32 * 2),
        ("turn", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("guard", ctypes.c_size_t),
    ]


class Ring(Source):
    """A source whose frames are in memory that does not belong to the receiver, like a ring. For the types in C."""

    SIZE = 64 * 1024

    def __init__(self, framing: Framing = ETHERNET) -> None:
        super().__init__(C, framing)
        self.memory = (ctypes.c_uint8 * (3 * self.SIZE))()
        self.guard = ctypes.c_uint32(1)
        self.slots = _Slots(guard=ctypes.addressof(self.guard))
        self.rows: tuple[Sequence[Row], int, bytes] | None = None
        self.mechanism = _Mechanism(
            _Mechanism.FILL(self._fill),
            None,
            ctypes.addressof(self.slots),
            _Mechanism.RELEASE(self._release),
        )
        self.receiver.mechanism = ctypes.addressof(self.mechanism)
        self.receiver.rx._use(self.receiver.mechanism)

    def _release(self, _state: int | None, slot: int) -> None:
        self.slots.unreleased[slot] = 0

    def _fill(self, _state: int | None, _descriptors: int, _rows: int, _region: int, _room: int) -> int:
        """Fill the two halves of the ring's memory in turn."""
        if self.rows is None:
            return 0
        (rows, spare, gap), self.rows = self.rows, None
        turn = self.slots.turn
        first = turn * self.SIZE
        memory = memoryview(self.memory).cast("B")[first : first + 2 * self.SIZE]
        memory[: self.SIZE] = b"\xbb" * self.SIZE
        at, starts = 0, []
        for row in rows:
            data = gap + row.prefix + row.frame
            memory[at : at + len(data)] = data
            starts.append(at + len(gap) + len(row.prefix))
            at += len(data) + 48  # space for a header
        count = len(rows) + spare
        self.describe(rows, starts, self.table(memory, count), count, 0)
        self.slots.frames[turn] = ctypes.addressof(self.memory) + first
        self.slots.unreleased[turn] = 1
        self.slots.turn = turn ^ 1
        return len(rows)

    def fill(self, rows: Sequence[Row], spare: int = 2, gap: bytes = b"") -> bool:
        """Receive these rows. The receiver copies held packets of a half before the half is filled again."""
        self.rows = (rows, spare, gap)
        return bool(self.receiver.rx._poll())


def batch_of(kind: Kind, rows: Sequence[Row], framing: Framing = ETHERNET, spare: int = 2) -> _types.Batch:
    """A batch of these rows."""
    return Source(kind, framing).batch(rows, spare)


def one(kind: Kind, row: Row, framing: Framing = ETHERNET) -> _types.Packet:
    """The packet of a batch of one."""
    return batch_of(kind, [row], framing)[0]


FIELDS = (
    "frame",
    "link_header",
    "data",
    "protocol",
    "remote",
    "local",
    "wire_length",
    "interface",
    "link_type",
    "truncated",
    "outgoing",
    "checksum_unfinished",
    "timestamp_ns",
    "vlan",
    "vnet",
)


def fields(packet: _types.Packet) -> dict[str, Any]:
    """All attributes of a packet, with views as bytes."""
    return {
        name: bytes(value) if isinstance(value := getattr(packet, name), memoryview) else value
        for name in FIELDS
    }


def vnet_bytes(*words: int) -> bytes:
    """struct virtio_net_hdr as a little-endian kernel writes it."""
    return struct.pack("<BBHHHH", *words)


def loaded_in(kind: Kind, patch: pytest.MonkeyPatch) -> ModuleType:
    """From now on, pickles are loaded as packets of that implementation."""
    patch.setattr(packets, "_restore", kind.restore)
    return packets
