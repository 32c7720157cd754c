"""Measures sending one frame at a time and in batches, against os.write, socket.send and the same system call in a C loop."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from compiled import library
from floors import Frames
from race import Check, Drain, Queue, Reader, race

import linkrx
from linkrx.kernel.uapi import ETH_P_ALL, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE, SOL_PACKET
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import veth

PACKETS = 512
AT_ONCE = 64
BUFFER = 64 * 1024 * 1024

Send = Callable[[], object]
SINGLY = {"tap": "os.write", "packet": "socket.send"}


class FarEnd(Queue):
    """The far end, which receives the sent frames. It does not read while sending is measured."""

    def fill(self) -> None:
        """Send nothing: the reader sends."""


def sender(queue: FarEnd, name: str, send: Send) -> Reader:
    """A function that sends all frames, with or without a check at the far end."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        if check is None:

            def sent() -> int:
                send()
                return queue.packets

            yield sent
            return
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as seen:
            seen.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            seen.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            seen.bind((name, ETH_P_ALL))

            def looked() -> int:
                send()
                for _ in range(queue.packets):
                    check(seen.recv(65_536))
                return check.packets

            yield looked

    return Reader(queue, opened)


def ways(source: str, opened: Any, out: socket.socket, frames: list[bytes]) -> Iterator[tuple[str, Send]]:
    """All senders of these frames: linkrx on `opened`, and by hand on `out`."""
    fd = opened.fileno() if source == "tap" else out.fileno()
    rx = linkrx.open(opened)

    def by_hand() -> None:
        if source == "tap":
            for frame in frames:
                os.write(fd, frame)
        else:
            send = out.send
            for frame in frames:
                send(frame)

    def singly() -> None:
        send = rx.send
        for frame in frames:
            send(frame)

    def batches() -> None:
        for batch in lists:
            assert rx.send_batch(batch) == len(batch)

    lists = [frames[first : first + AT_ONCE] for first in range(0, len(frames), AT_ONCE)]
    memory = b"".join(frames)
    call = library("floors").send_all
    arguments = (fd, memory, *map(ctypes.c_long, (len(frames[0]), len(frames), source == "packet")))
    with rx:
        yield SINGLY[source], by_hand
        yield "C floor", lambda: call(*arguments)
        yield "send", singly
        yield "send_batch", batches


@pytest.mark.parametrize("size", [64, 1514])
@pytest.mark.parametrize("source", ["packet", "tap"])
def test_sending(benchmark: Any, source: str, size: int) -> None:
    """All senders send to the same device. The floor is sendmmsg() of 64 frames, or write()."""
    made = Frames(size)
    frames = list(made.numbered(PACKETS))
    with ExitStack() as stack:
        if source == "tap":
            opened: Any = stack.enter_context(linkrx.TunTap())
            Device(opened.name).set_up()
            far = opened.name
        else:
            opened, far = stack.enter_context(veth())
        out = stack.enter_context(injector_on(far if source == "tap" else opened))
        queue = FarEnd(made, out, PACKETS)
        readers: dict[str, Reader] = {}
        waiting = ways(source, opened, out, frames)
        stack.callback(waiting.close)  # type: ignore[attr-defined]
        for _ in range(4):
            name, send = next(waiting)
            readers[name] = sender(queue, far, send)
        race(benchmark, readers, "send", source=source, size=size, packets=PACKETS)
