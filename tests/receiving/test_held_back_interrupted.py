"""Exceptions of signal handlers, and forks in them, while packets are held back for `latency`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from support.interruptions import After, Interrupted
from support.latency import FOR_EVER, SEGMENT, held_back, one_by_one, super_packet
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx
from linkrx.testing.stops import alarmed
from linkrx.testing.waiting import running, until, watched


class Interrupt(Exception):
    """The exception of the signal handler."""


@pytest.mark.parametrize("call", ["drain", "dispatch", "recv", "batches"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_after_an_exception_of_a_handler(backend: str, call: str) -> None:
    """After an exception of a signal handler, the next call delivers at once what was held back, and what came after it."""
    got: list[linkrx.Packet] = []
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, lambda *call: got.append(call[3]), backend=backend, latency=FOR_EVER) as rx,
        watched(rx),
    ):
        calls: dict[str, Callable[[], object]] = {
            "drain": rx.drain,
            "dispatch": rx.dispatch,
            "recv": lambda: got.extend(rx.recv() for _ in range(4)),
            "batches": lambda: got.extend(next(rx.batches())),
        }

        interrupted: list[bool] = []

        def interrupt(_: object) -> None:
            if held_back(rx) == 3 and not interrupted:
                interrupted.append(True)
                raise Interrupt

        # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
        with (
            running(partial(one_by_one, rx, sender.send, [frame(number) for number in range(3)])),
            alarmed(interrupt, first=0.01, interval=0.01),
            pytest.raises(Interrupt),
        ):
            rx.dispatch()
        assert (held_back(rx), rx._has_something) == (3, True)
        sender.send(frame(3))
        calls[call]()
        assert [number_of(packet) for packet in got] == [0, 1, 2, 3]
        assert held_back(rx) == 0


@dataclass(frozen=True)
class Way:
    """A kind of socket, options of open, and how a message that stands for some numbers looks."""

    name: str
    kind: socket.SocketKind
    message: Callable[[range], bytes]
    options: dict[str, Any] = field(default_factory=dict)

    def numbers(self, first: int) -> range:
        """The numbers in one message."""
        return range(first, first + (3 if self.name == "split" else 1))


WAYS = [
    Way("dgram", socket.SOCK_DGRAM, lambda numbers: frame(numbers[0])),
    Way("seqpacket", socket.SOCK_SEQPACKET, lambda numbers: frame(numbers[0])),
    Way("segment", socket.SOCK_DGRAM, lambda numbers: bytes(10) + frame(numbers[0]), SEGMENT),
    Way("split", socket.SOCK_DGRAM, super_packet, SEGMENT),
]


@pytest.mark.only(3, 11)  # as in test_interruption.py
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("way", "stops"),
    # In `undelivered` a super-packet that is not split counts as one.
    [(way, stops) for way in WAYS for stops in (False, True) if not (stops and way.name == "split")],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_exception_at_any_point(way: Way, backend: str, stops: bool) -> None:
    """With an exception at any point of a read behind held-back packets, each packet is delivered once, or counted after a stop()."""
    for point in range(5000):
        got: list[int] = []

        def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet, into: list[int] = got) -> None:
            into.append(packet.data[28] if way.name == "split" else number_of(packet))

        with (
            pair(way.kind) as (receiver, sender),
            linkrx.open(
                receiver, deliver, backend=backend, latency=FOR_EVER, batch_size=16, **way.options
            ) as rx,
        ):
            sent = list(way.numbers(0))
            sender.send(way.message(way.numbers(0)))
            assert not rx._hold_back()
            for _ in range(2):
                sender.send(way.message(way.numbers(len(sent))))
                sent += way.numbers(len(sent))
            after = After(point)
            with suppress(Interrupted), after:
                assert not rx._hold_back()
            assert held_back(rx) >= len(way.numbers(0))
            assert rx._has_something
            if stops:
                rx.stop()
                assert rx.dispatch(0) is False
                receiver.setblocking(False)
                with suppress(BlockingIOError):
                    while receiver.recv(1000):
                        del sent[-1]
                assert (got, rx._tally.undelivered) == ([], len(sent))
            else:
                sender.send(way.message(way.numbers(len(sent))))
                sent += way.numbers(len(sent))
                while rx.drain():
                    pass
                assert got == sent
                assert (rx.stats().packets, rx.stats().undelivered, held_back(rx)) == (len(sent), 0, 0)
            if not after.raised:
                assert point > 5 or backend != "os_readv", "the interruption never came"
                return
    raise AssertionError("the call never ended")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_that_is_forked_by_a_handler(backend: str) -> None:
    """A child that a signal handler forks while packets are held back can close the dispatcher, and its parent goes on."""
    children: list[int] = []
    forks = iter([True])  # the next signal may come before the fork ends

    def fork(_: object) -> None:
        if held_back(rx) != 2 or not next(forks, False):
            return
        child = os.fork()
        if child:
            children.append(child)
            return
        status = 1
        try:
            rx.close()
            status = 0 if rx._released else 2
        finally:
            os._exit(status)

    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, backend=backend, latency=FOR_EVER, batch_size=3) as rx,
        watched(rx),
    ):

        def send() -> None:
            one_by_one(rx, sender.send, [frame(0), frame(1)])
            until(lambda: children)
            sender.send(frame(2))

        with running(send), alarmed(fork, first=0.01, interval=0.01):
            assert [number_of(packet) for packet in next(rx.batches())] == [0, 1, 2]
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
