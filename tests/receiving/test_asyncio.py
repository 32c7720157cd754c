"""Iteration over a running event loop: asyncio's own and uvloop, and foreign loops that poll."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import linkrx
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.waiting import running, until

uvloop: Any
try:
    import uvloop
except ImportError:  # it has no build for this Python
    uvloop = None
else:
    uvloop.new_event_loop().close()  # with its first loop it opens a pipe for signals, and keeps it

HEADER = LOCAL + REMOTE + b"\x08\x00"

Run = Callable[[Awaitable[None]], None]


def uvloop_run(work: Awaitable[None]) -> None:
    """Run under uvloop."""
    if uvloop is None:
        pytest.skip("uvloop is not installed")
    uvloop.run(work)


def asyncio_run(work: Awaitable[None]) -> None:
    """Run under asyncio's default loop."""
    asyncio.run(work)  # type: ignore[arg-type]


@pytest.fixture(params=[asyncio_run, uvloop_run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Both loops."""
    chosen: Run = request.param
    return chosen


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Receiver and sender."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, sender:
        yield receiver, sender


def test_packets(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """`async for packet in rx` gives every packet in order, waits for those that come later, and ends at EOF."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:
            for number in range(100):
                sender.send(HEADER + bytes([number]))

            def finish() -> None:
                sender.send(HEADER + b"\x64")
                sender.close()

            asyncio.get_running_loop().call_later(0.01, finish)
            assert [packet.data[0] async for packet in rx] == list(range(101))
            assert rx.end is linkrx.End.EOF

    run(work())


def test_batches(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """`async for batch in rx.batches(timeout)` gives batches and ends after the timeout."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver, batch_size=8) as rx:
            for _ in range(20):
                sender.send(HEADER)
            assert [len(batch) async for batch in rx.batches(0.02)] == [8, 8, 4]
            assert rx.end is None

    run(work())


def test_bounded_work_per_wake_up(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """Under a flood other tasks get their turn after every batch."""

    async def work() -> None:
        receiver, sender = ends
        turns = 0
        received = 0

        async def other() -> None:
            nonlocal turns
            while received < 200:
                turns += 1
                await asyncio.sleep(0)

        with linkrx.open(receiver, batch_size=10) as rx:
            for _ in range(200):
                sender.send(HEADER)
            task = asyncio.ensure_future(other())
            async for _ in rx:
                received += 1
                if received == 200:
                    break
            await task
            assert turns >= 20

    run(work())


def test_stop_and_cancel(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """stop() ends an iteration that waits; cancelling its task leaves the dispatcher usable and no reader behind."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:

            async def consume() -> int:
                return len([packet async for packet in rx])

            cancelled = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert asyncio.get_running_loop().remove_reader(rx.fileno()) is not True
            sender.send(HEADER)
            stopped = asyncio.ensure_future(consume())
            await asyncio.sleep(0.01)
            rx.stop()
            assert await stopped == 1
            assert rx.end is linkrx.End.STOPPED

    run(work())


def test_breaking_out_keeps_the_rest(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """Packets behind a break out of `async for` come first in the next iteration."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:
            for number in range(10):
                sender.send(HEADER + bytes([number]))
            first = []
            async for packet in rx:
                first.append(packet.data[0])
                if len(first) == 3:
                    break
            sender.close()
            assert first + [packet.data[0] async for packet in rx] == list(range(10))

    run(work())


def test_close_wakes_the_task_that_waits(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """A task that waits in `async for` when another closes the dispatcher gets Closed, and leaves no reader."""

    async def work() -> None:
        rx = linkrx.open(ends[0])

        async def consume() -> None:
            async for _ in rx:
                pass

        task = asyncio.ensure_future(consume())
        await asyncio.sleep(0)
        descriptor = rx.fileno()
        rx.close()
        assert asyncio.get_running_loop().remove_reader(descriptor) is not True
        with pytest.raises(linkrx.Closed):
            await asyncio.wait_for(task, 10)

    run(work())


def test_a_second_task_gets_a_clear_error(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """While one task waits for packets, another that wants some gets Busy, and the first goes on undisturbed."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:

            async def consume() -> list[int]:
                return [packet.data[0] async for packet in rx]

            first = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            with pytest.raises(linkrx.Busy, match="another task"):
                await consume()
            with pytest.raises(linkrx.Busy, match="another task"):
                await rx.batches().__anext__()
            sender.send(HEADER + b"\x07")
            sender.close()
            assert await first == [7]

    run(work())


def test_close_from_outside_a_running_loop_is_refused(
    run: Run, ends: tuple[socket.socket, socket.socket]
) -> None:
    """close() in one thread while a task waits in another thread's loop raises Busy; stop() is what ends it."""
    with linkrx.open(ends[0]) as rx:

        async def work() -> None:
            assert [packet async for packet in rx] == []

        with running(lambda: run(work())):
            until(lambda: rx._reader is not None and rx._reader._waiter is not None)
            with pytest.raises(linkrx.Busy, match=r"stop\(\)"):
                rx.close()
            rx.stop()
