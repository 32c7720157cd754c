"""Sources that poll(2) reports as ready without end, although they have no packet."""

from __future__ import annotations

import asyncio
import errno
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx

pytestmark = pytest.mark.usefixtures("devices")  # for UDP in a private network namespace

IP_RECVERR = 11  # linux/in.h
SECONDS = 0.2
MOST = 60  # 9 wake-ups at once, then one every 10 ms, which a busy machine only makes rarer


@contextmanager
def shut_down() -> Iterator[socket.socket]:
    """A datagram socket that is shut down for reading: poll reports it as readable for ever."""
    with pair() as (receiver, _):
        receiver.shutdown(socket.SHUT_RD)
        yield receiver


@contextmanager
def with_an_error_in_its_queue() -> Iterator[socket.socket]:
    """A UDP socket with IP_RECVERR whose peer refused a datagram: poll reports POLLERR until the owner reads the error queue."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
    ):
        nobody.bind(("127.0.0.1", 0))
        receiver.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        receiver.bind(("127.0.0.1", 0))
        receiver.connect(nobody.getsockname())
        nobody.close()
        receiver.send(b"refused")
        poll = select.poll()
        poll.register(receiver, 0)
        assert poll.poll(10_000), "no ICMP error came"
        assert receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        yield receiver


Source = Callable[[], AbstractContextManager[socket.socket]]
each = pytest.mark.parametrize("source", [shut_down, with_an_error_in_its_queue])
on_each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "packet_mmap"])


@each
@on_each_backend
def test_a_wait_burns_no_processor(source: Source, backend: str) -> None:
    """A call that waits reads such a source only now and then."""
    with source() as receiver, linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
        assert rx.dispatch(SECONDS) is True
        assert rx.stats().waits < MOST
        with pytest.raises(TimeoutError):
            rx.recv(SECONDS)
        assert rx.stats().waits < 2 * MOST


@each
@on_each_backend
def test_an_event_loop_is_left_alone(source: Source, backend: str) -> None:
    """An event loop that polls such a source and calls drain() is woken only now and then, and not after a stop."""
    with source() as receiver, linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        wakes, until = 0, time.monotonic() + SECONDS
        while time.monotonic() < until:
            if poll.poll(50):
                assert rx.drain() == 0
                wakes += 1
        assert wakes < MOST
        rx.stop()
        assert poll.poll(0)
        assert rx.drain() == 0
        assert (rx.end, poll.poll(0)) == (linkrx.End.STOPPED, [])


class Counting(selectors.DefaultSelector):
    """A selector that counts how often the event loop asks it."""

    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        """Count, and wait."""
        self.turns += 1
        return super().select(timeout)


@each
@on_each_backend
def test_asyncio_is_left_alone(source: Source, backend: str) -> None:
    """A task in `async for` of packets or of batches lets the event loop sleep on such a source."""

    async def receive(packets: Any) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS):
                async for _ in packets:
                    pass

    with source() as receiver, linkrx.open(receiver, backend=backend) as rx:
        for packets in (rx, rx.batches()):
            selector = Counting()
            with asyncio.Runner(loop_factory=partial(asyncio.SelectorEventLoop, selector)) as runner:
                runner.run(receive(packets))
            assert selector.turns < 2 * MOST


@on_each_backend
def test_packets_behind_an_error(backend: str) -> None:
    """Packets that come to a socket with an error in its queue are received, and the owner can still read the error."""
    with with_an_error_in_its_queue() as receiver, linkrx.open(receiver, backend=backend) as rx:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(receiver.getpeername())
            peer.connect(receiver.getsockname())
            for number in range(5):
                peer.send(frame(number))
                assert number_of(rx.recv(10)) == number
        _, ancillary, _, _ = receiver.recvmsg(100, 100, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        assert [(level, kind) for level, kind, _ in ancillary] == [(socket.IPPROTO_IP, IP_RECVERR)]
