"""Checks of what reception takes and gives back, and of what the kernel and linkrx count."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from pathlib import Path

from linkrx.kernel.uapi import (
    PACKET_AUXDATA,
    PACKET_IGNORE_OUTGOING,
    PACKET_VERSION,
    SO_TIMESTAMPNS,
    SOL_PACKET,
)
from linkrx.packets import Packet
from linkrx.sources.capabilities import probe
from linkrx.testing.packets import sample
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import PATIENCE, number_of, patiently

CYCLES = 20
FLOOD = 5000  # more frames than any rig's queue holds


def descriptors() -> set[str]:
    """The numbers of the open descriptors; listing them opens one more, the same one each time."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def settings_of(source: object) -> dict[int, int]:
    """What linkrx may change on a socket, by the option's number; nothing of other sources."""
    if not isinstance(source, socket.socket):
        return {}
    settings = {
        name: source.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_RCVBUF, SO_TIMESTAMPNS)
    }
    if source.family == socket.AF_PACKET:
        names = (PACKET_AUXDATA, PACKET_IGNORE_OUTGOING, PACKET_VERSION)
        settings |= {name: source.getsockopt(SOL_PACKET, name) for name in names}
    return settings


def check_restoring(rig: Rig, backend: str) -> None:
    """Nothing is left behind, open or closed: no descriptor, no thread, no changed flag, no packet taken."""
    before, threads = descriptors(), threading.active_count()
    found, settings = probe(rig.source), settings_of(rig.source)
    changes = {"receive_buffer": 123_456} if found.socket else {}
    for _ in range(CYCLES):
        with rig.open(backend, **changes) as rx:
            assert rx.backend == backend
            assert threading.active_count() == threads
        rx.close()
    assert probe(rig.source) == found
    assert settings_of(rig.source) == settings
    assert descriptors() == before


def check_polling(rig: Rig, backend: str) -> None:
    """fileno() is readable exactly when drain() has something to do, the end included, which is told once."""
    got: list[bytes] = []
    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet)), batch_size=4) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        assert not poll.poll(0)
        sent = sample(rig, 10)
        for frame in sent:
            rig.send(frame)
        for _ in patiently(lambda: len(got) >= len(sent)):
            assert poll.poll(PATIENCE * 1000)
            assert rx.drain() <= 4
        assert got == sent
        assert rx.drain() == 0
        assert not poll.poll(0)
    # Long ones, more than an arena has room for: what waits inside must be announced as well.
    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet))) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        sent = [rig.frame(rig.longest, number) for number in range(min(rig.queue, 12))]
        for frame in sent:
            rig.send(frame)
        got.clear()
        for _ in patiently(lambda: len(got) >= len(sent)):
            assert poll.poll(PATIENCE * 1000)
            rx.drain()
        assert got == sent
        assert rx.drain() == 0
        assert not poll.poll(0)
        rx.stop()
        assert poll.poll(0)
        assert rx.drain() == 0
        assert rx.end is not None
        rx.stop()
        poll.register(rx.fileno(), select.POLLIN)
        assert not poll.poll(0)


def check_overrun(rig: Rig, backend: str) -> None:
    """In a flood that overruns the queue, what was sent is what was delivered and what the kernel counts as dropped."""
    got: list[int] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(number_of(rig, packet))

    # The kernel's smallest buffer: 2304 bytes, less than three frames of a thousand.
    small = {"receive_buffer": 2304} if probe(rig.source).socket else {}
    sent = refused = 0
    if not isinstance(rig.source, str):
        with rig.open(backend) as rx:  # another one's drops are not those of the next
            for number in range(FLOOD):
                with suppress(BlockingIOError):
                    rig.send(rig.frame(1000, number))
            for _ in rx.batches(0):
                pass
    with rig.open(backend, deliver, **small) as rx:
        for turn in range(3):
            for _ in range(FLOOD):
                try:
                    rig.send(rig.frame(1000, sent))
                except BlockingIOError:
                    refused += 1
                else:
                    sent += 1
            if turn < 2:
                rx.drain()
                rx.stats()  # what is asked for in between must not be lost to the end
        while rx.drain():
            pass
        told = rx.stats()
        assert (told.kernel_drops is None) == (rx.capabilities.kind in ("pipe", "capture_file"))
        drops = told.kernel_drops or 0
        assert len(got) + drops == sent
        assert told.packets == len(got)
        assert got == sorted(set(got))
        # Either the sender was told or the kernel counted: the queue was overrun.
        assert drops + refused > 0
