"""Checks that kept packets and batches stay valid, whichever of them are kept, and for how long."""

from __future__ import annotations

from linkrx.packets import Batch, Packet
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import PATIENCE, collect


def check_keeping(rig: Rig, backend: str) -> None:
    """Kept packets, slices and copies show the bytes that were sent, after the dispatcher is closed and others are freed."""
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
            # Free some: the oldest, or every other one.
            kept = kept[-200:] if turn % 2 else kept[::2]
    for frame, held in kept:
        assert bytes(held) == frame


def check_keeping_batches(rig: Rig, backend: str) -> None:
    """Kept batches, their columns and their copies show the frames that were sent, after later receives and close."""
    kept: list[tuple[list[bytes], Batch]] = []
    with rig.open(backend, batch_size=6) as rx:
        for turn in range(24):
            frames = [rig.frame(60 + 300 * (turn % 5) + index, 16 * turn + index) for index in range(6)]
            for frame in frames:
                rig.send(frame)
            left = list(frames)
            for batch in rx.batches(PATIENCE):
                here, left = left[: len(batch)], left[len(batch) :]
                if turn % 3 != 1:
                    kept.append((here, batch.copy() if turn % 3 else batch))
                if turn == 12:
                    kept = kept[1::2]
                if not left:
                    break
            assert not left
    for frames, held in kept:
        columns = zip(held.starts, held.lengths, strict=True)
        assert [bytes(held.memory[start : start + length]) for start, length in columns] == frames
        assert [bytes(packet) for packet in held] == frames
        assert list(held.wire_lengths) == list(map(len, frames))


def check_long_beside_short(rig: Rig, backend: str) -> None:
    """A batch shows all its frames, through `memory` and as packets, whatever the order of long and short ones is."""
    count = min(rig.queue, 10)
    long, short = rig.longest, max(60, rig.shortest)
    with rig.open(backend, batch_size=count) as rx:
        for first_short in range(count):
            frames = [rig.frame(short if n >= first_short and n % 3 else long, n) for n in range(count)]
            for frame in frames:
                rig.send(frame)
            left = list(frames)
            for batch in rx.batches(PATIENCE):
                here, left = left[: len(batch)], left[len(batch) :]
                memory, columns = batch.memory, zip(batch.starts, batch.lengths, strict=True)
                assert [bytes(memory[start : start + length]) for start, length in columns] == here
                assert batch.frames() == here
                if not left:
                    break
            assert not left
