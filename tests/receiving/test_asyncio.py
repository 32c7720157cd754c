"""Iteration over a running event loop: asyncio's own and uvloop, and foreign loops that poll."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import linkrx
from linkrx.receiving import aio
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
            assert turns >= 19  # between twenty batches

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


def test_a_packet_that_is_waited_for_in_vain(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """wait_for(anext(packets)) that runs out, again and again, loses nothing of what comes afterwards, and leaves no reader."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:
            packets = aiter(rx)
            for number in range(10):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(packets), 0.001)
                assert asyncio.get_running_loop().remove_reader(rx.fileno()) is not True
                sender.send(HEADER + bytes([number]))
                assert (await asyncio.wait_for(anext(packets), 10)).data[0] == number

    run(work())


def test_cancelled_in_the_turn_in_which_it_would_go_on(
    run: Run, ends: tuple[socket.socket, socket.socket]
) -> None:
    """A task that is cancelled while packets wait already is cancelled, and the next one gets them all, in order."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver, batch_size=2) as rx:
            for number in range(6):
                sender.send(HEADER + bytes([number]))

            async def consume() -> None:
                await anext(aiter(rx))
                got.append(0)
                raise AssertionError("it was cancelled")

            got: list[int] = []
            task = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not got
            async for packet in rx:
                got.append(packet.data[0])
                if len(got) == 6:
                    break
            assert got == list(range(6))

    run(work())


def test_an_error_reaches_the_task_that_waits(
    run: Run, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in a receive that the event loop makes is raised in the task, which may go on afterwards."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver, backend="os_readv") as rx:
            packets = aiter(rx)
            task = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            with monkeypatch.context() as patch:
                patch.setattr(rx._mechanism, "fill", lambda *_: 1 // 0)
                sender.send(HEADER + b"\x07")
                with pytest.raises(ZeroDivisionError):
                    await task
            assert (await anext(packets)).data[0] == 7

    run(work())


def test_an_iterator_in_another_event_loop(ends: tuple[socket.socket, socket.socket]) -> None:
    """An asynchronous iterator that was used in one event loop goes on in the next one."""
    receiver, sender = ends
    with linkrx.open(receiver) as rx:
        packets = aiter(rx)

        async def one() -> int:
            task = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            sender.send(HEADER + b"\x07")
            return (await task).data[0]

        assert [asyncio.run(one()) for _ in range(3)] == [7, 7, 7]


def test_hostile_use_of_an_iterator(ends: tuple[socket.socket, socket.socket]) -> None:
    """What is for asyncio alone may be called by anybody in any order: it says so, or does nothing."""
    with linkrx.open(ends[0]) as rx:
        packets: Any = aiter(rx)
        for wrong in (3, None, object()):
            with pytest.raises((TypeError, AttributeError)):
                type(packets)(wrong).__anext__().__await__().send(None)
        with pytest.raises(RuntimeError, match="no running event loop"):
            packets.__anext__().__await__().__next__()
        loop: Any = asyncio.new_event_loop()
        waiter: Any = aio.Waiter(rx, loop)
        assert waiter.get_loop() is loop
        assert not waiter.done()
        waiter.settle_at_once(True)
        assert waiter.done()
        assert waiter.result() is True
        assert not waiter.cancel()
        waiter.add_done_callback(lambda _: None)
        waiter.settle(False)
        assert waiter.result() is False
        waiter.settle_at_once(ValueError("mine"))
        with pytest.raises(ValueError, match="mine"):
            waiter.result()
        if aio.Waiter.__module__ != aio.__name__:
            for wrong in (3, None, ValueError):
                with pytest.raises(TypeError, match="with a bool or an exception"):
                    waiter.settle(wrong)
            waiter.ready()
            with pytest.raises(KeyError):
                packets.throw(KeyError("thrown"))
            packets.close()
        loop.close()
        ends[1].send(HEADER + b"\x07")
        while not rx._poll():
            pass
        with pytest.raises(StopIteration) as told:
            next(iter(packets.__anext__().__await__()))
        assert told.value.value.data[0] == 7


def test_a_second_task_on_the_same_iterator(run: Run, ends: tuple[socket.socket, socket.socket]) -> None:
    """While one task waits at an iterator, another at the same one gets Busy, and the first one gets the packet."""

    async def work() -> None:
        receiver, sender = ends
        with linkrx.open(receiver) as rx:
            packets = aiter(rx)
            first = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            with pytest.raises(linkrx.Busy):
                await anext(packets)
            sender.send(HEADER + b"\x07")
            assert (await first).data[0] == 7

    run(work())


def test_thrown_out_while_it_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    """A coroutine that is closed, or gets an exception, while it waits leaves the dispatcher to the next one."""
    with linkrx.open(ends[0]) as rx:
        packets = aiter(rx)

        async def one() -> bytes:
            return bytes((await anext(packets)).data)

        async def work() -> None:
            closed, thrown = one(), one()
            closed.send(None)
            closed.close()
            thrown.send(None)
            with pytest.raises(KeyError):
                thrown.throw(KeyError("thrown"))
            ends[1].send(HEADER + b"\x07")
            assert await one() == b"\x07"

        asyncio.run(work())
