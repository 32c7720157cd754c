"""Checks of descriptors, threads and settings, of polling, and of counters."""

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
SMALL_FLOOD = 2000  # the same with the smallest receive buffer: a TAP queue has 1000 frames, and others less


def descriptors() -> set[str]:
    """The open descriptors. Listing them opens one more, which is the same each time."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def settings_of(source: object) -> dict[int, int]:
    """The socket options that linkrx may change, by number. Empty for other sources."""
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
    """Opening and closing leaves no descriptor, no thread and no changed setting behind."""
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
    """fileno() is readable exactly when drain() has work to do. It is readable once for the end."""
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
    # More long frames than fit into an arena: fileno() must be readable for frames that linkrx holds, too.
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
    """In a flood that overruns the queue, delivered packets and the kernel's drops add up to the packets sent."""
    got: list[int] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(number_of(rig, packet))

    # The kernel's smallest buffer (SOCK_MIN_RCVBUF): less than three frames of 1000 bytes.
    small = {"receive_buffer": 2304} if probe(rig.source).socket else {}
    sent = refused = 0
    if not isinstance(rig.source, str):
        with rig.open(backend) as rx:  # the drops of this dispatcher must not count for the next
            for number in range(FLOOD):
                with suppress(BlockingIOError):
                    rig.send(rig.frame(1000, number))
            for _ in rx.batches(0):
                pass
    with rig.open(backend, deliver, **small) as rx:
        for turn in range(3):
            for _ in range(SMALL_FLOOD):
                try:
                    rig.send(rig.frame(1000, sent))
                except BlockingIOError:
                    refused += 1
                else:
                    sent += 1
            if turn < 2:
                rx.drain()
                rx.stats()  # drops that were read here must be in the final count
        while rx.drain():
            pass
        stats = rx.stats()
        assert (stats.kernel_drops is None) == (rx.capabilities.kind in ("pipe", "capture_file"))
        drops = stats.kernel_drops or 0
        assert len(got) + drops == sent
        assert stats.packets == len(got)
        assert got == sorted(set(got))
        # The queue was overrun: the kernel refused a frame, or dropped one.
        assert drops + refused > 0
