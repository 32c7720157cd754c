"""Conformance: what every backend must do on every source it accepts, for plug-in authors to call. No pytest inside.

    linkrx.namespace.enter_private_network()
    for cell in linkrx.testing.cells("mine"):
        print(cell.name, cell.run())

A cell is one check on one kind of source. It passes, or says that the backend refuses the source, or raises
AssertionError.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from linkrx.batch import Batch
from linkrx.capabilities import probe
from linkrx.dispatcher import Dispatcher
from linkrx.errors import UnsupportedSource
from linkrx.factory import backends
from linkrx.packet import ETH_HEADER_BYTES, Packet
from linkrx.rigs import DEVICE_RIGS, LOCAL, PLAIN_RIGS, PROTOCOL, REMOTE, MakeRig, Rig
from linkrx.stats import End

PATIENCE = 10.0  # seconds until a packet that should have come is missing

# Checks. Each opens the rig's source itself and leaves it as it was.


def collect(dispatcher: Dispatcher, packets: int) -> list[Packet]:
    """That many packets, or fewer if no more come."""
    found: list[Packet] = []
    while len(found) < packets:
        try:
            found.append(dispatcher.recv(PATIENCE))
        except TimeoutError:
            break
    return found


def _frames(rig: Rig, number: int) -> list[bytes]:
    least = max(rig.shortest, ETH_HEADER_BYTES + 4)
    return [rig.frame(least + 37 * index, index) for index in range(min(number, rig.queue))]


def check_delivery(rig: Rig, backend: str) -> None:
    """Packets are delivered whole and in order, with protocol and addresses from the header."""
    sent = _frames(rig, 50)
    calls: list[tuple[bytes | None, bytes | None, int, Packet]] = []
    with rig.open(backend, lambda *call: calls.append(call)) as rx:
        for frame in sent:
            rig.send(frame)
        while len(calls) < len(sent) and rx.dispatch(PATIENCE):
            pass
        assert [bytes(call[3]) for call in calls] == sent
        for remote, local, protocol, got in calls:
            assert (remote, local) == ((REMOTE, LOCAL) if rig.ethernet else (None, None))
            assert (remote, local, protocol) == (got.remote, got.local, got.protocol)
            assert protocol == (PROTOCOL if rig.ethernet else 0x0800)
            assert len(got.link_header) == (ETH_HEADER_BYTES if rig.ethernet else 0)
            assert bytes(got.link_header) + bytes(got.data) == bytes(got.frame)
            assert not got.truncated
            assert got.wire_length == len(got)
            assert (got.vnet is not None) == bool(rx.capabilities.vnet_header_size or rig.prefix)
        counted = rx.stats()
        assert (counted.packets, counted.bytes) == (len(sent), sum(map(len, sent)))
        assert counted.receives > 0
        assert counted.kernel_drops in (None, 0)


def check_lengths(rig: Rig, backend: str) -> None:
    """No length around a power of two, nor the longest, is cut by the default layout."""
    steps = [128, 384, 640, 1152, 1514, 2048, 2176, 4096, 4224, 8320, 16512, 32896, rig.longest]
    sizes = sorted({size for step in steps for size in (step - 1, step, step + 1) if size <= rig.longest})
    with rig.open(backend) as rx:
        for size in sizes:
            frame = rig.frame(size, size)
            rig.send(frame)
            (got,) = collect(rx, 1)
            assert bytes(got) == frame
            assert not got.truncated
        assert rx.stats().truncated == 0


def check_bad_packets(rig: Rig, backend: str) -> None:
    """Runts, empty packets and unknown IP versions are counted under their names and cost no neighbour."""
    good = [rig.frame(60 + index, index) for index in range(4)]
    runts = range(max(1, rig.shortest), ETH_HEADER_BYTES) if rig.ethernet and rig.takes_hostile else range(0)
    unknown = [b"\x00" * 40, b"\xff", b"\x50abc"] if not rig.ethernet and rig.takes_hostile else []
    empty = 2 if rig.shortest == 0 else 0
    with rig.open(backend) as rx:
        got = []
        for bad in [b"\x42" * size for size in runts] + unknown + [b""] * empty:
            for frame in (good[0], bad, good[1]):
                rig.send(frame)
            got += collect(rx, 2)
        for frame in good:
            rig.send(frame)
        got += collect(rx, 4)
        pairs = len(runts) + len(unknown) + empty
        assert [bytes(packet) for packet in got] == good[:2] * pairs + good
        counted = rx.stats()
        assert (counted.runts, counted.unknown_protocol, counted.empty) == (len(runts), len(unknown), empty)
        assert rx.end is None


def check_truncation(rig: Rig, backend: str) -> None:
    """A caller's own layout cuts what does not fit, flags it, and cuts nothing that just fits."""
    sizes = (20, 40, 60)
    with rig.open(backend, buffer_sizes=sizes) as rx:
        frames = [rig.frame(size, size) for size in (119, 120, 121, 500, 90)]
        for frame in frames:
            rig.send(frame)
        got = collect(rx, len(frames))
        assert [bytes(packet) for packet in got] == [frame[:120] for frame in frames]
        assert [packet.truncated for packet in got] == [False, False, True, True, False]
        for packet, frame in zip(got, frames, strict=True):
            assert packet.wire_length in (len(frame), len(packet))
        if rx.capabilities.socket and backend in ("readv", "recvmmsg"):
            assert [packet.wire_length for packet in got] == [len(frame) for frame in frames]
        assert rx.stats().truncated == 2


def check_columns(rig: Rig, backend: str) -> None:
    """A batch's columns, its packets and the frames that were sent say the same."""
    sent = _frames(rig, 20)
    with rig.open(backend, batch_size=7) as rx:
        for frame in sent:
            rig.send(frame)
        batches: list[Batch] = []
        for batch in rx.batches(PATIENCE):
            assert 1 <= len(batch) <= 7
            batches.append(batch)
            if sum(map(len, batches)) == len(sent):
                break
        frames = []
        for batch in batches:
            assert batch.memory.readonly
            for index, got in enumerate(batch):
                start, length = batch.starts[index], batch.lengths[index]
                frames.append(bytes(batch.memory[start : start + length]))
                assert frames[-1] == bytes(got) == bytes(batch[index])
                assert batch.protocols[index] == got.protocol
                assert batch.wire_lengths[index] == got.wire_length
                assert batch.flags[index] & 1 == got.truncated
        assert frames == sent
        assert rx.stats().batches == len(batches)


def check_keeping(rig: Rig, backend: str) -> None:
    """What is kept, in whatever pattern, still shows what was sent when everything else has come and gone."""
    kept: list[tuple[bytes, Packet | memoryview]] = []
    with rig.open(backend, batch_size=5) as rx:
        for turn in range(30):
            sent = [rig.frame(100 + 11 * turn + index, 16 * turn + index) for index in range(8)]
            for frame in sent:
                rig.send(frame)
            for index, (frame, got) in enumerate(zip(sent, collect(rx, len(sent)), strict=True)):
                if turn % 3 == 0 or index == turn % 8:
                    kept.append((frame, got))
                if index % 4 == 1:
                    kept.append((frame[20:40], got.frame[10:50][10:30]))
                if index % 5 == 2:
                    kept.append((frame, got.copy()))
    for frame, held in kept:
        assert bytes(held) == frame


def check_raising(rig: Rig, backend: str) -> None:
    """What deliver raises comes out of dispatch, and no packet is lost or delivered twice for it."""
    sent = _frames(rig, 12)
    got: list[bytes] = []

    class Refused(Exception):
        pass

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        if len(got) % 3 == 1:
            raise Refused

    raised = 0
    with rig.open(backend, deliver) as rx:
        for frame in sent:
            rig.send(frame)
        while len(got) < len(sent):
            try:
                rx.dispatch(PATIENCE)
            except Refused:
                raised += 1
    assert got == sent
    assert raised == len(sent) // 3


def check_stopping(rig: Rig, backend: str) -> None:
    """After stop() from inside deliver nothing more is delivered, and what was received is accounted for."""
    sent = _frames(rig, 10)
    got: list[bytes] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        rx.stop()

    with rig.open(backend, deliver) as rx:
        for frame in sent:
            rig.send(frame)
        assert rx.run() is End.STOPPED
        assert rx.dispatch() is False
        assert rx.drain() == 0
        assert got == sent[:1]
        counted = rx.stats()
        assert counted.packets == 1
        assert 0 <= counted.undelivered < len(sent)


def check_polling(rig: Rig, backend: str) -> None:
    """fileno() is readable exactly when drain() has something to do."""
    got: list[bytes] = []
    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet)), batch_size=4) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        assert not poll.poll(0)
        sent = _frames(rig, 10)
        for frame in sent:
            rig.send(frame)
        while len(got) < len(sent):
            assert poll.poll(PATIENCE * 1000)
            assert rx.drain() <= 4
        assert got == sent
        assert rx.drain() == 0
        assert not poll.poll(0)
        rx.stop()
        assert poll.poll(0)


def _descriptors() -> set[str]:
    """The numbers of the open descriptors; listing them opens one more, the same one each time."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def check_restoring(rig: Rig, backend: str) -> None:
    """Nothing is left behind, open or refused: no descriptor, no changed flag, no packet taken."""
    before = _descriptors()
    found = probe(rig.source)
    for _ in range(3):
        with rig.open(backend) as rx:
            assert rx.backend == backend
        rx.close()
    assert probe(rig.source) == found
    assert _descriptors() == before


CHECKS: tuple[Callable[[Rig, str], None], ...] = (
    check_delivery,
    check_lengths,
    check_bad_packets,
    check_truncation,
    check_columns,
    check_keeping,
    check_raising,
    check_stopping,
    check_polling,
    check_restoring,
)


@dataclass(frozen=True)
class Cell:
    """One backend on one kind of source under one check."""

    backend: str
    make_rig: MakeRig
    check: Callable[[Rig, str], None]

    @property
    def name(self) -> str:
        """For reports: backend-source-check."""
        source = getattr(self.make_rig, "__name__", "source")
        return f"{self.backend}-{source}-{self.check.__name__.removeprefix('check_')}"

    def run(self) -> str:
        """Say "supported" after the check passed, "refused" when the backend says why it does not take the source.

        A refusal must name both. An option that the backend does not honour leaves nothing to check: "supported".
        """
        info = next(info for info in backends() if info.name == self.backend)
        with self.make_rig() as rig:
            reason = info.backend.refuses(probe(rig.source))
            if reason is None:
                if self.check is not check_truncation or "buffer_sizes" in info.honours:
                    self.check(rig, self.backend)
                return "supported"
            try:
                rig.open(self.backend).close()
            except UnsupportedSource as error:
                told = str(error)
            else:
                raise AssertionError(f"{self.backend} refuses the source ({reason}), but opened it")
            assert self.backend in told
            assert reason in told
            return "refused"


def cells(backend: str, rigs: tuple[MakeRig, ...] = PLAIN_RIGS + DEVICE_RIGS) -> list[Cell]:
    """All cells of one backend."""
    return [Cell(backend, make_rig, check) for make_rig in rigs for check in CHECKS]
