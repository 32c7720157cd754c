"""The lifetime rule: what is held stays true, and memory that nobody holds is used again."""

from __future__ import annotations

import gc
import mmap
import socket
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import linkrx
from linkrx import arena as arena_module
from linkrx.arena import START, Arena, Arenas
from linkrx.capabilities import LARGEST_TUN_FRAME
from linkrx.columns import ROW_BYTES, align

counts_exact = pytest.mark.skipif(
    not arena_module.REFERENCE_COUNTS_ARE_EXACT,
    reason="reference counts are not exact on this interpreter, so no memory is used again",
)

ROWS = 64
FRAME = 1514
MIB = 1 << 20


class Taken(NamedTuple):
    """Where a receive was put."""

    arena: Arena
    start: int
    view: memoryview


class Place(NamedTuple):
    """The same without anything that holds the memory."""

    arena: int
    start: int


def take(arenas: Arenas, used: int = 4096) -> Taken:
    """Receive `used` bytes, table included, as the dispatcher does."""
    arena = arenas.next()
    start = arena.cursor
    view = memoryview(arena.memory)[start : start + used].toreadonly()
    arena.cursor = align(start + used)
    return Taken(arena, start, view)


def place(arenas: Arenas, used: int = 4096) -> Place:
    """Receive `used` bytes and hold nothing of them."""
    taken = take(arenas, used)
    return Place(id(taken.arena), taken.start)


# What uses memory again, and what does not.


@counts_exact
def test_nothing_held() -> None:
    """With nothing held every receive uses the same arena from its front."""
    arenas = Arenas(FRAME, ROWS)
    assert len({place(arenas) for _ in range(50)}) == 1
    assert place(arenas).start == START


@counts_exact
def test_loop_variable() -> None:
    """A consumer that holds only the latest receive alternates between two arenas, each from its front."""
    arenas = Arenas(FRAME, ROWS)
    latest = take(arenas)
    places = []
    for _ in range(20):
        latest = take(arenas)
        places.append(Place(id(latest.arena), latest.start))
    assert places[0] != places[1]
    assert places == places[:2] * 10
    assert {found.start for found in places} == {START}


@counts_exact
def test_the_second_arena_is_made_only_when_needed() -> None:
    """With nothing held there is one arena; the first receive while something is held makes the second."""
    arenas = Arenas(FRAME, ROWS)
    first = take(arenas).arena
    assert take(arenas).arena is first
    assert arenas._spare is None
    held = memoryview(first.memory)[:10]
    assert take(arenas).arena is not first
    assert bytes(held) == bytes(10)


def held_directly(view: memoryview) -> object:
    """The view itself."""
    return view


def held_by_a_slice_of_a_slice(view: memoryview) -> object:
    """A byte of a part."""
    return view[100:200][5:6]


def held_by_an_array(view: memoryview) -> object:
    """A numpy array over it."""
    return np.frombuffer(view, dtype=np.uint32)


def held_by_a_slice_of_an_array(view: memoryview) -> object:
    """Every other element of such an array."""
    return np.frombuffer(view, dtype=np.uint8)[10:20:2]


def held_by_a_cast(view: memoryview) -> object:
    """The same memory in another format."""
    return view.cast("I")


def held_by_another_memoryview(view: memoryview) -> object:
    """A view of the view."""
    return memoryview(view)


def held_in_a_cycle(view: memoryview) -> object:
    """A list that holds itself as well."""
    cycle: list[object] = [view]
    cycle.append(cycle)
    return cycle


HOLDERS: tuple[Callable[[memoryview], object], ...] = (
    held_directly,
    held_by_a_slice_of_a_slice,
    held_by_an_array,
    held_by_a_slice_of_an_array,
    held_by_a_cast,
    held_by_another_memoryview,
    held_in_a_cycle,
)


@counts_exact
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_counts_as_holding(holder: Callable[[memoryview], object]) -> None:
    """Whatever is made of a view holds its arena until it is let go, and from then on not."""
    arena = Arena(65536)
    arena.cursor = START + 8
    view = memoryview(arena.memory)[:4096].toreadonly()
    held = [holder(view)]
    del view
    assert not arena.reclaim()
    assert arena.cursor == START + 8
    held.clear()
    gc.collect()
    assert arena.reclaim()
    assert arena.cursor == START


@counts_exact
def test_an_arena_that_is_held_is_filled_onward() -> None:
    """Kept receives lie behind one another in an arena until the largest packet might not fit any more."""
    arenas = Arenas(FRAME, ROWS)
    kept = [take(arenas) for _ in range(1000)]
    spans: dict[int, list[int]] = {}
    for taken in kept:
        spans.setdefault(id(taken.arena), []).append(taken.start)
    for starts in spans.values():
        assert sorted(starts) == [START + 4096 * index for index in range(len(starts))]
    full = (kept[0].arena.limit - START - arenas.largest) // 4096 + 1
    assert sorted(map(len, spans.values()), reverse=True)[:-2] == [full] * (len(spans) - 2)


@counts_exact
def test_letting_go_goes_back_to_the_front() -> None:
    """When everything kept is let go, reception goes back to the arenas it has and to their fronts."""
    arenas = Arenas(FRAME, ROWS)
    kept = [take(arenas) for _ in range(300)]
    kept.clear()
    assert len({place(arenas) for _ in range(10)}) == 1
    assert place(arenas).start == START


@counts_exact
def test_an_old_packet_does_not_stop_the_rest() -> None:
    """With one receive kept for ever, all others that are let go share the other arena's front."""
    arenas = Arenas(FRAME, ROWS)
    old = take(arenas)
    places = {place(arenas) for _ in range(50)}
    assert len(places) == 1
    assert places.pop().arena != id(old.arena)


def test_counts_that_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where counts are not to be trusted no byte of any arena is used twice, held or not."""
    monkeypatch.setattr(arena_module, "REFERENCE_COUNTS_ARE_EXACT", False)
    arenas = Arenas(FRAME, ROWS)
    used = [take(arenas)[:2] for _ in range(600)]  # the arenas stay, so that no address comes back
    spans = sorted((id(arena), start) for arena, start in used)
    assert len(set(spans)) == 600
    for (arena, start), (following, next_start) in pairwise(spans):
        assert arena != following or next_start - start >= 4096


# What it costs to keep.


def test_one_packet_pins_less_than_a_megabyte() -> None:
    """An arena for the largest TAP frames and batches is smaller than a megabyte."""
    assert len(Arenas(LARGEST_TUN_FRAME, linkrx.options.BATCH_SIZE_MAX).next().memory) < MIB


@counts_exact
def test_kept_memory_is_freed_when_let_go() -> None:
    """Of the arenas that were kept only the two in use outlive their holders."""
    arenas = Arenas(FRAME, ROWS)
    kept = [take(arenas) for _ in range(1000)]
    memories = {id(taken.arena.memory): weakref.ref(taken.arena.memory) for taken in kept}
    assert len(memories) > 5
    assert all(memory() is not None for memory in memories.values())
    kept.clear()
    assert sum(memory() is not None for memory in memories.values()) <= 2


@counts_exact
def test_arenas_that_are_used_up_and_let_go_are_freed_one_by_one() -> None:
    """Letting go of what was kept in one arena frees that arena, while the others stay."""
    arenas = Arenas(FRAME, ROWS)
    by_arena: dict[int, list[Taken]] = {}
    memories: dict[int, weakref.ref[mmap.mmap]] = {}
    for _ in range(1000):
        taken = take(arenas)
        by_arena.setdefault(id(taken.arena), []).append(taken)
        memories[id(taken.arena)] = weakref.ref(taken.arena.memory)
    del taken
    in_use = {id(arenas._current), id(arenas._spare)}
    for number in [number for number in by_arena if number not in in_use]:
        assert memories[number]() is not None
        del by_arena[number]
        assert memories[number]() is None


# Any pattern of keeping.


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 700),
    rows=st.integers(1, 40),
    exact=st.booleans(),
    steps=st.lists(
        st.tuples(st.floats(0, 1), st.booleans(), st.lists(st.integers(0, 100), max_size=3)), max_size=60
    ),
)
def test_nothing_held_is_ever_written(
    capacity: int, rows: int, exact: bool, steps: list[tuple[float, bool, list[int]]]
) -> None:
    """Under any pattern of keeping there is room, and what is kept survives a backend that writes all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_module, "ARENA_BYTES", mmap.PAGESIZE)
        patch.setattr(
            arena_module,
            "REFERENCE_COUNTS_ARE_EXACT",
            exact and arena_module.REFERENCE_COUNTS_ARE_EXACT,
        )
        arenas = Arenas(capacity, rows)
        kept: list[tuple[int, memoryview]] = []
        for number, (part, keep, dropped) in enumerate(steps):
            mark = number % 251 + 1
            arena = arenas.next()
            room = arena.limit - arena.cursor
            # One byte more than is kept shows whether a packet was cut.
            assert room >= capacity + 1
            start = arena.cursor
            assert start % 8 == 0
            assert start + room + ROW_BYTES * rows <= len(arena.memory)
            arena.view[start:] = bytes([mark]) * (len(arena.memory) - start)
            used = max(1, int(part * room)) + ROW_BYTES * rows
            view = memoryview(arena.memory)[start : start + used].toreadonly()
            arena.cursor = align(start + used)
            if keep:
                kept.append((mark, view))
            del view
            for index in dropped:
                if index < len(kept):
                    del kept[index]
            for held_mark, held in kept:
                assert held[0] == held[-1] == held_mark
        for held_mark, held in kept:
            assert bytes(held) == bytes([held_mark]) * len(held)


# Through a dispatcher.

BURST = 200  # messages of 64 bytes that the default send buffer of a socket takes


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected datagram sockets: the receiving and the sending end."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        yield receiver, sender


Pair = tuple[socket.socket, socket.socket]


def small_frame(mark: int) -> bytes:
    """64 bytes of Ethernet with a number in it."""
    return bytes(12) + b"\x88\xb5" + mark.to_bytes(8, "big") * 6 + bytes(2)


@counts_exact
def test_consumer_that_keeps_nothing(pair: Pair) -> None:
    """Delivering packets that nobody keeps goes through one arena, or two while a batch is held."""
    receiver, sender = pair
    seen: dict[int, weakref.ref[Any]] = {}
    with linkrx.open(receiver) as rx:
        for turn in range(100):
            for mark in range(20):
                sender.send(small_frame(20 * turn + mark))
            batch = next(rx.batches(10))
            assert bytes(batch[0]) == small_frame(20 * turn)
            seen[id(batch.memory.obj)] = weakref.ref(batch.memory.obj)
    assert len(seen) <= 2


def keep_all(pair: Pair, number: int, deliver: bool) -> tuple[list[linkrx.Packet], int]:
    """That many packets of 64 bytes, kept, and what Python allocated meanwhile."""
    receiver, sender = pair
    kept: list[linkrx.Packet] = []
    sent = 0

    def take_it(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        kept.append(packet)

    with linkrx.open(receiver, take_it) as rx:
        gc.collect()
        tracemalloc.start()
        try:
            while sent < number:
                for mark in range(sent, min(number, sent + BURST)):
                    sender.send(small_frame(mark))
                    sent += 1
                while len(kept) < sent:
                    if deliver:
                        assert rx.dispatch(10)
                    else:
                        kept.extend(next(rx.batches(10)))
            allocated, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return kept, allocated


@counts_exact
@pytest.mark.parametrize("deliver", [False, True], ids=["batches", "deliver"])
def test_keeping_small_packets(pair: Pair, deliver: bool) -> None:
    """100,000 kept packets of 64 bytes cost at most three times what bytes objects of them would, arenas included."""
    number = 100_000
    kept, allocated = keep_all(pair, number, deliver)
    arenas = {id(packet._batch.memory.obj): memoryview(packet._batch.memory.obj) for packet in kept}
    mapped = sum(memory.nbytes for memory in arenas.values())
    each = (allocated + mapped) / number
    assert each <= 3 * sys.getsizeof(bytes(64)), f"{allocated / number} allocated, {mapped / number} mapped"
    some = range(0, number, 997)
    assert [bytes(kept[mark]) for mark in some] == [small_frame(mark) for mark in some]


def allocated_per(count: int, make: Callable[[], object]) -> float:
    """Bytes that Python allocates for each of `count` objects that are kept."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = [make() for _ in range(count)]
        taken: float = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    del kept
    return taken


def test_packets_that_come_one_by_one_stay_cheap() -> None:
    """A kept packet that came alone in its batch takes at most three times what its bytes would, its arena aside."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver) as rx:

        def one() -> linkrx.Packet:
            sender.send(bytes(64))
            return rx.recv(10)

        assert allocated_per(5_000, one) <= 3 * sys.getsizeof(bytes(64))


def test_copies_stay_cheap() -> None:
    """A copy of a packet takes at most four times what its bytes would: it brings a batch of its own."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver) as rx:
        sender.send(bytes(64))
        packet = rx.recv(10)
        assert allocated_per(5_000, packet.copy) <= 4 * sys.getsizeof(bytes(64))


@counts_exact
def test_what_is_kept_for_ever_costs_its_own_arena_and_no_more() -> None:
    """With one batch kept, a consumer that keeps nothing else but its loop variable alternates between two arenas again."""
    arenas = Arenas(1000, 10)
    seen: list[Arena] = []
    kept: list[memoryview] = []
    loop_variable: memoryview | None = None
    for turn in range(30):
        current = arenas.next()
        if not any(current is one for one in seen):
            seen.append(current)
        loop_variable = memoryview(current.memory)[:1]
        current.cursor = current.limit
        if turn in (3, 8):
            kept.append(loop_variable)
    assert len(seen) == 4
