"""Lent blocks: shown where they lie, given back once, in whatever pattern they are held; nothing faults, spins or is silent."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ring

import linkrx
from linkrx import _core
from linkrx.device import injector_on
from linkrx.rigs import LOCAL, REMOTE, veth
from linkrx.source import ETH_P_ALL
from linkrx.testing.waiting import until

pytestmark = [
    pytest.mark.usefixtures("devices"),
    pytest.mark.skipif(_core.lib is None, reason="the C core was not built"),
]

BLOCKS = 8
OPTIONS: dict[str, Any] = {
    "backend": "packet_mmap",
    "zero_copy": True,
    "receive_buffer": BLOCKS * 128 * 1024,
    "latency": 0.01,
}
HEADER = LOCAL + REMOTE + b"\x88\xb5"
Wire = tuple[str, socket.socket]


@pytest.fixture
def wire() -> Iterator[Wire]:
    """An interface, and a socket that sends to it."""
    with veth() as (near, far), injector_on(far) as injector:
        yield near, injector


def frame(number: int, size: int = 60) -> bytes:
    """A frame that tells its number."""
    return (HEADER + number.to_bytes(4, "big")).ljust(size, b"\xa5")


def numbers(batch: linkrx.Batch) -> list[int]:
    """What `frame` put in."""
    return [int.from_bytes(packet.data[:4], "big") for packet in batch]


def send_block(wire: Wire, number: int) -> None:
    """A frame, and wait until the kernel's timer has closed the block that it is in."""
    before = sum(ring.waiting())
    wire[1].send(frame(number))
    until(lambda: sum(ring.waiting()) == before + 1)


# For a block of several packets: longer than any test, for the timer may come between them.
FULL_BLOCKS: dict[str, Any] = {**OPTIONS, "latency": 600.0}


def fill_block(wire: Wire, packets: int) -> list[bytes]:
    """What fills the first block of a ring with FULL_BLOCKS, and one more frame, which has the kernel close it."""
    sent = [frame(number, ring.filling(packets)) for number in range(packets + 1)]
    for one in sent:
        wire[1].send(one)
    assert ring.waiting() == [packets]
    return sent[:-1]


def take(rx: linkrx.Dispatcher) -> linkrx.LentBatch:
    """The next batch."""
    batch = next(iter(rx.batches(10)))
    assert isinstance(batch, linkrx.LentBatch)
    return batch


def test_a_lent_batch_is_the_block_itself(wire: Wire) -> None:
    """Frames, packets and columns are those that were sent, in the ring's own memory, and the block goes back behind it."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        for turn in range(3 * BLOCKS):
            send_block(wire, turn)
            with take(rx) as batch:
                assert numbers(batch) == [turn]
                assert [bytes(packet) for packet in batch] == [frame(turn)]
                assert list(batch.lengths) == [60]
                assert batch.memory.readonly
                at = np.frombuffer(batch.memory, np.uint8).__array_interface__["data"][0]
                ((start, size),) = ring.mapped()
                assert start <= at < start + size
                assert len(ring.waiting()) == 1
            until(lambda: not ring.waiting())
        told = rx.stats()
        assert (told.packets, told.kernel_drops, told.ring_freezes) == (3 * BLOCKS, 0, 0)


def test_what_was_given_back_is_released(wire: Wire) -> None:
    """Behind its `with` a batch's memory and frames raise ValueError; columns and copies stay, and it cannot be entered."""
    with linkrx.open(wire[0], **FULL_BLOCKS) as rx:
        sent = fill_block(wire, 2)
        with take(rx) as batch:
            memory, packets, one, all_of_it = batch.memory, list(batch), batch[1].copy(), batch.copy()
        for use in (lambda: memory[0], lambda: batch.memory[0], lambda: bytes(packets[0])):
            with pytest.raises(ValueError, match="released"):
                use()
        assert list(batch.lengths) == list(map(len, sent))
        assert bytes(one) == sent[1]
        assert [bytes(packet) for packet in all_of_it] == sent
        batch.give_back()
        with pytest.raises(linkrx.LinkrxError, match=r"given back already; .* copy\(\)"):
            batch.__enter__()


def test_a_batch_that_nobody_entered_goes_back_when_it_is_collected(wire: Wire) -> None:
    """Without `with` the block is the kernel's again once the batch, and whoever refers to it, is gone."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        send_block(wire, 1)
        batch = take(rx)
        packet = batch[0]
        del batch
        gc.collect()
        assert ring.waiting() == [1]
        assert bytes(packet) == frame(1)
        del packet
        gc.collect()
        assert ring.waiting() == []


def test_several_batches_of_one_block(wire: Wire) -> None:
    """A block that is more than a batch goes back with the last of its batches, in whatever order these do."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        with linkrx.open(wire[0], **FULL_BLOCKS, batch_size=4) as rx:
            fill_block(wire, 10)
            batches = [take(rx) for _ in range(3)]
            assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
            for index in order:
                assert ring.waiting() == [10]
                batches[index].give_back()
            assert ring.waiting() == []


@pytest.mark.parametrize("held", ["newest", "oldest", "all"])
def test_blocks_held_neither_spin_nor_silence_a_wait(wire: Wire, held: str) -> None:
    """With blocks held in whatever pattern a wait sleeps, and a block that comes is seen."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        kept = []
        for number in range(3):
            send_block(wire, number)
            kept.append(take(rx))
        if held != "all":
            for batch in kept[:-1] if held == "newest" else kept[1:]:
                batch.give_back()
        waits = rx.stats().waits
        assert list(rx.batches(0.1)) == []
        assert 1 <= rx.stats().waits - waits <= 50
        for number in range(3, 6):
            wire[1].send(frame(number))
            with take(rx) as batch:
                assert numbers(batch) == [number]
        for batch, number in zip(kept, range(3), strict=True):
            if held == "all":
                assert numbers(batch) == [number]


def test_asynchronously(wire: Wire) -> None:
    """Under `async for` blocks held are no reason to spin or to be silent either, and a stop comes through."""
    kept: list[linkrx.Batch] = []
    got: list[int] = []

    async def work(rx: linkrx.Dispatcher) -> None:
        async for batch in rx.batches():
            got.extend(numbers(batch))
            if len(got) % 2:
                kept.append(batch)
            else:
                with batch:  # type: ignore[attr-defined]
                    pass
            if len(got) == 5:
                rx.stop()
            else:
                wire[1].send(frame(len(got)))

    with linkrx.open(wire[0], **OPTIONS) as rx:
        wire[1].send(frame(0))
        asyncio.run(asyncio.wait_for(work(rx), 10))
        assert got == list(range(5))
        assert [numbers(batch) for batch in kept] == [[0], [2], [4]]


def test_a_ring_that_is_lent_whole_drops_counts_and_goes_on(wire: Wire) -> None:
    """With every block held the kernel drops, which is counted with the freeze; given back, reception goes on in order."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        kept = []
        for number in range(BLOCKS):
            send_block(wire, number)
            kept.append(take(rx))
        for number in range(BLOCKS, BLOCKS + 5):
            wire[1].send(frame(number))
        assert list(rx.batches(0.05)) == []
        assert [numbers(batch) for batch in kept] == [[number] for number in range(BLOCKS)]
        told = rx.stats()
        assert (told.kernel_drops, told.ring_freezes) == (5, 1)
        while kept:
            kept.pop().give_back()
        wire[1].send(frame(99))
        assert numbers(take(rx)) == [99]


def test_what_is_held_outlives_close(wire: Wire) -> None:
    """Batches, slices and arrays held over close stay readable, the socket is gone, and the memory goes with the last."""
    rx = linkrx.open(wire[0], **OPTIONS)
    send_block(wire, 1)
    first = take(rx)
    send_block(wire, 2)
    second = take(rx)
    packet, view, array = first[0], second.memory[:8], np.frombuffer(second.memory, np.uint8)
    rx.close()
    assert len(ring.mapped()) == 1
    assert bytes(packet) == frame(1)
    second.give_back()
    assert len(bytes(view)) == 8
    assert array.sum() > 0
    first.give_back()
    del first, second, packet, view, rx
    gc.collect()
    assert len(ring.mapped()) == 1
    del array
    gc.collect()
    assert ring.mapped() == []


def test_a_slice_that_outlives_its_batch_is_readable(wire: Wire) -> None:
    """A slice made before the batch went back never faults; it shows what the kernel writes there next."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        send_block(wire, 1)
        with take(rx) as batch:
            start = batch.starts[0]
            view = batch.memory[start : start + 60]
            assert bytes(view) == frame(1)
        for number in range(BLOCKS):
            send_block(wire, 10 + number)
            with take(rx):
                pass
        assert bytes(view) == frame(10 + BLOCKS - 1)


def test_a_forked_child_can_read_what_it_holds(wire: Wire) -> None:
    """A batch that is held over a fork is readable in the child, which gives nothing back to the kernel by ending."""
    with linkrx.open(wire[0], **OPTIONS) as rx:
        send_block(wire, 1)
        with take(rx) as batch:
            child = os.fork()
            if not child:  # pragma: no cover, another process
                os._exit(0 if bytes(batch[0]) == frame(1) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert ring.waiting() == [1]


def test_a_stop_leaves_no_block_lent(wire: Wire) -> None:
    """What was received and not handed over when stop() came is undelivered, and its block is the kernel's again."""
    with linkrx.open(wire[0], **FULL_BLOCKS) as rx:
        fill_block(wire, 2)
        assert rx._reception.await_batch(10)
        rx.stop()
        assert list(rx.batches()) == []
        gc.collect()
        assert (rx.stats().packets, rx.stats().undelivered) == (0, 2)
        assert ring.waiting() == []


def test_single_packets_are_not_lent(wire: Wire) -> None:
    """All other ways to receive say what to do instead, deliver= at open; and a borrowed socket is refused."""
    with pytest.raises(linkrx.UnsupportedOption, match=r"it goes without deliver="):
        linkrx.open(wire[0], lambda *_: None, zero_copy=True)
    with linkrx.open(wire[0], zero_copy=True) as rx:
        assert rx.backend == "packet_mmap"
        for use in (rx.dispatch, rx.drain, rx.run, rx.recv, lambda: next(iter(rx)), rx.__aiter__):
            with pytest.raises(linkrx.UnsupportedOption, match=r"`with batch:`"):
                use()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as borrowed:
        borrowed.bind((wire[0], ETH_P_ALL))
        with pytest.raises(linkrx.UnsupportedOption, match=r"Give the name of the interface"):
            linkrx.open(borrowed, backend="packet_mmap", zero_copy=True)
