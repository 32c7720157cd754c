"""Objects of a receive that a program can hold, holders of them, and checks that they do not change.

It uses public names only, so it does not depend on how packets and batches are implemented. The processes that
`test_holding_processes.py` starts use it without pytest.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

import linkrx
from linkrx.testing import rigs
from linkrx.testing.rigs import MakeRig, Rig
from linkrx.testing.waiting import number_of, patiently

SIZE = 1403  # not a multiple of 8, so there is padding between frames
MARKED = 18  # bytes of link header and mark, in front of the bytes that `frame` fills
# BURST frames fit into every queue; RING_BURST frames fill four blocks of a ring. Twelve times as many are more than an arena
# holds, and more than a ring of 32 blocks holds.
BURST, RING_BURST = 60, 400
RING_BYTES = 4 << 20
BURSTS = 12


@dataclass(frozen=True)
class Cell:
    """A kind of source, and a backend that accepts it."""

    kind: MakeRig
    backend: str

    @property
    def name(self) -> str:
        """The name in test IDs."""
        return f"{self.kind.__name__}-{self.backend}"

    @contextmanager
    def opened(self, deliver: Any = None, **options: Any) -> Iterator[tuple[Rig, linkrx.Dispatcher]]:
        """Open a source and a dispatcher on it."""
        with self.kind() as rig, self.open(rig, deliver, **options) as rx:
            yield rig, rx

    def open(self, rig: Rig, deliver: Any = None, **options: Any) -> linkrx.Dispatcher:
        """Open a dispatcher on a source. A ring is small, so that the kernel soon uses its blocks again."""
        if self.backend == "packet_mmap":
            options["receive_buffer"] = RING_BYTES
        return rig.open(self.backend, deliver, **options)


CELLS = tuple(
    Cell(kind, backend)
    for kind, backend in (
        (rigs.unix_dgram, "recvmmsg"),
        (rigs.tap, "readv"),
        (rigs.tap_segment, "readv"),
        (rigs.tun, "os_readv"),
        (rigs.packet, "recvmmsg"),
        (rigs.packet, "packet_mmap"),
        (rigs.interface, "packet_mmap"),
    )
)
NAMED = {cell.name: cell for cell in CELLS}


def frame(rig: Rig, mark: int, size: int = SIZE) -> bytes:
    """A frame whose bytes behind the mark all depend on the mark."""
    return rig.frame(size, mark)[:MARKED] + bytes([mark % 251 + 1]) * (size - MARKED)


def send(rig: Rig, marks: range, size: int = SIZE) -> None:
    """Send a frame for each mark, `burst` frames at most."""
    for mark in marks:
        rig.send(frame(rig, mark, size))


def burst(rx: linkrx.Dispatcher) -> int:
    """How many frames a test may send at once."""
    return RING_BURST if rx.backend == "packet_mmap" else BURST


def receive(rig: Rig, rx: linkrx.Dispatcher, marks: range) -> list[linkrx.Batch]:
    """Send a burst and return its batches. Asserts that every frame is received, or counted as dropped.

    The kernel may drop frames: a ring's timer may close all blocks while the sending thread waits for the processor.
    """
    before = rx.stats().kernel_drops or 0
    batches: list[linkrx.Batch] = []

    def all_there() -> bool:
        lost = (rx.stats().kernel_drops or 0) - before
        return sum(map(len, batches)) + lost == len(marks)

    send(rig, marks)
    for _ in patiently(all_there):
        batches += islice(rx.batches(0.01), 1)
    sent = iter(marks)
    for packet in chain(*batches):
        assert number_of(rig, packet) in sent, "a frame comes twice or out of order"
        assert bytes(packet) == frame(rig, number_of(rig, packet))
    return batches


def lap(rig: Rig, rx: linkrx.Dispatcher) -> None:
    """Receive frames and keep none, so that linkrx uses its memory again."""
    step = burst(rx)
    for first in range(1_000_000, 1_000_000 + BURSTS * step, step):
        receive(rig, rx, range(first, first + step))


# Objects that are held.


@dataclass
class Thing:
    """An object of a receive. `read(held)` must equal `wanted` as long as it is held."""

    name: str
    held: Any
    read: Callable[[Any], object]
    wanted: object

    def wrong(self) -> str | None:
        """The name of this thing if its contents changed, else None."""
        return None if self.read(self.held) == self.wanted else self.name


def _frames_of(batch: linkrx.Batch) -> list[bytes]:
    return [bytes(packet) for packet in batch]


def _columns_of(batch: linkrx.Batch) -> list[list[int]]:
    return [column.tolist() for column in _views_of(batch)]


def _views_of(batch: linkrx.Batch) -> list[memoryview]:
    return [
        batch.starts,
        batch.lengths,
        batch.wire_lengths,
        batch.protocols,
        batch.flags,
        batch.timestamps,
        batch.vlan_tcis,
        batch.vlan_tpids,
    ]


def _lists(columns: list[Any]) -> list[list[int]]:
    return [column.tolist() for column in columns]


def _cut(memory: tuple[memoryview, list[int]]) -> list[bytes]:
    view, starts = memory
    return [bytes(view[start : start + SIZE]) for start in starts]


def _octets(array: Any) -> bytes:
    octets: bytes = array.tobytes()
    return octets


def things_of(batch: linkrx.Batch, frames: list[bytes]) -> list[Thing]:
    """Each object that a user can get from a batch, except arrays."""
    first, last = batch[0], frames[-1]
    columns = _columns_of(batch)
    return [
        Thing("packet by index", batch[0], bytes, frames[0]),
        Thing("packet by iteration", list(batch)[-1], bytes, last),
        Thing("copy of a packet", batch[-1].copy(), bytes, last),
        Thing("batch", batch, _frames_of, frames),
        Thing("columns of a batch", batch, _columns_of, columns),
        Thing("copy of a batch", batch.copy(), _frames_of, frames),
        Thing("columns", _views_of(batch), _lists, columns),
        Thing("memory", (batch.memory, columns[0]), _cut, frames),
        Thing("frame", first.frame, bytes, frames[0]),
        Thing("slice of a slice", batch[-1].frame[20:900][5:300], bytes, last[25:320]),
    ]


def arrays_of(batch: linkrx.Batch, frames: list[bytes]) -> list[Thing]:
    """NumPy arrays over a batch. The cyclic collector does not traverse them, so it does not find cycles through them."""
    return [
        Thing("array of a frame", np.frombuffer(batch[-1].frame, np.uint8)[::3], _octets, frames[-1][::3]),
        Thing("arrays of columns", [np.asarray(one) for one in _views_of(batch)], _lists, _columns_of(batch)),
    ]


Make = Callable[[linkrx.Batch, list[bytes]], list[Thing]]


def take(rig: Rig, rx: linkrx.Dispatcher, make: Make = things_of) -> list[Thing]:
    """The things of one receive. Nothing else of that receive is held."""
    batch = receive(rig, rx, range(burst(rx)))[0]
    return make(batch, [frame(rig, number_of(rig, packet)) for packet in batch])


def wrong(things: list[Thing]) -> list[str]:
    """The names of the things whose contents changed."""
    return [name for thing in things if (name := thing.wrong())]


# Holders. Each returns an object that holds the things. Its finalizer appends the names of changed things to `findings`.

Findings = list[list[str]]
Holder = Callable[[list[Thing], Findings], object]


class Owner:
    """A reference cycle whose finalizer checks the things that it holds."""

    def __init__(self, things: list[Thing], findings: Findings) -> None:
        self.things, self.findings = things, findings
        self.me: Owner | None = self

    def __del__(self) -> None:
        self.findings.append(wrong(self.things))


class Resurrected(Owner):
    """An object that its finalizer resurrects. `collected` checks its things afterwards."""

    back: list[Resurrected] = []  # noqa: RUF012

    def __del__(self) -> None:
        self.back.append(self)


def cycle(things: list[Thing], findings: Findings) -> object:
    """A reference cycle with a finalizer."""
    return Owner(things, findings)


def resurrection(things: list[Thing], findings: Findings) -> object:
    """An object that its finalizer resurrects."""
    return Resurrected(things, findings)


def generator(things: list[Thing], findings: Findings) -> object:
    """A suspended generator in a cycle with itself."""

    def work(things: list[Thing], findings: Findings, box: list[object]) -> Iterator[None]:
        try:
            yield
        finally:
            findings.append(wrong(things))

    box: list[object] = []
    suspended = work(things, findings, box)
    next(suspended)
    box.append(suspended)
    return box


def task(things: list[Thing], findings: Findings) -> object:
    """A pending task of a loop that was closed."""

    async def wait(things: list[Thing], findings: Findings, future: asyncio.Future[None]) -> None:
        try:
            await future
        finally:
            findings.append(wrong(things))

    async def begin() -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        pending = loop.create_task(wait(things, findings, loop.create_future()))
        await asyncio.sleep(0)
        return pending

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # else it logs that a task was destroyed
    try:
        return loop.run_until_complete(begin())
    finally:
        loop.close()


def traceback(things: list[Thing], findings: Findings) -> object:
    """An exception in a cycle with its own frame, which also holds an object with a finalizer."""

    def fail(owner: Owner) -> BaseException:
        try:
            raise LookupError
        except LookupError as error:
            kept = error
        return kept

    return fail(Owner(things, findings))


HOLDERS: dict[str, Holder] = {
    holder.__name__: holder for holder in (cycle, resurrection, generator, task, traceback)
}


def collected(findings: dict[str, Findings]) -> dict[str, list[str]]:
    """Collect all garbage. Returns the changed things that the finalizer of each holder found."""
    gc.collect()
    while Resurrected.back:
        one = Resurrected.back.pop()
        one.findings.append(wrong(one.things))
        one.me = None
    gc.collect()
    Resurrected.back.clear()
    assert all(findings.values()), f"some finalizers did not run: {findings}"
    return {name: list(chain(*found)) for name, found in findings.items() if any(found)}


@contextmanager
def collector(eager: bool) -> Iterator[None]:
    """Run the cyclic collector at every allocation, or never."""
    before = gc.get_threshold()
    gc.set_threshold(1 if eager else 0)
    try:
        yield
    finally:
        gc.set_threshold(*before)


needs_core = pytest.mark.skipif(
    not linkrx.backends()[0].supported, reason="the C core was not built, so this backend does not exist"
)


def cells(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with the named cells, or with all cells."""
    chosen = [NAMED[name] for name in names] or CELLS
    needs = {cell: () if cell.backend == "os_readv" else needs_core for cell in chosen}
    return pytest.mark.parametrize(
        "cell", [pytest.param(cell, id=cell.name, marks=needs[cell]) for cell in chosen]
    )
