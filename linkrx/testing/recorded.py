"""Checks of sources that are there whole before they are opened, as capture files are."""

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
    """So many frames, and some of other lengths, in the file."""
    if not rig.recorded:
        raise Inapplicable("more may come: it has no end of its own")
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
        assert poll.poll(0), "fileno() was silent in front of the end"
        rx.drain()
    assert not poll.poll(0), "fileno() was readable behind the end"


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
    """By every way to receive all comes whole and in order, then the end, in batches of any size, each time it is opened."""
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
            told = rx.stats()
            assert (told.packets, told.bytes) == (len(sent), sum(map(len, sent)))
            assert (told.waits, told.undelivered, told.kernel_drops) == (0, 0, None)


def check_recorded_stops(rig: Rig, backend: str) -> None:
    """Limits, stop, stop that flushes, an exception of deliver: nothing comes twice, and what is left comes next or is left."""
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
            raise AssertionError("what deliver raised did not come out")
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
    """A filter from the first packet on, and one that is set while packets wait: every packet is judged by the one in force."""
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
    """Every packet, and copies of every batch, kept to the end and past it, show what was recorded."""
    sent = _recorded(rig, 3000)
    with rig.open(backend) as rx:
        packets = list(rx)
    with rig.open(backend, batch_size=11) as rx:
        batches = [batch if number % 2 else batch.copy() for number, batch in enumerate(rx.batches())]
    assert [bytes(packet) for packet in packets] == sent
    assert [frame for batch in batches for frame in batch.frames()] == sent


def check_recorded_restoring(rig: Rig, backend: str) -> None:
    """Opened and closed again and again it leaves nothing behind."""
    _recorded(rig, 10)
    check_restoring(rig, backend)
