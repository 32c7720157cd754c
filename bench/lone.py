"""Measures packets that come alone: one is sent, untimed, and received, timed, before the next is sent."""

from __future__ import annotations

import asyncio
import os
import select
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from floors import Frames
from peers import ROOM
from queues import Source
from race import Check, Drain, OwnClock, Queue, Reader, preemptions

import linkrx

ETHERNET = struct.Struct("!6s6sH")
now = time.perf_counter_ns
Handle = Callable[[Any, Any, int, Any], None]


@cache
def clock_cost() -> float:
    """Nanoseconds between two reads of the clock with nothing in between."""
    return statistics.median(-now() + now() for _ in range(2000))


class Alone(Queue):
    """A queue into which the reader itself sends one packet at a time."""

    def fill(self) -> None:
        """Send nothing: the reader sends."""

    def send(self, number: int) -> None:
        """Send one frame."""
        assert isinstance(self.frames, Frames)
        assert self.frames.send(self.injector, 1, number) == 1


class Singly(OwnClock):
    """Calls a function that receives one packet, repeatedly, with a packet queued each time."""

    def __init__(self, queue: Alone, one: Callable[[], object], counted: Callable[[], int]) -> None:
        self._queue, self._one, self._counted = queue, one, counted

    def __call__(self) -> int:
        """Call the function once for each packet."""
        one, send, packets, spent = self._one, self._queue.send, self._queue.packets, 0
        before, switches = self._counted(), preemptions()
        for number in range(packets):
            send(number)
            start = now()
            one()
            spent += now() - start
        self.took_ns = spent - packets * clock_cost()
        self.disturbed = preemptions() > switches
        return self._counted() - before


class InLoop(OwnClock):
    """Under asyncio, the callback of a packet sends the next one, untimed. The rest of the loop's iteration is timed."""

    def __init__(self, queue: Alone, loop: asyncio.AbstractEventLoop) -> None:
        self._queue, self._loop = queue, loop
        self._spent = self._start = self.count = 0
        self.task: Callable[[], Any] = self.over
        self._over = loop.create_future()

    async def over(self) -> None:
        """Wait until all packets came."""
        await self._over

    def took(self) -> bool:
        """Count a packet. Returns False if it was the last."""
        self._spent += now() - self._start
        self.count += 1
        going = self.count < self._queue.packets
        if going:
            self._queue.send(self.count)
        else:
            self._over.set_result(None)
        self._start = now()
        return going

    def _begin(self) -> None:
        self._queue.send(0)
        self._start = now()

    def __call__(self) -> int:
        """Run the loop until all packets came."""
        self._over, self._spent, self.count = self._loop.create_future(), 0, 0
        switches = preemptions()
        self._loop.call_soon(self._begin)
        self._loop.run_until_complete(self.task())
        self.took_ns = self._spent - self.count * clock_cost()
        self.disturbed = preemptions() > switches
        return self.count


@contextmanager
def new_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An asyncio loop of its own."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def callback_for(check: Check | None) -> Handle:
    """The function that is called with each packet."""

    def ignore(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
        pass

    def show(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
        assert check is not None
        check(bytes(packet))

    return ignore if check is None else show


def reading(fd: int, handle: Handle) -> Callable[[], None]:
    """By hand: read one frame, unpack its link header, and call a function."""
    read, unpack = os.read, ETHERNET.unpack_from

    def one() -> None:
        frame = read(fd, ROOM)
        local, remote, protocol = unpack(frame)
        handle(remote, local, protocol, frame)

    return one


def hand(queue: Alone, fd: int, *, wait: bool) -> Reader:
    """`os.read`, or `select` and `os.read`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        count = 0
        read, wanted, ready = reading(fd, callback_for(check)), [fd], select.select

        def one() -> None:
            ready(wanted, (), ())
            read()

        def counted() -> int:
            # os.read would have raised for a missing packet.
            nonlocal count
            count += queue.packets
            return count

        yield Singly(queue, one if wait else read, counted)

    return Reader(queue, opened)


def hand_in_loop(queue: Alone, fd: int) -> Reader:
    """`add_reader` and `os.read`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        with new_loop() as loop:
            clock, show = InLoop(queue, loop), callback_for(check)

            def handle(remote: bytes, local: bytes, protocol: int, frame: bytes) -> None:
                show(remote, local, protocol, frame)
                clock.took()

            loop.add_reader(fd, reading(fd, handle))
            yield clock
            loop.remove_reader(fd)

    return Reader(queue, opened)


def linkrx_alone(queue: Alone, source: Source, way: str, backend: str) -> Reader:
    """linkrx with a call of SYNCHRONOUS."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        handle = callback_for(check)
        delivers = way in ("dispatch", "drain")
        with linkrx.open(source, handle if delivers else None, backend=backend) as rx:
            wanted = [rx.fileno()]

            def selected() -> linkrx.Packet:
                select.select(wanted, (), ())
                return rx.recv(0)

            calls: dict[str, Callable[[], Any]] = {
                "dispatch": rx.dispatch,
                "recv": rx.recv,
                "next": iter(rx).__next__,
                "drain": rx.drain,
                "select + recv": selected,
            }
            one = calls[way]

            def shown() -> None:
                handle(None, None, 0, one())

            yield Singly(queue, one if delivers or check is None else shown, lambda: rx.stats().packets)

    return Reader(queue, opened)


def linkrx_in_loop(queue: Alone, source: Source, way: str, backend: str) -> Reader:
    """linkrx under asyncio: `add_reader` and `drain`, or `async for`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        show = callback_for(check)

        def handle(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
            show(remote, local, protocol, packet)
            clock.took()

        with (
            linkrx.open(source, handle if way == "drain" else None, backend=backend) as rx,
            new_loop() as loop,
        ):
            clock = InLoop(queue, loop)
            fd = rx.fileno()
            if way == "drain":
                loop.add_reader(fd, rx.drain)
            else:
                packets: Any = aiter(rx)  # held, so that leaving a loop does not close it

                async def iterate() -> None:
                    async for packet in packets:
                        show(None, None, 0, packet)
                        if not clock.took():
                            break

                clock.task = iterate
            yield clock
            if way == "drain":
                loop.remove_reader(fd)

    return Reader(queue, opened)


SYNCHRONOUS = {
    "dispatch": "os.read",
    "recv": "os.read",
    "next": "os.read",
    "drain": "os.read",
    "select + recv": "select, os.read",
}
IN_LOOP = {"add_reader, drain": "add_reader, os.read", "async for": "add_reader, os.read"}
BY_HAND = {**SYNCHRONOUS, **IN_LOOP}  # the loop by hand for each call


def by_hand(queue: Alone, source: Source, name: str) -> Reader:
    """The loop of that name in BY_HAND."""
    assert not isinstance(source, str)
    fd = source if isinstance(source, int) else source.fileno()
    if name == "add_reader, os.read":
        return hand_in_loop(queue, fd)
    return hand(queue, fd, wait=name.startswith("select"))


def by_linkrx(queue: Alone, source: Source, way: str, backend: str) -> Reader:
    """linkrx with a call of BY_HAND."""
    if way in SYNCHRONOUS:
        return linkrx_alone(queue, source, way, backend)
    return linkrx_in_loop(queue, source, "drain" if way.endswith("drain") else "async for", backend)
