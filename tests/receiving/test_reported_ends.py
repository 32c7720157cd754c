"""Each call that receives reports each end, after which fileno() is never readable again."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

import pytest
from support.pairs import Pair, pair

import linkrx
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import PATIENCE

End = Callable[[linkrx.Dispatcher, Pair], object]
Call = Callable[[linkrx.Dispatcher], object]


def hung_up(_rx: linkrx.Dispatcher, ends: Pair) -> None:
    ends[1].close()


def stopped(rx: linkrx.Dispatcher, _ends: Pair) -> None:
    rx.stop()


def flushed(rx: linkrx.Dispatcher, _ends: Pair) -> None:
    rx.stop(flush=True)


def by_recv(rx: linkrx.Dispatcher) -> None:
    with pytest.raises(linkrx.Ended):
        rx.recv()


def by_recv_at_once(rx: linkrx.Dispatcher) -> None:
    with pytest.raises(linkrx.Ended):
        rx.recv(0)


def by_next(rx: linkrx.Dispatcher) -> None:
    assert next(rx, None) is None


def by_dispatch(rx: linkrx.Dispatcher) -> None:
    assert rx.dispatch() is False


def by_dispatch_at_once(rx: linkrx.Dispatcher) -> None:
    assert rx.dispatch(0) is False


def by_run(rx: linkrx.Dispatcher) -> None:
    assert rx.run() is rx.end


def by_run_with_limits(rx: linkrx.Dispatcher) -> None:
    assert rx.run(count=1, duration=PATIENCE) is rx.end


def by_drain(rx: linkrx.Dispatcher) -> None:
    assert rx.drain() == 0


def by_batches(rx: linkrx.Dispatcher) -> None:
    assert list(rx.batches()) == []


def by_batches_at_once(rx: linkrx.Dispatcher) -> None:
    assert list(rx.batches(0)) == []


def by_awaiting_packets(rx: linkrx.Dispatcher) -> None:
    async def work() -> None:
        assert [packet async for packet in rx] == []

    asyncio.run(work())


def by_awaiting_batches(rx: linkrx.Dispatcher) -> None:
    async def work() -> None:
        assert [batch async for batch in rx.batches()] == []

    asyncio.run(work())


CALLS: list[Call] = [
    *(
        by_recv,
        by_recv_at_once,
        by_next,
        by_dispatch,
        by_dispatch_at_once,
        by_run,
        by_run_with_limits,
        by_drain,
    ),
    *(by_batches, by_batches_at_once, by_awaiting_packets, by_awaiting_batches),
]


@pytest.mark.parametrize("polled", ["before", "after", "when reported"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("end", [hung_up, stopped, flushed], ids=lambda end: end.__name__)
def test_a_call_reports_the_end(end: End, call: Call, polled: str) -> None:
    """fileno() is readable at the end, and quiet after one call that receives, whenever it was asked for. Later calls and stops do not change that."""
    with (
        pair(socket.SOCK_SEQPACKET) as ends,
        linkrx.open(ends[0], ignore) as rx,
        select.epoll() as epoll,
    ):
        if polled == "before":
            epoll.register(rx.fileno(), select.EPOLLIN)
            assert not epoll.poll(0)
        end(rx, ends)
        if polled == "after":
            epoll.register(rx.fileno(), select.EPOLLIN)
        assert polled == "when reported" or epoll.poll(PATIENCE)
        call(rx)
        assert rx.end is (linkrx.End.EOF if end is hung_up else linkrx.End.STOPPED)
        if polled == "when reported":
            epoll.register(rx.fileno(), select.EPOLLIN)
        assert not epoll.poll(0)
        rx.stop()
        for again in CALLS:
            again(rx)
            assert not epoll.poll(0)
