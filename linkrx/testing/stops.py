"""Checks of the end of reception: by stop(), by a peer that closes, by close()."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from linkrx.errors import Closed
from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.receiving.stats import End
from linkrx.registry import backends
from linkrx.sources.capabilities import probe
from linkrx.testing.cells import Inapplicable
from linkrx.testing.packets import sample
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import PATIENCE, asleep, collect, flooded, running, until


def ignore(*_: object) -> None:
    """A deliver that does nothing."""


@contextmanager
def alarmed(
    handler: Callable[[FrameType | None], object], *, first: float, interval: float = 0
) -> Iterator[None]:
    """Call `handler` from a signal handler after `first` seconds and then every `interval` seconds, with the interrupted frame."""
    before = signal.signal(signal.SIGALRM, lambda _, frame: handler(frame))
    try:
        signal.setitimer(signal.ITIMER_REAL, first, interval)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_over(rx: Dispatcher, end: End) -> None:
    """Assert that every way to receive reports the end, at once and each time."""
    for _ in range(2):
        assert rx.end is end
        assert rx.run() is end
        assert rx.dispatch() is False
        assert rx.drain() == 0
        assert list(rx) == []
        assert list(rx.batches()) == []
        try:
            rx.recv()
        except EOFError:
            continue
        raise AssertionError("recv() returned a packet after the end")


def check_stop_at_rest(rig: Rig, backend: str) -> None:
    """stop() ends reception before the first receive and between batches. A second one, and one after close, are harmless."""
    got: list[Packet] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(packet)

    sent = sample(rig, 6)
    with rig.open(backend, deliver) as rx:
        rx.stop()
        rig.send(sent[0])
        is_over(rx, End.STOPPED)
        assert got == []
        # Closing discards the queue of a packet socket that linkrx opened, and of a ring.
        queue_goes = (
            isinstance(rig.source, str) or rx.stats().ring_freezes is not None or not rig.keeps_unread
        )
    rx.stop()
    rx.close()
    with rig.open(backend, deliver, batch_size=2) as rx:
        if queue_goes:
            rig.send(sent[0])
        for frame in sent[1:4]:
            rig.send(frame)
        assert rx.dispatch(PATIENCE) is True
        rx.stop()
        rx.stop()
        is_over(rx, End.STOPPED)
        assert 1 <= len(got) <= 2
        assert [bytes(packet) for packet in got] == sent[: len(got)]
        stats = rx.stats()
        assert stats.packets == len(got)
    if _keeps_what_is_unread(rig, backend):
        with rig.open(backend) as rx:
            assert len(got) + stats.undelivered + sum(map(len, rx.batches(0))) == 4


def _stop(rx: Dispatcher, _: FrameType | None) -> None:
    rx.stop()


def check_stop_in_a_wait(rig: Rig, backend: str) -> None:
    """stop() from another thread or from a signal handler ends a wait, in every way to receive."""
    ways: list[Callable[[Dispatcher], object]] = [
        lambda rx: rx.run(),
        lambda rx: rx.dispatch(PATIENCE),
        lambda rx: list(rx.batches()),
        list,
    ]
    for way in ways:
        with rig.open(backend, ignore) as rx:
            with running(lambda way=way, rx=rx: way(rx)):  # type: ignore[misc]
                until(lambda rx=rx: asleep(rx))  # type: ignore[misc]
                rx.stop()
            is_over(rx, End.STOPPED)
        with rig.open(backend, ignore) as rx, alarmed(partial(_stop, rx), first=0.002, interval=0.01):
            way(rx)
            is_over(rx, End.STOPPED)


def check_stop_under_load(rig: Rig, backend: str) -> None:
    """After stop() from another thread no delivery begins, also in a flood. All packets are accounted for."""
    started, may_go_on = threading.Event(), threading.Event()
    delivered: list[Packet] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        delivered.append(packet)
        if len(delivered) == 3:
            started.set()
            assert may_go_on.wait(PATIENCE)

    with rig.open(backend, deliver) as rx:
        with flooded(rig) as sent, running(rx.run):
            try:
                assert started.wait(PATIENCE)
                rx.stop()
            finally:
                may_go_on.set()
                rx.stop()
        assert len(delivered) == 3
        stats = rx.stats()
        assert stats.packets == 3
        is_over(rx, End.STOPPED)
    if _keeps_what_is_unread(rig, backend):
        with rig.open(backend) as rest:
            left = sum(map(len, rest.batches(0)))
        assert 3 + stats.undelivered + left + (stats.kernel_drops or 0) == sent[0]


def check_stop_from_deliver(rig: Rig, backend: str) -> None:
    """After stop() inside deliver no packet is delivered. All packets are accounted for."""
    sent = sample(rig, 10)
    got: list[bytes] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        rx.stop()

    with rig.open(backend, deliver) as rx:
        for frame in sent:
            rig.send(frame)
        assert rx.run() is End.STOPPED
        is_over(rx, End.STOPPED)
        assert got == sent[:1]
        counted = rx.stats()
        assert counted.packets == 1
    if _keeps_what_is_unread(rig, backend):
        with rig.open(backend) as rx:
            assert 1 + counted.undelivered + sum(map(len, rx.batches(0))) == len(sent)


def _keeps_what_is_unread(rig: Rig, backend: str) -> bool:
    """Whether packets that were not read stay for the next dispatcher. They do not in a socket of linkrx, a ring or a file."""
    chosen = next(info for info in backends() if info.name == backend)
    if isinstance(rig.source, str) or not rig.keeps_unread:
        return False
    return chosen.backend.discouraged(probe(rig.source)) is None


def check_hang_up(rig: Rig, backend: str) -> None:
    """When the peer closes, reception ends after the packets that it sent. A datagram socket goes on: the kernel reports no end."""
    if rig.hang_up is None:
        raise Inapplicable("it has no other end to close")
    sent = sample(rig, 7)
    with rig.open(backend, ignore, batch_size=3) as rx:
        for frame in sent:
            rig.send(frame)
        if rig.shortest == 0 and not rig.prefix:
            rig.send(b"")
            rig.send(sent[0])
            sent = [*sent, sent[0]]
        rig.hang_up()
        assert [bytes(packet) for packet in collect(rx, len(sent))] == sent
        if rx.capabilities.kind == "unix_dgram":
            assert rx.dispatch(0.01) is True
            assert rx.end is None
        else:
            assert rx.run() is End.EOF
            waits = rx.stats().waits
            is_over(rx, End.EOF)
            assert rx.stats().waits == waits
        assert rx.stats().undelivered == 0


def check_closing(rig: Rig, backend: str) -> None:
    """After close(), also from inside deliver, every use raises Closed. Its attributes stay readable."""
    opened: list[Dispatcher] = []
    with rig.open(backend, lambda *_: opened[0].close()) as rx:
        opened.append(rx)
        rig.send(rig.frame(100))
        assert rx.dispatch(PATIENCE) is False
    uses: list[Callable[[], object]] = [
        rx.dispatch,
        rx.drain,
        rx.run,
        rx.recv,
        rx.batches,
        rx.fileno,
        rx.stats,
        lambda: next(iter(rx)),
        rx.__enter__,
    ]
    for use in uses:
        try:
            use()
        except Closed:
            continue
        raise AssertionError(f"{use} works after close")
    assert rx.backend == backend
    assert rx.capabilities.title
    assert rx.choice.explain()
