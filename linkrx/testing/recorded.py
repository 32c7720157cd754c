"""Checks of sources that have all their packets before they are opened, such as capture files."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.receiving.stats import End
from linkrx.testing.exceptions import Interrupted
from linkrx.testing.packets import around
from linkrx.testing.resources import check_restoring
from linkrx.testing.rigs import Inapplicable, Rig
from linkrx.testing.stops import ignore, is_over

STEPS = (14, 60, 64, 1514, 9000, 65_535)


def _recorded(rig: Rig, count: int = 300) -> list[bytes]:
    """Put `count` frames, and some of special lengths, into the file. Returns all of them."""
    if not rig.recorded:
        raise Inapplicable("it is no recording: more packets may come")
    sizes = [60 + 7 * (number % 200) for number in range(count)]
    sent = [rig.frame(size, number) for number, size in enumerate(sizes + around(STEPS, rig)) if size >= 14]
    for frame in sent:
        rig.send(frame)
    return sent


def _by_run(rx: Dispatcher, got: list[bytes]) -> None:
    assert rx.run() is End.EOF


def _by_dispatch(rx: Dispatcher, got: list[bytes]) -> None:
    while rx.dispatch():
        pass


def _by_drain(rx: Dispatcher, got: list[bytes]) -> None:
    poll = select.poll()
    poll.register(rx.fileno(), select.POLLIN)
    while rx.end is None:
        assert poll.poll(0), "fileno() was not readable before the end"
        rx.drain()
    assert not poll.poll(0), "fileno() was readable after the end"


def _by_packet(rx: Dispatcher, got: list[bytes]) -> None:
    got += map(bytes, rx)


def _by_batch(rx: Dispatcher, got: list[bytes]) -> None:
    for batch in rx.batches():
        got += batch.frames()


def _by_recv(rx: Dispatcher, got: list[bytes]) -> None:
    try:
        while True:
            got.append(bytes(rx.recv()))
    except EOFError:
        pass


def _asynchronously(rx: Dispatcher, got: list[bytes]) -> None:
    async def take() -> None:
        got.extend([bytes(packet) async for packet in rx])

    asyncio.run(take())


WAYS: tuple[Callable[[Dispatcher, list[bytes]], None], ...] = (
    _by_run,
    _by_dispatch,
    _by_drain,
    _by_packet,
    _by_batch,
    _by_recv,
    _asynchronously,
)


def check_recorded(rig: Rig, backend: str) -> None:
    """Every way to receive gives all packets whole and in order, then the end, with any batch size and each time it is opened."""
    sent = _recorded(rig)
    got: list[bytes] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))

    for number, way in enumerate(WAYS):
        got.clear()
        with rig.open(backend, deliver, batch_size=(None, 1, 7)[number % 3]) as rx:
            way(rx, got)
            assert got == sent
            is_over(rx, End.EOF)
            stats = rx.stats()
            assert (stats.packets, stats.bytes) == (len(sent), sum(map(len, sent)))
            assert (stats.waits, stats.undelivered, stats.kernel_drops) == (0, 0, None)


def check_recorded_stops(rig: Rig, backend: str) -> None:
    """After a limit or an exception of deliver, reception goes on with the next packet. stop() ends it, with flush=True after the last."""
    sent = _recorded(rig)
    got: list[bytes] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        if len(got) == 10:
            raise Interrupted

    with rig.open(backend, deliver) as rx:
        assert rx.run(count=4) is None
        try:
            rx.run()
        except Interrupted:
            pass
        else:
            raise AssertionError("the exception of deliver did not come out of run()")
        assert got == sent[:10]
        assert bytes(rx.recv()) == sent[10]
        assert rx.run(count=1000 * len(sent)) is End.EOF
        assert got == sent[:10] + sent[11:]
    for flush in (False, True):
        with rig.open(backend, ignore) as rx:
            rx.recv()
            rx.stop(flush=flush)
            assert rx.run() in (End.STOPPED, End.EOF)
            assert rx.stats().packets == (len(sent) if flush else 1)


def check_recorded_filters(rig: Rig, backend: str) -> None:
    """A filter holds from the first packet on. One that is set while packets wait holds for the next packet."""
    sent = _recorded(rig)
    ends_even = [(0x20, 0, 0, 14), (0x45, 0, 1, 1), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF)]
    whole = [frame for frame in sent if len(frame) >= 18]
    even = [frame for frame in whole if not frame[17] & 1]
    with rig.open(backend, filter=ends_even) as rx:
        assert [bytes(packet) for packet in rx] == even
        assert rx.stats().filtered == len(sent) - len(even)
    with rig.open(backend) as rx:
        assert [bytes(rx.recv()) for _ in range(5)] == sent[:5]
        rx.set_filter(ends_even)
        assert [bytes(packet) for packet in rx] == [frame for frame in even if frame not in sent[:5]]


def check_recorded_keeping(rig: Rig, backend: str) -> None:
    """All packets, batches and copies of batches stay valid after the end and after close."""
    sent = _recorded(rig, 3000)
    with rig.open(backend) as rx:
        packets = list(rx)
    with rig.open(backend, batch_size=11) as rx:
        batches = [batch if number % 2 else batch.copy() for number, batch in enumerate(rx.batches())]
    assert [bytes(packet) for packet in packets] == sent
    assert [frame for batch in batches for frame in batch.frames()] == sent


def check_recorded_restoring(rig: Rig, backend: str) -> None:
    """Opening and closing leaves nothing behind."""
    _recorded(rig, 10)
    check_restoring(rig, backend)
