"""Checks of limits: a number of packets, a duration, and stop(flush=True)."""

from __future__ import annotations

import threading

from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.receiving.stats import End
from linkrx.sources.capabilities import probe
from linkrx.testing.cells import named
from linkrx.testing.packets import sample
from linkrx.testing.rigs import Rig
from linkrx.testing.stops import alarmed, ignore
from linkrx.testing.waiting import asleep, flooded, running, until, watched

SHORT = 0.01  # seconds
FOR_EVER = 1e9
SMALL = 1 << 18  # bytes of a queue


def check_limits(rig: Rig, backend: str) -> None:
    """run(count=) delivers that many packets and keeps the rest of the batch; durations hold in a flood; a limit ends nothing."""
    got: list[bytes] = []
    sent = sample(rig, 9)
    with rig.open(backend, lambda *received: got.append(bytes(received[3]))) as rx:
        for frame in sent:
            rig.send(frame)
        for count in (1, 3, 4):
            before = len(got)
            assert rx.run(count=count) is None
            assert len(got) == before + count
        assert bytes(rx.recv()) == sent[8]
        assert got == sent[:8]
        assert rx.run(duration=0) is None
        assert rx.run(count=5, duration=SHORT) is None
        assert list(rx.batches(duration=SHORT)) == []
        for limit in (0, -1):
            try:
                rx.run(count=limit)
            except ValueError:
                continue
            raise AssertionError(f"run() took count={limit}")
        with flooded(rig) as flood:
            until(lambda: flood[0] > 10)
            assert rx.run(duration=SHORT) is None
            for _ in rx.batches(duration=SHORT):
                pass
        assert rx.end is None
        rx.stop()
        assert rx.run(count=1, duration=SHORT) is End.STOPPED


def _each(rx: Dispatcher) -> list[Packet]:
    return list(rx)


def _by_batch(rx: Dispatcher) -> list[Packet]:
    return [packet for batch in rx.batches() for packet in batch]


def check_flush(rig: Rig, backend: str) -> None:
    """After stop(flush=True) every way to receive gives the packets that had come, then ends. A stop() after it ends at once."""
    got: list[Packet] = []
    sent = sample(rig, 6)

    def run(rx: Dispatcher) -> list[Packet]:
        got.clear()
        assert rx.run() is End.STOPPED
        return got

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(packet)

    for way in (run, _each, _by_batch):
        with rig.open(backend, deliver, batch_size=4) as rx:
            for frame in sent:
                rig.send(frame)
            rx.stop(flush=True)
            assert [bytes(packet) for packet in way(rx)] == sent
            assert rx.end is End.STOPPED
            stats = rx.stats()
            assert (stats.packets, stats.undelivered) == (6, 0)
    with rig.open(backend, ignore) as rx:
        rig.send(sent[0])
        rx.stop(flush=True)
        rx.stop()
        assert rx.run() is End.STOPPED
        assert rx.stats().packets == 0


def check_flush_in_a_wait(rig: Rig, backend: str) -> None:
    """stop(flush=True) from another thread or a signal handler ends a wait."""
    with rig.open(backend, ignore) as rx:
        with running(rx.run):
            until(lambda: asleep(rx))
            rx.stop(flush=True)
        assert rx.end is End.STOPPED
    # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
    with rig.open(backend, ignore) as rx, alarmed(lambda _: rx.stop(flush=True), first=SHORT, interval=SHORT):
        assert rx.run() is End.STOPPED


def check_flush_under_load(rig: Rig, backend: str) -> None:
    """In a flood stop(flush=True) ends. Every packet that the kernel had taken before is delivered, or counted as its drop."""
    began = threading.Event()
    # A flush ends at the latest after as many packets as the queue holds.
    small = {"receive_buffer": SMALL} if probe(rig.source).socket else {}
    with rig.open(backend, lambda *_: began.set(), **small) as rx:
        with flooded(rig) as flood, running(rx.run):
            try:
                began.wait()
                before = flood[0]
                rx.stop(flush=True)
                until(lambda: rx.end is not None)
            finally:
                rx.stop()
        stats = rx.stats()
        assert rx.end is End.STOPPED
        assert stats.packets + (stats.kernel_drops or 0) >= before


def check_latency(rig: Rig, backend: str) -> None:
    """Packets are held back until they are a full batch, however long `latency` is. A call that does not wait holds none back.

    A backend that holds packets back by itself delivers them after a short latency.
    """
    by_itself = named(backend).backend.coalesces
    sent = sample(rig, 6)
    latency = SHORT if by_itself else FOR_EVER
    with rig.open(backend, ignore, batch_size=len(sent), latency=latency) as rx, watched(rx):

        def send() -> None:
            until(lambda: asleep(rx))
            for frame in sent:
                rig.send(frame)

        with running(send):
            got = next(rx.batches()).frames()
            while by_itself and len(got) < len(sent):
                got += next(rx.batches()).frames()
        assert got == sent
        rig.send(sent[0])
        assert by_itself or rx.drain() == 1
