"""Packets that are held, and those that nobody holds, which are given again: the way they come makes no difference."""

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

# What a consumer does with a packet: hold nothing of it; or it, in one of many ways.
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
    """The packet that one of KEEP holds."""
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
    """A dispatcher for which so many numbered frames are queued."""
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
    """`deliver`, which raises at times."""

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
def test_what_is_held_is_never_another(way: Way, pattern: list[int], last: int) -> None:
    """Packets held in whatever way, or for as long as a few more come, show what was sent; each comes once, in order."""
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
def test_what_nobody_holds_is_given_again(way: Way) -> None:
    """A consumer that keeps nothing sees no more than a few packet objects, however many packets come."""
    seen: set[int] = set()
    way(140, lambda packet: seen.add(id(packet)))
    assert len(seen) <= 6


def test_iterators_side_by_side() -> None:
    """Two iterations of one batch, the list of it, and its packets by index do not disturb each other."""
    with received(5) as rx:
        batch = next(rx.batches(0))
        pairs = [(number_of(one), number_of(other)) for one in batch for other in batch]
        assert pairs == [(one, other) for one in range(5) for other in range(5)]
        for number, (one, other, third) in enumerate(zip(batch, batch, list(batch), strict=True)):
            assert [number_of(packet) for packet in (one, other, third, batch[number])] == [number] * 4


def test_a_packet_held_by_an_iterator_that_waits() -> None:
    """The packet that came last stays what it is while its iterator is asked for no more, and behind its end."""
    with received(3) as rx:
        packets = iter(next(rx.batches(0)))
        first = next(packets)
        second = next(packets)
        assert (number_of(first), number_of(second)) == (0, 1)
        third = next(packets)
        assert next(packets, None) is None
        assert [number_of(packet) for packet in (first, second, third)] == [0, 1, 2]
