"""Dispatchers with `latency`, and senders for them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import linkrx
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import asleep, running, until
from support.pairs import frame, pair
from support.super_packets import UDP, Super

FOR_EVER = 1e9  # seconds
SEGMENT: dict[str, Any] = {"vnet_header": True, "segment": True}


def held_back(rx: linkrx.Dispatcher) -> int:
    """The number of frames that are held back now."""
    return rx._report.held_back


def one_by_one(
    rx: linkrx.Dispatcher, send: Callable[[Any], object], frames: list[Any], waits: int = 0
) -> None:
    """Send frames when the receiving thread has waited once more, each after the last one was received."""
    until(lambda: rx.stats().waits > waits)
    for number, data in enumerate(frames, 1):
        send(data)
        if number < len(frames):
            until(lambda number=number: held_back(rx) == number)  # type: ignore[misc]


@contextmanager
def holding(backend: str, count: int, **options: Any) -> Iterator[tuple[linkrx.Dispatcher, socket.socket]]:
    """A dispatcher in a thread that runs, and holds back `count` frames; and the sender."""
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, ignore, backend=backend, latency=FOR_EVER, **options) as rx,
        running(rx.run),
    ):
        try:
            until(lambda: asleep(rx))
            for number in range(count):
                sender.send(frame(number))
            until(lambda: held_back(rx) == count)
            yield rx, sender
        finally:
            rx.stop()


def super_packet(numbers: range) -> bytes:
    """A super-packet with one frame for each number, and its virtio-net header."""
    data = b"".join(bytes([number] * 8) for number in numbers)
    case = Super(protocol=UDP, payload=len(data), size=8, data=data)
    return case.vnet() + case.frame()
