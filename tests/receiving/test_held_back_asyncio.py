"""`latency` under asyncio."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import Awaitable, Callable

import pytest
from support.latency import held_back
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx
from linkrx.testing.waiting import PATIENCE, patiently

ROWS = 6


def given(rx: linkrx.Dispatcher, way: str, count: int) -> Callable[[], Awaitable[list[int]]]:
    """A function that receives `count` packets by `async for`, in that way."""

    async def receive() -> list[int]:
        got: list[int] = []
        if way == "packets":
            packets = aiter(rx)
            while len(got) < count:
                got.append(number_of(await anext(packets)))
        else:
            got += map(number_of, await anext(rx.batches()))
        return got

    return receive


async def turns(condition: Callable[[], object]) -> None:
    """Let other tasks and the receiving loop run until the condition holds."""
    for _ in patiently(condition):
        await asyncio.sleep(0)


@pytest.mark.parametrize("way", ["packets", "batches"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_holds_back(backend: str, way: str) -> None:
    """Under asyncio packets that come one by one are held back until they are a full batch, also twice."""

    async def work() -> None:
        with (
            pair() as (receiver, sender),
            linkrx.open(receiver, backend=backend, latency=1e6, batch_size=ROWS) as rx,
        ):
            for _ in range(2):
                task = asyncio.ensure_future(given(rx, way, ROWS)())
                await turns(lambda: rx._reader is not None and rx._reader._registered is not None)
                for number in range(ROWS):
                    sender.send(frame(number))
                    if number < ROWS - 1:
                        await turns(lambda number=number: held_back(rx) == number + 1)  # type: ignore[misc]
                assert await asyncio.wait_for(task, PATIENCE) == list(range(ROWS))
            assert rx.stats().batches == 2

    asyncio.run(work())


@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_delivers_after_a_cancellation(backend: str) -> None:
    """If a task is cancelled while packets are held back, or its timeout is over, the next one gets them at once."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:
            task = asyncio.ensure_future(given(rx, "packets", 4)())
            await asyncio.sleep(0)
            for number in range(3):
                sender.send(frame(number))
            await turns(lambda: held_back(rx) == 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            sender.send(frame(3))
            assert await asyncio.wait_for(given(rx, "packets", 4)(), PATIENCE) == [0, 1, 2, 3]
            assert rx.stats().batches == 1

    asyncio.run(work())


@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_delivers_at_the_timeout(backend: str) -> None:
    """Under asyncio a batch that is held back is delivered when the timeout is over."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:
            task = asyncio.ensure_future(anext(rx.batches(PATIENCE)))
            sender.send(frame(0))
            await turns(lambda: held_back(rx) == 1)
            assert rx._reader is not None
            rx._reader._settle()  # as the timer of the timeout
            assert [number_of(packet) for packet in await task] == [0]

    asyncio.run(work())


@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_delivers_at_a_timeout_before_the_first_read(backend: str) -> None:
    """Under asyncio the end of a timeout delivers a packet that has come, also if it was not read yet."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:
            task = asyncio.ensure_future(anext(rx.batches(PATIENCE)))
            await asyncio.sleep(0)
            assert rx._reader is not None
            sender.send(frame(0))
            await turns(lambda: rx._reader is not None and rx._reader.holds)
            rx._reader._settle()  # as the timer of the timeout
            assert [number_of(packet) for packet in await task] == [0]

    asyncio.run(work())


@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_timeouts_shorter_than_the_time_to_the_first_read(backend: str) -> None:
    """Under asyncio repeated iterations with a timeout of microseconds receive what comes."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:
            got: list[int] = []
            sender.send(frame(0))
            for _ in patiently(got.__len__):
                got += [number_of(packet) async for batch in rx.batches(1e-5) for packet in batch]
            assert got == [0]

    asyncio.run(work())


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_closes(backend: str, held: int) -> None:
    """Under asyncio close() ends an iteration over batches, whether packets are held back or not. The loop then forgets the dispatcher."""

    async def work() -> None:
        with pair() as (receiver, sender):
            closed = await close(receiver, sender)
            gc.collect()
            assert closed() is None

    async def close(receiver: socket.socket, sender: socket.socket) -> weakref.ref[linkrx.Dispatcher]:
        rx = linkrx.open(receiver, backend=backend, latency=1e6)
        task = asyncio.ensure_future(anext(rx.batches(), None))
        await asyncio.sleep(0)
        for number in range(held):
            sender.send(frame(number))
        await turns(lambda: held_back(rx) == held)
        rx.close()
        assert await asyncio.wait_for(task, PATIENCE) is None
        return weakref.ref(rx)

    asyncio.run(work())


@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_forgets_a_cancelled_task(backend: str) -> None:
    """If a task is cancelled while packets are held back, the loop has no timer for it any more."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:
            task = asyncio.ensure_future(given(rx, "packets", 2)())
            await asyncio.sleep(0)
            sender.send(frame(0))
            await turns(lambda: held_back(rx) == 1)
            task.cancel()
            await asyncio.wait([task])
            assert rx._reader is not None
            assert (rx._reader._holding, rx._reader._registered) == (None, None)

    asyncio.run(work())


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_stops(backend: str, flush: bool) -> None:
    """Under asyncio a stop() ends the wait. With flush=True what was held back is delivered, else it is counted as undelivered."""

    async def work() -> None:
        with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e6) as rx:

            async def receive() -> list[int]:
                return [number_of(packet) async for packet in rx]

            task = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            for number in range(3):
                sender.send(frame(number))
            await turns(lambda: held_back(rx) == 3)
            rx.stop(flush=flush)
            got = await asyncio.wait_for(task, PATIENCE)
            assert got == ([0, 1, 2] if flush else [])
            assert rx.stats().undelivered == 3 - len(got)

    asyncio.run(work())


def test_asyncio_sleeps_beside_a_quiet_source() -> None:
    """While packets are held back and no more come, the event loop is not woken up."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with pair() as (receiver, sender), linkrx.open(receiver, latency=1e6) as rx:
            task = asyncio.ensure_future(given(rx, "packets", 1)())
            await asyncio.sleep(0)
            sender.send(frame(0))
            reader = rx._reader
            assert reader is not None
            await turns(lambda: held_back(rx) == 1 and reader._registered is not None)
            assert reader._holding is not None
            assert reader._holding.when() > loop.time() + 1e5
            rx.stop()
            with pytest.raises(StopAsyncIteration):
                await task

    asyncio.run(work())
