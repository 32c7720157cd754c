"""The rule of memory: a held packet or batch does not change, costs its own bytes, and keeps no other memory."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import pickle
import resource
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import TESTS
from support.received import (
    ETHERNET,
    ROOM,
    C,
    Kind,
    Ring,
    Row,
    Source,
    every_kind,
    needs_core,
    numbered,
    vnet_bytes,
)
from support.ring import waiting

import linkrx
from linkrx import _core
from linkrx.memory.framing import Framing
from linkrx.testing import rigs
from linkrx.testing.waiting import patiently, until

WITH_VNET = Framing(True, 10)


def rows_of(*numbers: int, size: int = 64, framing: Framing = ETHERNET) -> list[Row]:
    """Numbered frames. The number is also in the virtio-net header, if there is one."""
    return [
        Row(numbered(n, size), vnet_bytes(0, 0, 0, 0, n, 0) if framing.vnet_header_size else b"")
        for n in numbers
    ]


def ring() -> Source:
    """Frames that lie in a ring."""
    return Ring()


def arena() -> Source:
    """Frames that lie in an arena."""
    return Source(C)


in_both = pytest.mark.parametrize("make", [arena, ring], ids=lambda make: make.__name__)


# The cost of holding.


def by_deliver(source: Source) -> list[Any]:
    """Keep all packets in deliver."""
    kept: list[Any] = []
    source.receiver.deliver(lambda _r, _l, _p, packet: kept.append(packet))
    return kept


def by_iteration(source: Source) -> list[Any]:
    """Keep all packets of an iteration."""
    return list(source.receiver)


def by_asking(source: Source) -> list[Any]:
    """Keep packets taken one by one, as by recv()."""
    return [source.receiver.take_packet() for _ in range(source.receiver.left)]


def by_batch(source: Source) -> list[Any]:
    """Keep all packets of an iteration over a batch."""
    batch = source.receiver.take_batch()
    assert batch is not None
    return list(batch)


def by_index(source: Source) -> list[Any]:
    """Keep all packets of a batch by index."""
    batch = source.receiver.take_batch()
    assert batch is not None
    return [batch[index] for index in range(len(batch))]


Keep = Callable[[Source], list[Any]]
every_way = pytest.mark.parametrize("keep", [by_deliver, by_iteration, by_asking, by_batch, by_index])


@needs_core
@in_both
@every_way
@pytest.mark.parametrize("size", [64, 1514])
def test_a_kept_packet_costs_its_own_bytes(make: Callable[[], Source], keep: Keep, size: int) -> None:
    """A kept packet costs its bytes and at most 256 more, for all calls that receive. The receiver uses two arenas, and frees them."""
    source = make()
    rows = [rows_of(*range(first, first + 40), size=size) for first in range(0, 2000, 40)]
    source.fill(rows_of(1))
    source.receiver.drop()
    kept: list[Any] = []
    arenas: dict[int, Any] = {}
    gc.collect()
    tracemalloc.start()
    try:
        for some in rows:
            source.fill(some)
            kept.extend(keep(source))
            found = source.receiver.arena()
            if found is not None:
                arenas[id(found)] = found
        source.receiver.release()
        source.receiver.copy_held()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(kept) <= size + 256
    assert len(arenas) <= 2
    assert not any(found.held for found in arenas.values())
    assert kept == [row.frame for some in rows for row in some]


@needs_core
@in_both
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 200])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_kept_batch_costs_what_its_packets_cost(make: Callable[[], Source], count: int, taken: int) -> None:
    """A kept batch costs its frames and at most 400 bytes and 110 for each packet, however many the receiver had room for."""
    source = make()
    source.fill(rows_of(*range(9)))
    source.receiver.drop()
    kept: list[Any] = [None] * 20
    gc.collect()
    tracemalloc.start()
    try:
        for index in range(20):
            source.fill(rows_of(*range(index, index + taken + count)))
            for _ in range(taken):
                source.receiver.take_packet()
            kept[index] = source.receiver.take_batch()
        source.receiver.release()
        source.receiver.copy_held()
        memory, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert memory <= 20 * (400 + (64 + 110) * (taken + count)) + 20_000
    for index, batch in enumerate(kept):
        if count:
            assert batch.frames() == [numbered(index + taken + n) for n in range(count)]
            assert [batch[n] for n in range(count)] == batch.frames()


@needs_core
@in_both
def test_packets_that_deliver_keeps_are_copied_at_once(make: Callable[[], Source]) -> None:
    """After deliver returns, a packet that it keeps has its own copy. A packet that it does not keep is not copied."""
    source = make()
    source.fill(rows_of(*range(9)))
    kept: list[Any] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        if packet[-1] % 3 == 0:
            kept.append(packet)

    source.receiver.deliver(deliver)
    memory = source.memory if isinstance(source, Ring) else source.receiver.arena().view
    ctypes.memset(ctypes.addressof((ctypes.c_char * 1).from_buffer(memory)), 0xEE, ROOM)
    assert kept == [numbered(n) for n in range(9) if numbered(n)[-1] % 3 == 0]


MILLION = """
import gc, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.received import C, Row, Source, numbered

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

rows = [Row(numbered(n)) for n in range(1000)]
source = Source(C, rows=1000)
kept = []
before = resident()
for _ in range(1000):
    source.fill(rows, spare=0)
    if sys.argv[1] == "packets":
        source.receiver.deliver(lambda r, l, p, packet: kept.append(packet))
    else:
        source.receiver.deliver(lambda r, l, p, packet: kept.append(packet[:]))
print(resident() - before - 8 * len(kept), len(kept))
"""


@pytest.mark.repeats
@needs_core
def test_a_million_kept_packets() -> None:
    """A million kept packets of 64 bytes take at most 2.2 times the memory of their bytes objects."""
    taken = {}
    for what in ("packets", "bytes"):
        done = subprocess.run(
            [sys.executable, "-c", MILLION.format(tests=str(TESTS)), what],
            capture_output=True,
            text=True,
            check=True,
        )
        memory, count = map(int, done.stdout.split())
        assert count == 1_000_000
        taken[what] = memory
    assert taken["packets"] <= 2.2 * taken["bytes"]


@every_kind
def test_nothing_is_leaked(kind: Kind) -> None:
    """Making, reading, keeping, refusing and dropping packets and batches leaks no object and no mapping."""
    sources = [Source(kind, WITH_VNET), Source(kind)] + ([Ring(), Ring(WITH_VNET)] if kind is C else [])

    def everything(source: Source) -> None:
        source.fill(rows_of(*range(6), framing=source.framing))
        packets = [source.receiver.take_packet() for _ in range(2)]
        batch: Any = source.receiver.take_batch()
        packets += [*batch, batch[0], batch[-1].copy(), next(iter(batch))]
        for packet in packets:
            views = [packet.frame, packet.data, packet.link_header, packet.data[3:]]
            _ = (views, packet[3], packet[::2], hash(packet), repr(packet), packet == views[0])
            _ = (packet.remote, packet.local, packet.vlan, packet.vnet, packet.tagged())
            pickle.loads(pickle.dumps(packet))
            for wrong in (99, "x"):
                with suppress(IndexError, TypeError):
                    packet[wrong]
                with suppress(IndexError, TypeError):
                    packet.u16(wrong)
        memory = batch.memory
        _ = [getattr(batch, name) for name in ("starts", "lengths", "flags")]
        _ = (batch.frames(), batch.copy(), len(memory), repr(batch))
        with suppress(IndexError):
            batch[99]
        source.fill(rows_of(*range(6), framing=source.framing))
        source.receiver.deliver(lambda *_: None)
        source.fill(rows_of(*range(6), framing=source.framing))
        with suppress(ZeroDivisionError):
            source.receiver.deliver(lambda *_: 1 // 0)
        source.receiver.drop()
        with suppress(ValueError):
            source.receiver.make_batch(source.receiver.arena())
        source.receiver.release()

    def state() -> tuple[int, int]:
        gc.collect()
        return sys.getallocatedblocks(), Path("/proc/self/maps").read_text().count("\n")

    for source in sources:
        for _ in range(20):
            everything(source)
        before = state()
        for _ in range(1000):
            everything(source)
        blocks, mappings = (after - earlier for earlier, after in zip(before, state(), strict=True))
        assert blocks < 500  # one leak per round would be 1000; caches of the interpreter take some
        assert mappings < 50  # the sanitizers make some mappings


# A batch and its memory.


@needs_core
def test_without_held_objects_there_is_one_arena() -> None:
    """If nothing is held, each receive uses the same arena."""
    source = Source(C)
    seen = set()
    for n in range(20):
        source.fill(rows_of(n))
        source.receiver.deliver(lambda *_: None)
        seen.add(id(source.receiver.arena()))
    assert len(seen) == 1


@needs_core
def test_a_held_last_batch_needs_two_arenas() -> None:
    """If only a loop variable holds the last batch, two arenas are used in turn, and nothing is copied."""
    source = Source(C)
    seen = []
    batch = None
    for n in range(20):
        batch = source.batch(rows_of(n))
        assert type(batch.memory.obj) is C.module.Batch
        seen.append(id(source.receiver.arena()))
    assert len(set(seen)) == 2
    assert seen[:2] * 10 == seen


@needs_core
@in_both
def test_a_kept_batch_is_copied_once(make: Callable[[], Source]) -> None:
    """A kept batch is read in place for one more receive, and is then copied once. Its starts do not change."""
    source = make()
    batch = source.batch(rows_of(*range(7)))
    starts, places = batch.starts, batch.starts.tolist()
    latest = None
    for n in range(5):
        latest = source.batch(rows_of(50 + n))  # a loop variable
        assert [packet[:] for packet in batch] == [numbered(n) for n in range(7)]
    assert latest is not None
    assert type(batch.memory.obj) is bytes
    assert batch.memory.obj is batch.memory.obj
    assert (batch.starts.obj is starts.obj, starts.tolist()) == (True, places)
    assert [bytes(batch.memory[start : start + 64]) for start in starts] == batch.frames()


@needs_core
def test_a_view_of_memory_keeps_its_arena() -> None:
    """While a view of a batch's memory is held, the batch keeps its arena, and the receiver uses another."""
    source = Source(C)
    held = []
    for n in range(6):
        batch = source.batch(rows_of(n, n + 1))
        held.append((n, batch.memory, batch.starts, batch))
    for _ in range(4):
        source.batch(rows_of(99))
    for n, memory, starts, batch in held:
        assert [bytes(memory[start : start + 64]) for start in starts] == [numbered(n), numbered(n + 1)]
        assert batch.frames() == [numbered(n), numbered(n + 1)]
        assert [*batch, batch[1]] == [numbered(n), numbered(n + 1), numbered(n + 1)]
        memory.release()
        assert bytes(batch.memory)[starts[1] :] == numbered(n + 1)
        assert batch.copy().frames() == batch.frames()


@needs_core
@in_both
def test_packets_of_a_copied_batch_outlive_it(make: Callable[[], Source]) -> None:
    """Packets of a batch with its own copy or arena do not change after the batch is gone."""
    for viewed in (False, True):
        source = make()
        batch: Any = source.batch(rows_of(1, 2, 3))
        view = batch.memory if viewed else None
        latest = [source.batch(rows_of(n)) for n in range(10, 14)]
        packets = [batch[0], next(iter(batch)), *batch]
        copied = batch.copy()
        packets += [copied[1], *copied]
        del batch, copied, view
        latest = [source.batch(rows_of(n)) for n in range(20, 24)]
        filled_again = [
            bytes([n]) * size for n in range(40) for size in range(150, 250, 8)
        ]  # memory is used again
        assert [packet[:] for packet in packets] == [numbered(n) for n in (1, 1, 1, 2, 3, 2, 1, 2, 3)]
        assert len(latest) + len(filled_again) > 4


@needs_core
def test_the_last_two_packets_of_an_iteration_are_read_in_place() -> None:
    """The last two packets of an iteration are read in place, because loop variables hold them. Earlier held packets are copied."""
    for of_batch in (True, False):
        ring = Ring()
        ring.fill(rows_of(*range(4)))
        packets: Any = iter(ring.receiver.take_batch() or ()) if of_batch else iter(ring.receiver)
        first, second = next(packets), next(packets)
        ctypes.memset(ctypes.addressof(ring.memory), 0xEE, 64)
        assert (first[20], second[:]) == (0xEE, numbered(1))
        third = next(packets)
        ctypes.memset(ctypes.addressof(ring.memory), 0x11, Ring.SIZE)
        assert first[20] == 0xEE
        assert (second[20], third[20]) == (0x11, 0x11)


@needs_core
def test_views_released_in_any_order() -> None:
    """Views of a batch's memory, and views of views, can be released in any order, before and after their batch."""
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        source = Source(C)
        batch: Any = source.batch(rows_of(1, 2))
        views = [batch.memory, batch.memory, batch.memory[batch.starts[1] :], memoryview(batch.memory)]
        del batch
        for step, index in enumerate(order):
            source.batch(rows_of(3, 4))
            assert bytes(views[index])[-64:] == numbered(2)
            views[index].release()
            if step == 1:
                gc.collect()
        source.receiver.release()


@needs_core
def test_releasing_a_receiver_twice() -> None:
    """Held objects do not change when a receiver releases its memory, also twice, or inside deliver."""
    for make in (arena, ring):
        source = make()
        source.fill(rows_of(*range(6)))
        kept = [source.receiver.take_packet()]

        def deliver(
            _r: object, _l: object, _p: int, packet: Any, source: Source = source, kept: list[Any] = kept
        ) -> None:
            kept.append(packet)
            source.receiver.release()
            source.receiver.release()

        assert source.receiver.deliver(deliver) == 1
        source.receiver.copy_held()
        assert kept == [numbered(0), numbered(1)]
        assert source.receiver.left == 0
        source.fill(rows_of(9))
        assert source.receiver.take_packet() == numbered(9)


@needs_core
def test_receiving_within_deliver() -> None:
    """A deliver that receives gets Busy, and every packet is delivered once."""
    for make in (arena, ring):
        source = make()
        source.fill(rows_of(*range(6)))
        got: list[Any] = []

        def deliver(
            _r: object, _l: object, _p: int, packet: Any, source: Source = source, got: list[Any] = got
        ) -> None:
            got.append(packet)
            rx = source.receiver.rx
            for receive in (
                rx.drain,
                rx.dispatch,
                rx.recv,
                rx._take,
                rx._poll,
                lambda: next(rx),
                lambda: rx._next_batch(0, None),
            ):
                with pytest.raises(linkrx.Busy):
                    receive()

        assert source.receiver.deliver(deliver) == 6
        assert got == [numbered(n) for n in range(6)]


# The collector, finalizers, and the end of the interpreter.


class Looks:
    """An object whose finalizer reads packets and batches."""

    def __init__(self, things: list[Any], findings: list[object]) -> None:
        self.things, self.findings = things, findings
        self.me = self

    def __del__(self) -> None:
        for thing in self.things:
            if isinstance(thing, linkrx.Batch):
                self.findings.append([bytes(packet) for packet in thing])
                self.findings.append(bytes(thing.memory)[-4:])
                self.findings.append(thing.lengths.tolist())
            else:
                self.findings.append(
                    (thing[:20], bytes(thing.data), thing.frame[3], hash(thing), thing.copy())
                )


@contextmanager
def eager_collector() -> Iterator[None]:
    """Run the collector at every allocation of a container."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.collect()


@needs_core
@in_both
def test_finalizers_that_look(make: Callable[[], Source]) -> None:
    """Finalizers of cycles, which run during any allocation, see the sent bytes, and do not affect other objects."""
    source = make()
    findings: list[object] = []
    with eager_collector():
        for n in range(40):
            source.fill(rows_of(*range(n, n + 6)))
            first: Any = source.receiver.take_packet()
            Looks([first], findings)
            kept: list[Any] = []

            def deliver(_r: object, _l: object, _p: int, packet: Any, kept: list[Any] = kept) -> None:
                kept.append(packet)
                Looks([packet], findings)
                if len(kept) == 3:
                    raise LookupError

            with suppress(LookupError):
                source.receiver.deliver(deliver)
            batch: Any = source.receiver.take_batch()
            Looks([batch], findings)
            iterated = iter(batch)
            Looks([next(iterated), batch[0], *kept], findings)
            shown = [[view.frame, view.data, view.link_header] for view in batch]
            assert [views[0] for views in shown] == batch.frames()
            assert [bytes(views[1]) for views in shown] == [frame[14:] for frame in batch.frames()]
            assert batch.frames() == [numbered(k) for k in range(n + 1 + len(kept), n + 6)]
            assert [column.tolist() for column in (batch.starts, batch.lengths, batch.flags)][1] == [
                64
            ] * len(batch)
            assert [first, *kept] == [numbered(k) for k in range(n, n + 1 + len(kept))]
    assert len(findings) > 300


@needs_core
def test_a_collection_while_a_view_is_made() -> None:
    """A finalizer that reads the same packet or batch while a view of it is made does not change the view's range."""
    source = Source(C)
    findings: list[object] = []
    parts = {"data": numbered(1)[14:], "link_header": numbered(1)[:14], "frame": numbered(1)}
    for part, wanted in parts.items():
        packet = source.packet_of(1)
        with eager_collector():
            gc.disable()
            Looks([packet], findings)
            gc.enable()  # the next container triggers the collector
            view = getattr(packet, part)
        assert bytes(view) == wanted
    for name in ("starts", "timestamps", "flags"):
        batch = source.batch_of(1, 2)
        with eager_collector():
            gc.disable()
            Looks([batch], findings)
            gc.enable()
            column = getattr(batch, name)
        assert column.format == {"starts": "I", "timestamps": "q", "flags": "H"}[name]
    assert len(findings) == 3 + 3 * 3


@needs_core
def test_packets_in_cycles_are_collected() -> None:
    """Packets, batches, iterators and views in a cycle are collected with it, and their memory is freed."""
    source = Source(C)
    source.fill(rows_of(*range(8)))
    cycle: list[Any] = [source.receiver.take_packet(), source.receiver.take_packet()]
    batch = source.receiver.take_batch()
    assert batch is not None
    cycle += [batch, iter(batch), batch[0], batch.starts, cycle]
    del batch
    owner = source.receiver.arena()
    source.fill(rows_of(9))
    cycle = []
    gc.collect()
    source.receiver.drop()
    source.receiver.arena()
    assert not owner.held


EXIT = """
import gc, socket, sys, threading
import linkrx
gc.disable()
left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
rx = linkrx.open(left)
for n in range(8):
    right.send(bytes(14) + bytes([n]) * 50)
class Late:
    def __init__(self, *things): self.things, self.me = things, self
    def __del__(self):
        for thing in self.things:
            bytes(thing) if not hasattr(thing, "frames") else thing.frames()
first = rx.recv()
second = next(iter(rx))
batch = next(rx.batches())
iterated = iter(batch)
Late(first, second, batch, next(iterated), batch.memory, batch[2].data)
kept = {"cycle": [first, second, batch, iterated, batch.memory, batch.starts, batch[1].frame]}
kept["self"] = kept
threading.local().kept = kept
sys.kept = Late(first, batch, batch.memory, iterated and batch[1])
if sys.argv[1] == "close":
    rx.close()
elif sys.argv[1] == "unload":
    rx.close()
    for name in [name for name in sys.modules if name.startswith("linkrx")]:
        del sys.modules[name]
    del linkrx, rx
    gc.collect()
"""


@pytest.mark.parametrize("way", ["open", "close", "unload"])
def test_the_end_of_the_interpreter(way: str) -> None:
    """A program that ends while it holds packets, batches and views, in cycles and with finalizers, ends with status 0."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", EXIT, way],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Fatal" not in done.stderr


# Failing allocations.


@contextmanager
def failing(step: int) -> Iterator[None]:
    """Let the allocation with this number fail, and not the later ones."""
    testcapi = pytest.importorskip("_testcapi", reason="needs _testcapi, which this Python comes without")
    testcapi.set_nomemory(step, step + 1)
    try:
        yield
    finally:
        testcapi.remove_mem_hooks()


def at_each_allocation(use: Callable[[], object], most: int = 400) -> Iterator[BaseException | None]:
    """Call a function until each of its allocations has failed once. Yields each exception, and at last None."""
    for step in range(most):
        error: BaseException | None = None
        ended = True
        try:
            with failing(step):
                use()
        except MemoryError as raised:
            error, ended = raised.with_traceback(None), False
        yield error
        del error
        if ended:
            return
    raise AssertionError("it allocates without end")


def looked_at(source: Source) -> dict[str, Callable[[Any], object]]:
    """Call every operation of a packet that allocates."""
    return {
        "slice": lambda p: p[3:9],
        "steps": lambda p: p[::2],
        "bytes": bytes,
        "frame": lambda p: bytes(p.frame),
        "data": lambda p: bytes(p.data[5:]),
        "remote": lambda p: p.remote,
        "tagged": lambda p: p.tagged(),
        "vlan": lambda p: p.vlan,
        "vnet": lambda p: p.vnet,
        "number": lambda p: p.u32(0),
        "hash": hash,
        "repr": repr,
        "copy": lambda p: bytes(p.copy()),
        "in": lambda p: 5 in p,
        "equal": lambda p: p == bytes(64),
        "reduce": lambda p: p.__reduce__()[1],
    }


LOOKS = list(looked_at(Source))  # type: ignore[arg-type]


@needs_core
@in_both
@pytest.mark.parametrize("name", LOOKS)
def test_no_memory_to_look_at_a_packet(make: Callable[[], Source], name: str) -> None:
    """If an allocation fails while a packet is read, MemoryError is raised, and the next read succeeds."""
    framing = WITH_VNET
    source = Ring(framing) if make is ring else Source(C, framing)
    row = Row(numbered(5), vnet_bytes(0, 0, 0, 0, 5, 0), flags=4, vlan_tci=3, vlan_tpid=0x8100)
    look = looked_at(source)[name]
    wanted = look(source.batch([row])[0])
    source.fill([row] * 200)
    packets: Any = iter(source.receiver)
    current = [next(packets)]
    for _ in at_each_allocation(lambda: look(current[0])):
        assert current[0][:] == numbered(5)
        assert look(current[0]) == wanted
        current[0] = next(packets)


@needs_core
@in_both
def test_no_memory_to_hand_over(make: Callable[[], Source]) -> None:
    """If an allocation fails while packets are delivered, none is lost or repeated, except one whose deliver failed."""
    source = make()
    for way in ("take_packet", "next", "take_batch", "deliver"):
        failures = 0
        got: list[Any] = [None] * 8  # append() would allocate too
        count = 0

        def deliver(
            _remote: object, _local: object, _protocol: int, packet: Any, got: list[Any] = got
        ) -> None:
            nonlocal count
            got[count] = packet
            count += 1

        def use(way: str = way) -> None:
            if way == "deliver":
                source.receiver.deliver(deliver)
            elif way == "next":
                for packet in source.receiver:
                    deliver(None, None, 0, packet)
            elif way == "take_packet":
                while source.receiver.left:
                    deliver(None, None, 0, source.receiver.take_packet())
            else:
                batch = source.receiver.take_batch()
                if batch is not None:
                    deliver(None, None, 0, batch)

        for n in range(200):
            source.fill(rows_of(*range(n, n + 5)))
            count = raised = 0
            with suppress(MemoryError), failing(n % 60):
                raised = 1
                use()
                raised = 0
            failures += raised
            use()
            seen = got[:count] if way != "take_batch" else list(got[0])
            sent = [numbered(k) for k in range(n, n + 5)]
            # CPython allocates a frame for `deliver` here. If that fails, deliver has failed.
            assert len(seen) >= len(sent) - raised
            assert [bytes(packet) for packet in seen] == [frame for frame in sent if frame in seen]
        assert failures > 0 or way == "take_batch"  # it was made before


@needs_core
@in_both
def test_no_memory_to_copy_what_is_held(make: Callable[[], Source]) -> None:
    """If the copy of a held packet cannot be allocated, MemoryError is raised, nothing changes, and the next receive succeeds."""
    source = make()
    failures = 0
    for n in range(60):
        source.fill(rows_of(*range(n, n + 8)))
        held: list[Any] = [source.receiver.take_packet() for _ in range(4)]
        batch = source.receiver.take_batch()
        assert batch is not None
        held += [batch[0], next(iter(batch))]
        wanted = [numbered(k) for k in (*range(n, n + 4), n + 4, n + 4)]
        for k in range(4):
            try:
                with failing((n + k) % 12):
                    # As in a fill: an arena, and the other half of a ring.
                    source.receiver.arena()
                    source.receiver.copy_held()
            except MemoryError:
                failures += 1
            assert [packet[:] for packet in held] == wanted
            assert batch.frames() == [numbered(k) for k in range(n + 4, n + 8)]
            source.fill(rows_of(90 + k))
            source.receiver.drop()
        assert held == wanted
        assert batch.frames() == [numbered(k) for k in range(n + 4, n + 8)]
    assert failures > 0


class ShortOfMemory:
    """A receiver in which one allocation of each make_batch fails the first time."""

    def __init__(self, receiver: Any) -> None:
        self.arena = receiver.arena
        self.wrapped_make_batch = receiver.make_batch
        self.step = self.failures = 0

    def make_batch(self, owner: Any) -> bool:
        """Make a batch, and repeat it after a MemoryError."""
        self.step += 1
        try:
            with failing(self.step % 6):
                return bool(self.wrapped_make_batch(owner))
        except MemoryError:
            self.failures += 1
            return bool(self.wrapped_make_batch(owner))


@needs_core
def test_no_memory_to_take_in() -> None:
    """If an allocation fails while a batch is made, the next call makes it, and no packet is lost."""
    source = arena()
    receiver: Any = source.receiver
    short: Any = ShortOfMemory(receiver)
    for n in range(30):
        source.receiver = short
        assert source.fill(rows_of(n, n + 1))
        source.receiver = receiver
        assert [receiver.take_packet() for _ in range(2)] == [numbered(n), numbered(n + 1)]
    assert short.failures > 0


@needs_core
def test_no_memory_for_a_waiter() -> None:
    """If an allocation fails while a waiter of an event loop is made, that is MemoryError."""
    receiver = Source(C).receiver.rx
    loop, failures = asyncio.new_event_loop(), 0
    try:
        for step in range(60):
            try:
                with failing(step):
                    _core.types.Waiter(receiver, loop)
            except MemoryError:
                failures += 1
    finally:
        loop.close()
    assert 5 < failures < 60


@needs_core
@in_both
@pytest.mark.parametrize("first", [0, 3])
def test_a_pending_batch_that_was_copied_is_handed_over(make: Callable[[], Source], first: int) -> None:
    """A batch whose frames were copied before it was handed over, as before a fork, has all packets that were not taken."""
    source = make()
    source.fill(rows_of(*range(10)))
    taken = [source.receiver.take_packet() for _ in range(first)]
    source.receiver.copy_held()
    batch = source.receiver.take_batch()
    source.fill(rows_of(*range(50, 60)))
    assert taken + batch.frames() == [numbered(n) for n in range(10)]
    assert [packet.tobytes() for packet in batch] == batch.frames()


@needs_core
def test_no_address_space_for_an_arena() -> None:
    """If mmap(2) fails for another arena, MemoryError is raised, held objects do not change, and a later receive succeeds."""
    source = Source(C)
    held = [source.batch(rows_of(n)) for n in range(2)]
    views = [batch.memory for batch in held]
    spare = bytearray(1 << 20)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # Allow no further mapping.
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() // 2, limits[1]))
    try:
        with pytest.raises(
            MemoryError, match=r"an arena of \d+ bytes for received frames: mmap\(2\) found no memory"
        ):
            source.receiver.arena()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    del spare
    assert [bytes(view[-64:]) for view in views] == [numbered(0), numbered(1)]
    assert source.packet_of(3) == numbered(3)


# Forks.


def child_says(work: Callable[[], object], fork: Callable[[], int] = os.fork) -> str:
    """Run some work in a forked child. Returns an empty string, its exception, or how the child died."""
    reading, writing = os.pipe()
    child = fork()
    if child == 0:  # pragma: no cover, another process
        said = ""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if status == 0 else f"status {status}: {said}"


def past_the_hooks() -> int:
    """Call fork() of the C library, without Python's hooks."""
    return int(ctypes.PyDLL(None).fork())


@contextmanager
def held_of_a_ring(
    deliver: Any = None,
) -> Iterator[tuple[rigs.Rig, linkrx.Dispatcher, list[Any], Any, list[bytes]]]:
    """A ring of which packets in place, a batch, and the rest of a receive are held."""
    with rigs.interface() as rig, linkrx.open(rig.source, deliver, backend="packet_mmap", batch_size=8) as rx:
        sent = [rig.frame(100, n) for n in range(24)]
        # In one block: of more of them the first would be copied already. The kernel closes one each millisecond.
        for _ in patiently(lambda: waiting() == [len(sent)]):
            for _batch in rx.batches(0):
                pass
            for frame in sent:
                rig.send(frame)
            until(lambda: sum(waiting()) == len(sent))
        batch: Any = next(rx.batches(10))
        packets: list[Any] = [batch[0], next(iter(batch))]
        packets += islice(rx, 2)
        yield rig, rx, packets, batch, sent


@needs_core
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("way", ["recv", "batches"])
def test_a_fork_copies_what_is_held_of_a_ring(way: str) -> None:
    """Objects held of a ring show the sent bytes in a child of os.fork and in the parent, which still receives."""
    with held_of_a_ring() as (_, rx, packets, batch, sent):
        first = len(batch)
        wanted = [sent[0], sent[0], sent[first], sent[first + 1]]

        def look() -> None:
            assert packets == wanted
            assert batch.frames() == sent[:first]
            assert list(batch) == sent[:first]
            assert [packet.remote for packet in packets] == [rigs.REMOTE] * 4
            rx.close()
            assert [*packets, *batch] == [*wanted, *sent[:first]]

        assert child_says(look) == ""
        assert packets == wanted
        assert batch.frames() == sent[:first]
        rest: list[Any] = []
        while len(rest) < len(sent) - first - 2:
            rest += [rx.recv(10)] if way == "recv" else next(rx.batches(10)).frames()
        assert rest == sent[first + 2 :]


@needs_core
@pytest.mark.usefixtures("devices")
@pytest.mark.skipif(not hasattr(ctypes, "PyDLL"), reason="needs ctypes")
def test_a_fork_past_pythons_hooks() -> None:
    """In a child of the C library's fork(), reading in a ring and receiving raise RuntimeError. The parent still receives."""
    got: list[bytes] = []

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        got.append(bytes(packet))

    with held_of_a_ring(deliver) as (rig, rx, packets, batch, sent):
        first = len(batch)
        uses: dict[str, Callable[[], object]] = {
            "index": lambda: packets[0][0],
            "slice": lambda: packets[1][3:9],
            "bytes": lambda: bytes(packets[2]),
            "data": lambda: packets[3].data,
            "frames": lambda: batch.frames(),
            "memory": lambda: batch.memory,
            "iteration": lambda: bytes(next(iter(batch))),
            "copy": lambda: batch.copy(),
            "recv": lambda: bytes(rx.recv(0)),
            "next": lambda: bytes(next(iter(rx))),
            "drain": rx.drain,
        }
        for name, use in uses.items():
            said = child_says(use, past_the_hooks)
            assert said.startswith(
                ("RuntimeError: this ", "Closed: this dispatcher belongs to the parent")
            ), (name, said)
            assert "fork()" in said
        # Attributes outside the ring can be read.
        assert child_says(lambda: (len(packets[0]), batch.lengths, packets[0].protocol), past_the_hooks) == ""
        # And close() does not crash the child.
        assert not child_says(rx.close, past_the_hooks).startswith("status")
        assert packets == [sent[0], sent[0], sent[first], sent[first + 1]]
        while len(got) < len(sent) - first - 2:
            assert rx.dispatch(10)
        assert got == sent[first + 2 :]
        rig.send(rig.frame(100, 77))
        assert rx.recv(10) == rig.frame(100, 77)


@needs_core
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("use", ["dispatch", "drain", "batches", "stats", "close"])
def test_receiving_past_pythons_hooks(use: str) -> None:
    """In a child of the C library's fork(), no call that receives crashes, with or without held objects."""
    with rigs.interface() as rig, linkrx.open(rig.source, lambda *_: None, backend="packet_mmap") as rx:
        for _ in range(3):
            for n in range(5):
                rig.send(rig.frame(100, n))
            assert rx.dispatch(10)
        for n in range(5):
            rig.send(rig.frame(100, n))

        def work() -> None:
            for _ in range(3):
                with suppress(OSError, RuntimeError, linkrx.Closed):
                    {
                        "dispatch": lambda: rx.dispatch(0.01),
                        "drain": rx.drain,
                        "batches": lambda: list(rx.batches(0)),
                        "stats": rx.stats,
                        "close": rx.close,
                    }[use]()

        assert child_says(work, past_the_hooks) == ""
        before = rx.stats().packets
        assert rx.dispatch(10)
        assert rx.stats().packets > before


# Random operations.

STEPS = (
    "fill",
    "take",
    "next",
    "deliver",
    "raise",
    "batch",
    "index",
    "iterate",
    "step",
    "memory",
    "column",
    "copy",
    "view",
    "drop",
    "release",
)


class Holder:
    """Runs random operations on a source, keeps their results, and knows the expected contents of each."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.sent: list[bytes] = []  # the frames that wait in the receiver
        self.number = 0
        self.packets: list[tuple[Any, bytes]] = []
        self.batches: list[tuple[Any, list[bytes]]] = []
        self.iterators: list[tuple[Any, list[bytes]]] = []
        self.views: list[tuple[memoryview, bytes]] = []

    def step(self, name: str, choice: int) -> None:
        """Run one operation, if it is possible now."""
        receiver = self.source.receiver
        getattr(self, f"do_{name}")(receiver, choice)

    def do_fill(self, receiver: Any, choice: int) -> None:
        receiver.drop()
        numbers = range(self.number, self.number + 1 + choice % 7)
        self.number += len(numbers)
        self.sent = [numbered(n, 30 + choice) for n in numbers]
        self.source.fill([Row(frame, bytes(self.source.framing.prefix)) for frame in self.sent])

    def keep(self, packet: Any, choice: int) -> None:
        assert packet[:] == self.sent[0]
        if choice % 2:
            self.packets.append((packet, self.sent[0]))
        del self.sent[0]

    def do_take(self, receiver: Any, choice: int) -> None:
        packet = receiver.take_packet()
        assert (packet is None) == (not self.sent)
        if packet is not None:
            self.keep(packet, choice)

    def do_next(self, receiver: Any, choice: int) -> None:
        for packet in islice(receiver, choice % 4):
            self.keep(packet, choice)

    def do_deliver(self, receiver: Any, choice: int) -> None:
        def deliver(_remote: object, _local: object, _protocol: int, packet: Any) -> None:
            self.keep(packet, choice >> 1 & len(self.sent))
            if self.number % 5 == choice % 5:
                raise LookupError

        with suppress(LookupError):
            receiver.deliver(deliver)

    do_raise = do_deliver

    def do_batch(self, receiver: Any, _choice: int) -> None:
        batch = receiver.take_batch()
        assert (batch is None) == (not self.sent)
        if batch is not None:
            self.batches.append((batch, self.sent))
            self.sent = []

    def do_index(self, _receiver: Any, choice: int) -> None:
        if self.batches:
            batch, frames = self.batches[choice % len(self.batches)]
            self.packets.append((batch[choice % len(frames)], frames[choice % len(frames)]))

    def do_iterate(self, _receiver: Any, choice: int) -> None:
        if self.batches:
            batch, frames = self.batches[choice % len(self.batches)]
            self.iterators.append((iter(batch), list(frames)))

    def do_step(self, _receiver: Any, choice: int) -> None:
        if self.iterators:
            iterator, frames = self.iterators[choice % len(self.iterators)]
            packet = next(iterator, None)
            assert (packet is None) == (not frames)
            if packet is not None:
                if choice % 3:
                    self.packets.append((packet, frames[0]))
                del frames[0]

    def do_memory(self, _receiver: Any, choice: int) -> None:
        if self.batches:
            batch, frames = self.batches[choice % len(self.batches)]
            at = choice % len(frames)
            self.views.append((batch.memory[batch.starts[at] :][: batch.lengths[at]], frames[at]))

    def do_column(self, _receiver: Any, choice: int) -> None:
        if self.batches:
            batch, frames = self.batches[choice % len(self.batches)]
            lengths = bytes(b"".join(len(frame).to_bytes(4, sys.byteorder) for frame in frames))
            self.views.append((batch.lengths.cast("B"), lengths))

    def do_copy(self, _receiver: Any, choice: int) -> None:
        if self.batches:
            batch, frames = self.batches[choice % len(self.batches)]
            self.batches.append((batch.copy(), frames))
        if self.packets:
            packet, frame = self.packets[choice % len(self.packets)]
            self.packets.append((packet.copy(), frame))

    def do_view(self, _receiver: Any, choice: int) -> None:
        if self.packets:
            packet, frame = self.packets[choice % len(self.packets)]
            self.views.append((packet.data, frame[14:]) if choice % 2 else (packet.frame, frame))

    def do_drop(self, _receiver: Any, choice: int) -> None:
        for things in (self.packets, self.batches, self.iterators, self.views):
            del things[choice % 5 : choice % 5 + 2]

    def do_release(self, _receiver: Any, choice: int) -> None:
        if self.views:
            view, _ = self.views.pop(choice % len(self.views))
            view.release()

    def check(self) -> None:
        """Assert that all held objects have their expected contents, with operations that do not copy packets."""
        assert [packet[:] for packet, _ in self.packets] == [frame for _, frame in self.packets]
        assert [batch.frames() for batch, _ in self.batches] == [frames for _, frames in self.batches]
        assert [bytes(view) for view, _ in self.views] == [frame for _, frame in self.views]


@every_kind
@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 63)), max_size=60),
    vnet=st.booleans(),
    in_ring=st.booleans(),
    eager=st.booleans(),
)
def test_anything_in_any_order(
    kind: Kind, steps: list[tuple[str, int]], vnet: bool, in_ring: bool, eager: bool
) -> None:
    """Held objects show the sent bytes, after receiving, keeping, reading, copying, releasing and dropping in any order."""
    framing = WITH_VNET if vnet else ETHERNET
    holder = Holder(Ring(framing) if in_ring and kind is C else Source(kind, framing))
    holder.step("fill", 6)
    for name, choice in steps:
        holder.step(name, choice)
        holder.check()
        if eager:
            gc.collect(0)
    holder.source.receiver.release()
    holder.source.receiver.copy_held()
    holder.check()
    for packet, frame in holder.packets:
        assert bytes(packet) == frame


def test_the_core_is_what_is_tested() -> None:
    """If the core was built, the public types are those in C."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right, linkrx.open(left) as rx:
        right.send(numbered(1))
        kind = type(rx.recv(10))
    assert kind is linkrx.Packet
    assert (kind.__base__ is object) == (_core.types is not None)
