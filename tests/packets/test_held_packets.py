"""Held packets, and packet objects that are reused because no reference is held, in all calls that receive."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pairs import frame, number_of

import linkrx
from linkrx import _core

needs_core = pytest.mark.skipif(
    _core.types is None, reason=f"in plain Python no packet is given again: {_core.reason}"
)

# How a consumer holds a packet: not at all, or in one of many ways.
KEEP: list[Callable[[linkrx.Packet], object]] = [
    lambda packet: packet,
    lambda packet: (packet,),
    lambda packet: {"a": [packet]},
    lambda packet: lambda: packet,
    lambda packet: partial(bytes, packet),
    lambda packet: (held for held in [packet]),
    lambda packet: iter([packet]),
    lambda packet: _traceback_of(packet),
]
DROP = len(KEEP)


def _traceback_of(packet: linkrx.Packet) -> TracebackType | None:
    try:
        raise LookupError
    except LookupError as error:
        return error.__traceback__


def packet_in(held: object) -> linkrx.Packet:
    """The packet in an object of KEEP."""
    if isinstance(held, linkrx.Packet):
        return held
    if isinstance(held, tuple):
        return packet_in(held[0])
    if isinstance(held, dict):
        return packet_in(held["a"][0])
    if isinstance(held, partial):
        return packet_in(held.args[0])
    if isinstance(held, TracebackType):
        return packet_in(held.tb_frame.f_locals["packet"])
    if callable(held):
        return packet_in(held())
    assert isinstance(held, Iterator)
    return packet_in(next(held))


@contextmanager
def received(count: int, deliver: linkrx.Deliver | None = None) -> Iterator[linkrx.Dispatcher]:
    """A dispatcher with `count` numbered frames in its queue."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver, deliver, batch_size=7) as rx:
        for number in range(count):
            sender.send(frame(number))
        yield rx


def by_batch(count: int, take: Callable[[linkrx.Packet], object]) -> None:
    """`for packet in batch`."""
    with received(count) as rx:
        for batch in rx.batches(0):
            for packet in batch:
                take(packet)


def by_iteration(count: int, take: Callable[[linkrx.Packet], object]) -> None:
    """`for packet in rx`."""
    with received(count) as rx:
        for number, packet in enumerate(rx, 1):
            take(packet)
            if number == count:
                break


def by_delivery(count: int, take: Callable[[linkrx.Packet], object]) -> None:
    """`deliver`, which sometimes raises."""

    def deliver(_r: object, _l: object, protocol: int, packet: linkrx.Packet) -> None:
        take(packet)
        if number_of(packet) % 5 == 3:
            raise LookupError

    with received(count, deliver) as rx:
        while rx.stats().packets < count or rx._left > 0:
            with suppress(LookupError):
                rx.drain()


WAYS = pytest.mark.parametrize("way", [by_batch, by_iteration, by_delivery])
Way = Callable[[int, Callable[[linkrx.Packet], object]], None]


@WAYS
@given(st.lists(st.integers(0, DROP), min_size=1, max_size=60), st.integers(1, 4))
def test_held_packets_do_not_change(way: Way, pattern: list[int], last: int) -> None:
    """Packets that are held in any way, also for a few packets only, do not change, and each is received once, in order."""
    seen: list[int] = []
    held: list[tuple[int, object]] = []
    latest: deque[tuple[int, linkrx.Packet]] = deque(maxlen=last)

    def take(packet: linkrx.Packet) -> None:
        number = number_of(packet)
        seen.append(number)
        if pattern[number] != DROP:
            held.append((number, KEEP[pattern[number]](packet)))
        if pattern[number] % 2:
            latest.append((number, packet))
        for known, kept in latest:
            assert number_of(kept) == known

    way(len(pattern), take)
    assert seen == list(range(len(pattern)))
    for number, thing in held:
        assert number_of(packet_in(thing)) == number


@needs_core
@WAYS
def test_packet_objects_are_reused(way: Way) -> None:
    """A consumer that holds no packet gets only a few packet objects, for any number of packets."""
    seen: set[int] = set()
    way(140, lambda packet: seen.add(id(packet)))
    assert len(seen) <= 6


def test_iterators_side_by_side() -> None:
    """Two iterations of one batch, its list, and its packets by index do not affect each other."""
    with received(5) as rx:
        batch = next(rx.batches(0))
        pairs = [(number_of(one), number_of(other)) for one in batch for other in batch]
        assert pairs == [(one, other) for one in range(5) for other in range(5)]
        for number, (one, other, third) in enumerate(zip(batch, batch, list(batch), strict=True)):
            assert [number_of(packet) for packet in (one, other, third, batch[number])] == [number] * 4


def test_a_packet_held_by_an_iterator_that_waits() -> None:
    """The last packet of an iterator does not change while the iterator is not advanced, and after its end."""
    with received(3) as rx:
        packets = iter(next(rx.batches(0)))
        first = next(packets)
        second = next(packets)
        assert (number_of(first), number_of(second)) == (0, 1)
        third = next(packets)
        assert next(packets, None) is None
        assert [number_of(packet) for packet in (first, second, third)] == [0, 1, 2]
