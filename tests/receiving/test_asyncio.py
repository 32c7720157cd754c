"""Asynchronous iteration under asyncio and uvloop, and other event loops that poll."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from support.pairs import Pair

import linkrx
from linkrx.receiving import plain_async
from linkrx.receiving.deadline import HOLD
from linkrx.receiving.receiver import Waiter
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.waiting import PATIENCE, patiently, running, until

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
    """Run a coroutine under uvloop."""
    if uvloop is None:
        pytest.skip("uvloop is not installed")
    uvloop.run(work)


def asyncio_run(work: Awaitable[None]) -> None:
    """Run a coroutine under asyncio's default loop."""
    asyncio.run(work)  # type: ignore[arg-type]


@pytest.fixture(params=[asyncio_run, uvloop_run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine under each of the two loops."""
    chosen: Run = request.param
    return chosen


def has_reader(rx: linkrx.Dispatcher) -> bool:
    """Remove the reader of a descriptor. Returns whether the loop had one; under uvloop always False."""
    fd = rx._reader._fd if rx._reader else -1
    return fd >= 0 and asyncio.get_running_loop().remove_reader(fd) is True


def test_packets(run: Run, seqpacket: Pair) -> None:
    """`async for packet in rx` gives every packet in order, waits for later packets, and ends at EOF."""

    async def work() -> None:
        receiver, sender = seqpacket
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


def test_batches(run: Run, seqpacket: Pair) -> None:
    """`async for batch in rx.batches(timeout)` gives batches and ends after the timeout."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver, batch_size=8) as rx:
            for _ in range(20):
                sender.send(HEADER)
            assert [len(batch) async for batch in rx.batches(0.02)] == [8, 8, 4]
            assert rx.end is None

    run(work())


def test_bounded_work_per_wake_up(run: Run, seqpacket: Pair) -> None:
    """Under load, other tasks run after every batch."""

    async def work() -> None:
        receiver, sender = seqpacket
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


def test_stop_and_cancel(run: Run, seqpacket: Pair) -> None:
    """stop() ends a waiting iteration. After a waiting task is cancelled, the dispatcher is usable and the loop has no reader."""

    async def work() -> None:
        receiver, sender = seqpacket
        got: list[linkrx.Packet] = []
        with linkrx.open(receiver) as rx:

            async def consume() -> None:
                async for packet in rx:
                    got.append(packet)

            cancelled = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert not has_reader(rx)
            sender.send(HEADER)
            stopped = asyncio.ensure_future(consume())
            while not got:
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # it waits again
            rx.stop()
            await stopped
            assert len(got) == 1
            assert rx.end is linkrx.End.STOPPED

    run(work())


def test_breaking_out_keeps_the_rest(run: Run, seqpacket: Pair) -> None:
    """After a break out of `async for`, the next iteration starts with the next packet."""

    async def work() -> None:
        receiver, sender = seqpacket
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


def test_close_wakes_the_task_that_waits(run: Run, seqpacket: Pair) -> None:
    """If another task closes the dispatcher, a task that waits in `async for` gets Closed, and the loop has no reader."""

    async def work() -> None:
        rx = linkrx.open(seqpacket[0])

        async def consume() -> None:
            async for _ in rx:
                pass

        task = asyncio.ensure_future(consume())
        await asyncio.sleep(0)
        rx.close()
        assert not has_reader(rx)
        with pytest.raises(linkrx.Closed):
            await asyncio.wait_for(task, 10)

    run(work())


def test_a_second_task_gets_a_clear_error(run: Run, seqpacket: Pair) -> None:
    """While one task waits for packets, another task that receives gets Busy, and the first still receives."""

    async def work() -> None:
        receiver, sender = seqpacket
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


def test_close_from_outside_a_running_loop_is_refused(run: Run, seqpacket: Pair) -> None:
    """close() raises Busy while a task waits in another thread's loop. stop() ends the wait."""
    with linkrx.open(seqpacket[0]) as rx:

        async def work() -> None:
            assert [packet async for packet in rx] == []

        with running(lambda: run(work())):
            until(lambda: rx._reader is not None and rx._reader._waiter is not None)
            with pytest.raises(linkrx.Busy, match=r"stop\(\)"):
                rx.close()
            rx.stop()


WAYS: dict[str, Callable[[linkrx.Dispatcher, AsyncIterator[object]], AsyncIterator[object]]] = {
    "packets": lambda rx, _: aiter(rx),
    "the same packets": lambda _, packets: packets,
    "batches": lambda rx, _: aiter(rx.batches()),
    "timeout": lambda rx, _: aiter(rx.batches(timeout=30)),
}


@pytest.mark.parametrize("latency", [None, 0.001])
@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", WAYS)
def test_a_task_in_the_place_of_one_that_it_cancels(
    run: Run, seqpacket: Pair, before: str, after: str, latency: float | None
) -> None:
    """A task that cancels the task that waits, and receives at once, gets every packet."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver, latency=latency) as rx:
            packets = aiter(rx)
            waits = asyncio.ensure_future(anext(WAYS[before](rx, packets)))
            await asyncio.sleep(0)

            async def take_its_place() -> None:
                assert waits.cancel()
                for _ in range(3):
                    task = asyncio.ensure_future(send())
                    await anext(WAYS[after](rx, packets))
                    await task

            async def send() -> None:
                await asyncio.sleep(0)  # the other task waits, and the cancelled one has ended
                sender.send(HEADER)

            await asyncio.wait_for(take_its_place(), 10)
            assert waits.cancelled()

    run(work())


def test_repeated_timeouts_lose_no_packet(run: Run, seqpacket: Pair) -> None:
    """Repeated timeouts of wait_for(anext(packets)) lose no later packet, and the loop has no reader afterwards."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver) as rx:
            packets = aiter(rx)
            for number in range(10):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(packets), 0.001)
                assert not has_reader(rx)
                sender.send(HEADER + bytes([number]))
                assert (await asyncio.wait_for(anext(packets), 10)).data[0] == number

    run(work())


def test_cancelled_in_the_turn_in_which_it_would_go_on(run: Run, seqpacket: Pair) -> None:
    """A task can be cancelled while packets are queued, and the next task gets them all, in order."""

    async def work() -> None:
        receiver, sender = seqpacket
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
    run: Run, seqpacket: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a receive in the event loop is raised in the task, which can receive again afterwards."""

    async def work() -> None:
        receiver, sender = seqpacket
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


def test_an_iterator_in_another_event_loop(seqpacket: Pair) -> None:
    """An asynchronous iterator that was used in one event loop can be used in another."""
    receiver, sender = seqpacket
    with linkrx.open(receiver) as rx:
        packets = aiter(rx)

        async def one() -> int:
            task = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            sender.send(HEADER + b"\x07")
            return (await task).data[0]

        assert [asyncio.run(one()) for _ in range(3)] == [7, 7, 7]


def test_an_iterator_in_two_open_event_loops(seqpacket: Pair) -> None:
    """Two event loops of one thread can use an iterator in turn, if no task of the other waits, and Busy says so if one does."""
    receiver, sender = seqpacket
    with linkrx.open(receiver) as rx, asyncio.Runner() as one, asyncio.Runner() as two:
        packets = aiter(rx)

        async def first() -> int:
            asyncio.get_running_loop().call_soon(sender.send, HEADER + b"\x07")
            return (await anext(packets)).data[0]

        async def wait() -> asyncio.Future[Any]:
            waiting = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            return waiting

        async def cancel(waiting: asyncio.Future[Any]) -> None:
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        assert [loop.run(first()) for loop in (one, two, one, two)] == [7] * 4
        waiting = one.run(wait())
        with pytest.raises(linkrx.Busy, match="another task is receiving"):
            two.run(first())
        one.run(cancel(waiting))


def test_an_iterator_in_the_loop_of_another_thread(seqpacket: Pair) -> None:
    """While a packet wakes a task, another thread that waits with the same iterator in a loop of its own gets Busy."""
    receiver, sender = seqpacket
    refused = []

    async def elsewhere(packets: Any) -> None:
        with pytest.raises(linkrx.Busy) as raised:
            await asyncio.wait_for(anext(packets), PATIENCE)
        refused.append(raised.value)

    async def main() -> None:
        with linkrx.open(receiver) as rx:
            packets = aiter(rx)
            for number in (7, 8):  # the second wait goes on with the reader of the first
                asyncio.get_running_loop().call_soon(sender.send, HEADER + bytes([number]))
                assert (await anext(packets)).data[0] == number
            # The reader's callback woke this task, and has not returned yet.
            with running(lambda: asyncio.run(elsewhere(packets))):
                pass

    asyncio.run(main())
    assert refused


def test_hostile_use_of_an_iterator(seqpacket: Pair) -> None:
    """Methods that only asyncio should call work or raise an error, in any order of calls."""
    with linkrx.open(seqpacket[0]) as rx:
        packets: Any = aiter(rx)
        for wrong in (3, None, object()):
            with pytest.raises((TypeError, AttributeError)):
                type(packets)(wrong).__anext__().__await__().send(None)
        with pytest.raises(RuntimeError, match="no running event loop"):
            packets.__anext__().__await__().__next__()
        loop: Any = asyncio.new_event_loop()
        waiter: Any = Waiter(rx, loop)
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
        if Waiter.__module__ != plain_async.__name__:
            for wrong in (3, None, ValueError):
                with pytest.raises(TypeError, match="with a bool or an exception"):
                    waiter.settle(wrong)
            waiter.ready()
            with pytest.raises(KeyError):
                packets.throw(KeyError("thrown"))
            packets.close()
        loop.close()
        seqpacket[1].send(HEADER + b"\x07")
        while not rx._poll():
            pass
        with pytest.raises(StopIteration) as stopped:
            next(iter(packets.__anext__().__await__()))
        assert stopped.value.value.data[0] == 7


def test_aclosing(run: Run, seqpacket: Pair) -> None:
    """contextlib.aclosing() closes an iterator, whose dispatcher can receive again afterwards."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver) as rx:
            for number in range(3):
                async with aclosing(aiter(rx)) as packets:  # type: ignore[type-var]
                    sender.send(HEADER + bytes([number]))
                    assert (await anext(packets)).data[0] == number

    run(work())


def test_a_second_task_on_the_same_iterator(run: Run, seqpacket: Pair) -> None:
    """While one task waits for an iterator, another task gets Busy from it, and the first gets the packet."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver) as rx:
            packets = aiter(rx)
            first = asyncio.ensure_future(anext(packets))
            await asyncio.sleep(0)
            with pytest.raises(linkrx.Busy):
                await anext(packets)
            sender.send(HEADER + b"\x07")
            assert (await first).data[0] == 7

    run(work())


def test_an_exception_in_a_waiting_coroutine(seqpacket: Pair) -> None:
    """After a waiting coroutine was closed or got an exception, another one can receive."""
    with linkrx.open(seqpacket[0]) as rx:
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
            seqpacket[1].send(HEADER + b"\x07")
            assert await one() == b"\x07"

        asyncio.run(work())


def test_the_users_own_reader_stays(run: Run, seqpacket: Pair) -> None:
    """`async for` and add_reader(rx.fileno()) are separate readers: both stay, and each packet is received once."""

    async def work() -> None:
        receiver, sender = seqpacket
        got: list[int] = []
        with linkrx.open(receiver, lambda *call: got.append(call[3].data[0])) as rx:
            called = asyncio.Event()
            loop = asyncio.get_running_loop()

            def drain() -> None:
                called.set()
                rx.drain()

            async def consume() -> None:
                async for packet in rx:
                    got.append(packet.data[0])

            loop.add_reader(rx.fileno(), drain)
            consumer = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            for number in range(100):
                called.clear()
                sender.send(HEADER + bytes([number]))
                await called.wait()
            rx.stop()
            await asyncio.wait_for(consumer, 10)
            loop.remove_reader(rx.fileno())
            while len(got) < rx.stats().packets:
                await asyncio.sleep(0)
            assert got == list(range(100))

    run(work())


@pytest.mark.parametrize("mute", [True, False])
def test_a_task_ends_after_another_call_reported_the_end(run: Run, seqpacket: Pair, mute: bool) -> None:
    """A task that waits in `async for` ends, even if another call has already reported the end."""

    async def work() -> None:
        with linkrx.open(seqpacket[0], lambda *_: None) as rx:

            async def consume() -> list[linkrx.Packet]:
                return [packet async for packet in rx]

            if mute:
                rx.fileno()
            task = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            rx.stop()
            assert rx.dispatch(0) is False
            assert await asyncio.wait_for(task, 10) == []

    run(work())


@pytest.mark.parametrize(
    "wait",
    [asyncio.ensure_future, asyncio.gather, asyncio.shield, lambda one: asyncio.wait_for(one, PATIENCE)],
    ids=["ensure_future", "gather", "shield", "wait_for"],
)
def test_one_packet(run: Run, seqpacket: Pair, wait: Callable[[Any], Awaitable[Any]]) -> None:
    """What anext() returns can be given to the functions of asyncio that take awaitables, before the packet comes and after."""

    async def work() -> None:
        with linkrx.open(seqpacket[0]) as rx:
            for early in (True, False):
                if early:
                    seqpacket[1].send(HEADER + b"x")
                else:
                    asyncio.get_running_loop().call_later(0.01, seqpacket[1].send, HEADER + b"x")
                found = await wait(anext(aiter(rx)))
                assert found in (HEADER + b"x", [HEADER + b"x"])

    run(work())


@pytest.mark.parametrize("way", ["packets", "batches"])
def test_latency(run: Run, seqpacket: Pair, way: str) -> None:
    """With latency=, `async for` returns a held-back packet and later ones in one batch, also after a packet that came alone."""

    async def work() -> None:
        receiver, sender = seqpacket
        with linkrx.open(receiver, latency=0.2) as rx:
            assert rx.stats().batches == 0

            async def one_batch() -> list[int]:
                if way == "packets":
                    packets = aiter(rx)
                    return [(await anext(packets)).data[0] for _ in range(5)]
                return [packet.data[0] for packet in await anext(aiter(rx.batches()))]

            # Twice: the reader of the second wait is registered already. Where this process is kept off its processor for longer
            # than the latency, packets of one turn may come apart: then once more.
            in_time: list[bool] = []
            for _ in patiently(lambda: len(in_time) == 2):
                sender.send(HEADER)
                assert len(await anext(aiter(rx.batches()))) == 1
                task = asyncio.ensure_future(one_batch())
                await asyncio.sleep(0)
                before, batches = time.monotonic(), rx.stats().batches
                for number in range(5):
                    sender.send(HEADER + bytes([number]))
                    await asyncio.sleep(0)
                late = time.monotonic() - before >= 0.2
                got = await task
                while late and len(got) < 5:
                    got += await one_batch()
                assert got == list(range(5))
                assert late or rx.stats().batches == batches + 1 or way == "packets"
                if not late:
                    in_time.append(True)

    run(work())


@pytest.mark.parametrize("way", ["packets", "batches"])
def test_latency_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, seqpacket: Pair, way: str) -> None:
    """With latency= the packets that full batches left in the queue come at once."""

    async def work() -> None:
        receiver, sender = seqpacket
        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        delays: list[float] = []

        def noted(delay: float, *call: Any) -> asyncio.TimerHandle:
            delays.append(delay)
            return call_later(delay, *call)

        monkeypatch.setattr(loop, "call_later", noted)
        with linkrx.open(receiver, latency=0.02, batch_size=4) as rx:
            for _ in range(10):
                sender.send(HEADER)
            left = 10
            if way == "packets":
                async for _ in rx:
                    left -= 1
                    if not left:
                        break
            else:
                async for batch in rx.batches():
                    left -= len(batch)
                    if not left:
                        break
        assert delays == [HOLD]  # the first batch was full then

    asyncio_run(work())


CTRL_C = """
import asyncio, os, signal, socket, sys, threading, time, linkrx

receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
HEADER = bytes(12) + bytes((8, 0))
got, total, in_a_wait = [], 2000, sys.argv[2] == "in a wait"
pressed = threading.Event()

def send():
    for number in range(total):
        if number == (0 if in_a_wait else total // 2):
            pressed.wait()  # or all could be over before
        sender.send(HEADER + number.to_bytes(2, "big"))
    sender.close()

async def main(rx):
    if sys.argv[1] == "packets":
        async for packet in rx:
            got.append(packet.u16(14))
    else:
        async for batch in rx.batches():
            got.extend(packet.u16(14) for packet in batch)

def press():
    while not (len(got) > 100 or in_a_wait and rx._reader and rx._reader._waiter):
        time.sleep(0)
    os.kill(os.getpid(), signal.SIGINT)
    pressed.set()

with linkrx.open(receiver, batch_size=8) as rx:
    threads = [threading.Thread(target=work, daemon=True) for work in (send, press)]
    for thread in threads:
        thread.start()
    interruptions = 0
    while rx.end is None:
        try:
            asyncio.run(main(rx))
        except KeyboardInterrupt:
            interruptions += 1
    print(interruptions, got == list(range(total)), rx.stats().packets)
"""


@pytest.mark.parametrize("when", ["in a wait", "under load"])
@pytest.mark.parametrize("way", ["packets", "batches"])
def test_ctrl_c(way: str, when: str) -> None:
    """Ctrl-C ends asyncio.run(), which cancels the task. With the next run(), each packet is received once and none is lost."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, way, when], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert done.stdout == "1 True 2000\n"
