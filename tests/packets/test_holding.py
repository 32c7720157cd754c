"""Held objects do not change: with any holder, after their memory is used again, after `close()` and at collection."""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import pytest
from support.holding import (
    BURST,
    HOLDERS,
    Cell,
    Findings,
    Make,
    arrays_of,
    cells,
    collected,
    collector,
    frame,
    lap,
    receive,
    send,
    take,
    things_of,
    wrong,
)

import linkrx
from linkrx.testing.waiting import PATIENCE, number_of, running

SECRET = 200  # the mark of frames whose bytes must not appear in a later batch

pytestmark = pytest.mark.usefixtures("devices")

EVERY_CELL = cells()


@EVERY_CELL
@pytest.mark.parametrize(
    ("make", "eager"),
    [
        pytest.param(things_of, True, id="collected at once"),
        pytest.param(things_of, False, id="collected late"),
        pytest.param(arrays_of, False, id="arrays"),
    ],
)
def test_held_across_laps_and_close(cell: Cell, make: Make, eager: bool) -> None:
    """Packets, batches, columns, views and arrays show the sent bytes when their holder is collected."""
    findings: dict[str, Findings] = {name: [] for name in HOLDERS}
    with collector(eager):
        with cell.opened() as (rig, rx):
            things = {name: take(rig, rx, make) for name in HOLDERS}
            keepers = [HOLDERS[name](things[name], findings[name]) for name in HOLDERS]
            lap(rig, rx)
            assert [wrong(those) for those in things.values()] == [[]] * len(HOLDERS)
            things.clear()
            if eager:
                keepers.clear()
                assert collected(findings) == {}
        if not eager:
            assert not any(findings.values())
            keepers.clear()
            assert collected(findings) == {}


# All calls that receive. Each receives the packets of a burst.


def by_dispatch(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    while len(got) < BURST:
        assert rx.dispatch(PATIENCE)


def by_drain(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(rx.fileno(), selectors.EVENT_READ)
        while len(got) < BURST:
            assert selector.select(PATIENCE)
            rx.drain()


def by_recv(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    while len(got) < BURST:
        got.append(rx.recv(PATIENCE))


def by_iteration(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    for packet in rx:
        got.append(packet)
        if len(got) == BURST:
            break


def by_batches(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    for batch in rx.batches(PATIENCE):
        got.extend(batch)
        if len(got) == BURST:
            break


def by_awaiting(rx: linkrx.Dispatcher, got: list[linkrx.Packet]) -> None:
    async def work() -> None:
        async for packet in rx:
            got.append(packet)
            if len(got) == BURST:
                break

    asyncio.run(work())


WAYS = (by_dispatch, by_drain, by_recv, by_iteration, by_batches, by_awaiting)


def receive_in_every_way(cell: Cell, during: Callable[[], AbstractContextManager[None]]) -> None:
    """Keep some packets of each call over laps and close, and check them. `during` is the context of the calls."""
    got: list[linkrx.Packet] = []
    kept: list[tuple[bytes, linkrx.Packet]] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
        got.append(packet)

    with cell.opened(deliver, batch_size=16) as (rig, rx):
        for turn, way in enumerate(WAYS):
            marks = range(1000 * turn, 1000 * turn + BURST)
            send(rig, marks)
            with during():
                way(rx, got)
            assert [number_of(rig, packet) for packet in got] == list(marks)
            for index, mark in enumerate(marks):
                if index % 3 == 1 or index > 30:
                    kept.append((frame(rig, mark), got[index]))
            got.clear()
        lap(rig, rx)
    assert [bytes(packet) for _, packet in kept] == [sent for sent, _ in kept]


@EVERY_CELL
def test_held_in_every_way_to_receive(cell: Cell) -> None:
    """Kept packets show the sent bytes, for all calls that receive, and with other packets not kept."""
    receive_in_every_way(cell, nullcontext)


@EVERY_CELL
@pytest.mark.parametrize("hook", ["settrace", "setprofile"])
def test_held_by_a_tracer(cell: Cell, hook: str) -> None:
    """Frames and packets that a tracer or a profiler keeps show the sent bytes."""
    frames: list[FrameType] = []
    found: list[tuple[bytes, linkrx.Packet]] = []
    counted = 0

    def look(entered: FrameType, _event: str, _argument: object) -> Any:
        nonlocal counted
        frames.append(entered)
        values = list(entered.f_locals.values())
        packet = next((value for value in values if isinstance(value, linkrx.Packet)), None)
        # Inside linkrx, a packet object that was not returned yet may still be reused.
        if packet is not None and entered.f_code.co_filename == __file__:
            counted += 1
            if counted % 5 == 0:
                found.append((bytes(packet), packet))
        return look

    @contextmanager
    def looking() -> Iterator[None]:
        before = sys.gettrace() if hook == "settrace" else sys.getprofile()
        getattr(sys, hook)(look)
        try:
            yield
        finally:
            getattr(sys, hook)(before)

    with collector(eager=False):
        receive_in_every_way(cell, looking)
        assert len(found) > len(WAYS)
        assert [bytes(packet) for _, packet in found] == [shown for shown, _ in found]
        frames.clear()


@contextmanager
def taking_turns() -> Iterator[None]:
    """Set the switch interval to a tenth of a millisecond instead of five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@EVERY_CELL
def test_a_thread_that_reads_meanwhile(cell: Cell) -> None:
    """Objects that another thread holds show the sent bytes at any time, while this thread receives."""
    over = threading.Event()
    given: SimpleQueue[tuple[int, linkrx.Packet]] = SimpleQueue()
    failures: list[object] = []
    turns = 0
    with taking_turns(), cell.opened(batch_size=16) as (rig, rx):
        things = take(rig, rx)

        def read() -> None:
            nonlocal turns
            late: list[tuple[int, linkrx.Packet]] = []
            while not over.is_set() or not given.empty():
                turns += 1
                failures.extend(wrong(things))
                with suppress(Empty):
                    late.append(given.get_nowait())
                if len(late) == 7:
                    failures.extend(mark for mark, packet in late if bytes(packet) != frame(rig, mark))
                    late.clear()

        with running(read):
            try:
                for first in range(0, 5 * BURST, BURST):
                    for packet in chain(*receive(rig, rx, range(first, first + BURST))):
                        given.put((number_of(rig, packet), packet))
                lap(rig, rx)
            finally:
                over.set()
    assert turns > 0
    assert failures == []


@EVERY_CELL
def test_held_by_a_greenlet(cell: Cell) -> None:
    """Objects on the stack of a suspended greenlet show the sent bytes."""
    greenlet: Any = pytest.importorskip("greenlet", reason="needs greenlet, which is not installed")
    with cell.opened() as (rig, rx):
        found: list[list[str]] = []

        def work() -> None:
            things = take(rig, rx)
            greenlet.getcurrent().parent.switch()
            found.append(wrong(things))

        suspended = greenlet.greenlet(work)
        suspended.switch()
        lap(rig, rx)
        suspended.switch()
    assert found == [[]]


@EVERY_CELL
def test_memory_shows_frames_of_this_batch_only(cell: Cell) -> None:
    """The memory of a batch has no bytes of an earlier batch, between its frames or behind them."""
    with cell.opened() as (rig, rx):
        secret = frame(rig, SECRET)[-1]
        for _ in range(4):  # for each arena
            receive(rig, rx, range(SECRET, SECRET + 251 * BURST, 251))
        send(rig, range(20), 61)
        batch = next(rx.batches(PATIENCE))
        assert [bytes(packet) for packet in batch] == [frame(rig, mark, 61) for mark in range(len(batch))]
        assert secret not in bytes(batch.memory)
