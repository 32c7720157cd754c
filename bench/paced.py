"""Measures the processor time of receivers of streams at a fixed rate, from another process on another processor."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from compiled import end
from floors import Frames, receive_polled
from lone import Handle, callback_for, new_loop, reading
from peers import Missing
from queues import Source
from race import Check, Drain, OwnClock, Queue, Reader, preemptions
from sender import set_scheduler

import linkrx
from linkrx.testing.devices import Device

# If more frames were late, or the receiver lost the processor more often, other processes disturbed the stream, and it is
# sent again.
LATE_SHARE, PREEMPTIONS, TRIES = 0.02, 4, 3
PATIENCE = 30  # seconds for a stream to arrive


class Sender:
    """sender.py on one end of a queue."""

    def __init__(self, queue: Queue, processor: int) -> None:
        fd = queue.injector.fileno()
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("sender.py")),
                str(fd),
                str(queue.frames.size),
                str(processor),
            ],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._line()
        assert said == "ready", f"the sender says {said!r}"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, packets: int, interval_ns: int) -> None:
        """Start to send."""
        assert self._process.stdin is not None
        print(packets, interval_ns, file=self._process.stdin, flush=True)

    def finish(self) -> tuple[int, int]:
        """Wait until all are sent. Returns how many the kernel accepted, and how many were late."""
        taken, late = map(int, self._line().split())
        return taken, late

    def close(self) -> None:
        """End the process."""
        end(self._process)


class Stream(Queue):
    """A TAP queue into which a sender sends at a fixed rate while a reader receives."""

    def __init__(self, queue: Queue, source: linkrx.TunTap, sender: Sender, packets: int, rate: int) -> None:
        """Send `packets` at `rate` per second. The queue has room for all, so a slow reader loses none."""
        super().__init__(queue.frames, queue.injector, packets)
        self.sender, self.rate = sender, rate
        Device(source.name).set(txqlen=packets + 64)

    def fill(self) -> None:
        """Nothing is put in ahead."""


class Counted:
    """A callback that checks and counts each packet, and calls `over` after the last one."""

    def __init__(self, check: Check | None, packets: int) -> None:
        self.timed, self.count = check is None, 0
        self.over: Callable[[], object] = lambda: None
        show, seen = callback_for(check), 0

        def handle(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == packets:
                seen, self.count = 0, packets
                self.over()

        def shown(remote: bytes | None, local: bytes | None, protocol: int, packet: Any) -> None:
            show(remote, local, protocol, packet)
            handle(remote, local, protocol, packet)

        self.handle: Handle = handle if check is None else shown


class Timed(OwnClock):
    """Receives a stream. Its clock is the processor time of this thread."""

    def __init__(self, stream: Stream, counted: Counted, receive: Callable[[], object]) -> None:
        """`receive` returns when `counted` has had the last packet."""
        self._stream, self._counted, self._receive = stream, counted, receive

    def __call__(self) -> int:
        """Receive one stream. Repeat it if other processes disturbed it."""
        for _ in range(TRIES if self._counted.timed else 1):
            packets = self._once()
            if not self.disturbed:
                break
        return packets

    def _once(self) -> int:
        stream, counted = self._stream, self._counted
        counted.count = 0
        switches = preemptions()
        stream.sender.start(stream.packets, 10**9 // stream.rate)
        with bounded(), first():
            start = time.thread_time_ns()
            self._receive()
            self.took_ns = time.thread_time_ns() - start
        taken, late = stream.sender.finish()
        assert taken == stream.packets, f"the queue took {taken} of {stream.packets}"
        self.disturbed = late > LATE_SHARE * taken or preemptions() > switches + PREEMPTIONS
        return counted.count


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError after PATIENCE seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a stream did not arrive within {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def first() -> Iterator[None]:
    """Within this context, this thread has real-time priority, if that is allowed."""
    set_scheduler()
    try:
        yield
    finally:
        set_scheduler(os.SCHED_OTHER)


def polled(stream: Stream, fd: int) -> Reader:
    """By hand: `poll`, `os.read`, the link header, a call."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        counted = Counted(check, stream.packets)
        one, poll = reading(fd, counted.handle), select.poll()
        poll.register(fd, select.POLLIN)
        going = True

        def over() -> None:
            nonlocal going
            going = False

        def receive() -> None:
            nonlocal going
            going, wait = True, poll.poll
            while going:
                wait()
                one()

        counted.over = over
        yield Timed(stream, counted, receive)

    return Reader(stream, opened)


def polled_in_c(stream: Stream, fd: int) -> Reader:
    """`poll` and `read` in C, and nothing else: no call, and no other thread of Python that could run."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        counted = Counted(check, stream.packets)

        def receive() -> None:
            counted.count = receive_polled(fd, stream.packets, check)

        yield Timed(stream, counted, receive)

    return Reader(stream, opened)


def run(stream: Stream, source: Source, **options: Any) -> Reader:
    """`run()`, which `stop()` ends after the last packet. It is opened anew for each stream."""
    try:
        linkrx.open(source, lambda *_: None, **options).close()
    except (linkrx.UnsupportedOption, ValueError) as refused:
        raise Missing(f"refused: {refused}") from refused

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        counted = Counted(check, stream.packets)

        class Opened(Timed):
            def _once(self) -> int:
                with linkrx.open(source, counted.handle, **options) as rx:
                    counted.over, self._receive = rx.stop, rx.run
                    packets = super()._once()
                    assert rx.stats().packets == packets
                    return packets

        yield Opened(stream, counted, lambda: None)

    return Reader(stream, opened)


def in_loop(stream: Stream, source: Source, way: str) -> Reader:
    """asyncio: `add_reader` and `os.read`, `add_reader` and `drain`, or `async for`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        counted = Counted(check, stream.packets)
        with new_loop() as loop:
            waiting: Any = None

            def receive() -> None:
                nonlocal waiting
                waiting = loop.create_future()
                counted.over = lambda: waiting.set_result(None)
                loop.run_until_complete(waiting)

            if way == "os.read":
                assert not isinstance(source, (int, str))
                loop.add_reader(source.fileno(), reading(source.fileno(), counted.handle))
                yield Timed(stream, counted, receive)
                loop.remove_reader(source.fileno())
                return
            with linkrx.open(source, counted.handle if way == "drain" else None) as rx:
                if way == "drain":
                    fd = rx.fileno()
                    loop.add_reader(fd, rx.drain)
                    yield Timed(stream, counted, receive)
                    loop.remove_reader(fd)
                    return
                handle = counted.handle
                packets: Any = aiter(rx)

                async def iterate() -> None:
                    async for packet in packets:
                        handle(None, None, 0, packet)
                        if counted.count:
                            break

                yield Timed(stream, counted, lambda: loop.run_until_complete(iterate()))
                loop.run_until_complete(packets.aclose())

    return Reader(stream, opened)


@contextmanager
def sending(queue: Queue, processor: int) -> Iterator[Sender]:
    """A sender on a queue."""
    assert isinstance(queue.frames, Frames)
    sender = Sender(queue, processor)
    try:
        yield sender
    finally:
        sender.close()
