"""Blocks of a ring that nobody copies: what is held of them stays true all the same, and the kernel gets them back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import ring
from test_packet_mmap import NO_TIMER, Wire, frame, number_of, packet_socket, ring_on, wire
from test_reentry import child

import linkrx
from linkrx import _core, arena, loans
from linkrx.backends.packet_mmap import BLOCK_LEAST
from linkrx.testing.exceptions import is_the_loop
from linkrx.testing.waiting import until

__all__ = ["wire"]

pytestmark = [
    pytest.mark.usefixtures("devices"),
    pytest.mark.skipif(_core.lib is None, reason="the C core was not built"),
    pytest.mark.skipif(
        not arena.REFERENCE_COUNTS_ARE_EXACT,
        reason="reference counts are not exact on this interpreter, so nothing is lent",
    ),
]

SIZE = 1514
PER_BLOCK = 81  # of these frames, with what the kernel puts in front of each
BLOCKS = 64
LAP = PER_BLOCK * BLOCKS
# Blocks are closed when they are full, so a loan is as large as it gets.
RING: dict[str, Any] = {"receive_buffer": BLOCKS * BLOCK_LEAST, "latency": NO_TIMER}


def big(number: int) -> bytes:
    """A frame that tells its number, and is like no other."""
    return frame(number, 60) + bytes([number % 251]) * (SIZE - 60)


def send(wire: Wire, first: int, count: int) -> None:
    """So many frames in a row."""
    for number in range(first, first + count):
        wire[2].send(big(number))


def is_lent(batch: linkrx.Batch) -> bool:
    """Whether its frames lie in the ring."""
    at = np.frombuffer(batch.memory, np.uint8).__array_interface__["data"][0]
    return any(start <= at < start + size for start, size in ring.mapped())


def numbers(batch: linkrx.Batch) -> list[int]:
    """What `frame` put in; and every byte is as it was sent."""
    found = [number_of(packet) for packet in batch]
    for packet, number in zip(batch, found, strict=True):
        assert bytes(packet) == big(number)
    return found


def received(rx: linkrx.Dispatcher, count: int) -> list[bool]:
    """Receive so many packets as a consumer does that keeps nothing: of which batches were lent."""
    lent = []
    for batch in rx.batches(10):
        lent.append(is_lent(batch))
        count -= len(numbers(batch))
        if not count:
            break
    assert not count
    return lent


def in_blocks(blocks: int) -> int:
    """So many frames that these blocks are closed, and the next is begun."""
    return blocks * PER_BLOCK + 1


def test_full_blocks_are_lent_and_the_newest_is_copied(wire: Wire) -> None:
    """A batch of several full blocks lies in the ring, and starts, lengths and bytes are right; the newest block is copied."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(10))
        assert ring.waiting() == [PER_BLOCK] * 10
        got, sizes, lent = [], [], []
        for batch in rx.batches(0):
            got += numbers(batch)
            sizes.append(len(batch))
            lent.append(is_lent(batch))
            assert batch.memory.readonly
            at = zip(batch.starts, batch.lengths, strict=True)
            assert [bytes(batch.memory[start : start + length]) for start, length in at] == [
                bytes(packet) for packet in batch
            ]
        assert got == list(range(10 * PER_BLOCK))
        # Four blocks are what an arena holds. Of the last two the newest cannot be lent, and one alone is not worth it.
        assert lent == [True, True, False]
        assert sizes == [4 * PER_BLOCK, 4 * PER_BLOCK, 2 * PER_BLOCK]


def test_blocks_go_back_two_receives_later(wire: Wire) -> None:
    """The kernel has a block again when the batch behind the next is received, whose loop variable is still the last one."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(14))
        left = []
        for _batch in rx.batches(0):
            left.append(len(ring.waiting()))
        assert left == [14, 14, 10, 4]
        assert rx.stats().packets == 14 * PER_BLOCK
        send(wire, in_blocks(14), 2 * PER_BLOCK)
        assert len(list(rx.batches(0))) == 1
        assert ring.waiting() == []


def test_nobody_keeps_anything_lap_after_lap(wire: Wire) -> None:
    """By batches, by packets and by delivery all laps are lent, lose nothing, and leave one mapping where it was."""
    got: list[int] = []

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        assert bytes(packet) == big(number_of(packet))
        got.append(number_of(packet))

    with ring_on(wire[0], deliver, **RING) as rx:
        there = ring.mapped()
        total = 0
        for turn in range(12):
            send(wire, total, 20 * PER_BLOCK)
            total += 20 * PER_BLOCK
            closed = total - total % PER_BLOCK - PER_BLOCK * (total % PER_BLOCK == 0)
            if turn % 3 == 0:
                while len(got) < closed:
                    rx.drain()
            elif turn % 3 == 1:
                for packet in rx:
                    deliver(None, None, 0, packet)
                    if len(got) == closed:
                        break
            else:
                while len(got) < closed:
                    deliver(None, None, 0, rx.recv(10))
        assert got == list(range(closed))
        assert ring.mapped() == there
        told = rx.stats()
        assert (told.kernel_drops, told.ring_freezes) == (0, 0)
        assert rx._reception._mechanism._loans._told.offered  # type: ignore[attr-defined]


KEEP: list[Callable[[linkrx.Batch], Any]] = [
    lambda batch: batch,
    lambda batch: batch[len(batch) // 2],
    lambda batch: batch.memory,
    lambda batch: batch.memory[batch.starts[7] :][: batch.lengths[7]],
    lambda batch: batch[3].data[10:50][5:],
    lambda batch: memoryview(batch[0].frame).cast("B"),
    lambda batch: np.frombuffer(batch.memory, np.uint8)[3::7],
    lambda batch: next(iter(batch)),
    lambda batch: iter([batch[1].link_header]),
]


def digest(kept: Any) -> int:
    """A checksum of all that can be seen of something kept."""
    if isinstance(kept, linkrx.Batch):
        return zlib.crc32(bytes(kept.memory))
    if isinstance(kept, linkrx.Packet):
        return zlib.crc32(bytes(kept))
    if isinstance(kept, Iterator):
        kept = kept.__reduce__()[1][0][0]
    return zlib.crc32(bytes(kept))


@pytest.mark.parametrize("keep", range(len(KEEP)))
def test_whatever_is_kept_stays_true(wire: Wire, keep: int) -> None:
    """A batch, packet, view or array that is kept shows the same bytes for ever, and the ring goes on without loss."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(14))
        (batch,) = itertools.islice(rx.batches(0), 1)
        assert is_lent(batch)
        kept = KEEP[keep](batch)
        before = digest(kept)
        del batch
        assert received(rx, 10 * PER_BLOCK)[0], "what is kept is looked at two receives later"
        sent = in_blocks(14)
        for _ in range(4):
            send(wire, sent, LAP // 2)
            sent += LAP // 2
            assert not any(received(rx, LAP // 2))
        assert digest(kept) == before
        assert rx.stats().kernel_drops == 0
    assert digest(kept) == before
    assert ring.mapped() == []


def test_kept_at_random(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept and let go of in any pattern, lent and copied in turn, everything stays what it was, and comes once, in order."""
    monkeypatch.setattr(loans, "PAUSE", 5)
    choice = random.Random(7)
    kept: list[tuple[int, Any]] = []
    lent: list[bool] = []
    sent = got = 0
    with ring_on(wire[0], **RING) as rx:
        for _ in range(60):
            count = choice.randrange(1, 24) * PER_BLOCK
            send(wire, sent, count)
            sent += count
            for batch in rx.batches(0):
                lent.append(is_lent(batch))
                assert numbers(batch) == list(range(got, got + len(batch)))
                got += len(batch)
                if choice.random() < 0.1:
                    one = choice.choice(KEEP)(batch)
                    kept.append((digest(one), one))
                    del one
            if choice.random() < 0.3:
                del kept[: choice.randrange(len(kept) + 1)]
            for before, one in kept:
                assert digest(one) == before
        told = rx.stats()
        assert (told.kernel_drops, told.packets) == (0, got)
        assert len(ring.mapped()) == 1
    for before, one in kept:
        assert digest(one) == before
    assert lent.count(True) > 20
    assert lent.count(False) > 20


def test_after_a_pause_blocks_are_lent_again(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """When something is kept, so many receives copy as the pause has; while what they copy is kept as well, it does not end."""
    monkeypatch.setattr(loans, "PAUSE", 20)
    kept: list[linkrx.Packet] = []
    with ring_on(wire[0], **RING) as rx:
        sent = 0

        def half_a_lap(*, keep: bool = False) -> list[bool]:
            nonlocal sent
            send(wire, sent, LAP // 2)
            sent += LAP // 2
            lent = []
            for batch in rx.batches(0):
                lent.append(is_lent(batch))
                if keep:
                    kept.append(batch[0])
            return lent

        assert half_a_lap() == [True] * 8 + [False]
        assert half_a_lap(keep=True)[:3] == [True, True, False], "looked at two receives later"
        for _ in range(5):
            assert not any(half_a_lap(keep=True))
        assert [bytes(packet) for packet in kept] == [big(number_of(packet)) for packet in kept]
        kept.clear()
        lent = list(itertools.chain.from_iterable(half_a_lap() for _ in range(8)))
        assert 18 <= lent.index(True) <= 24
        assert lent[-9:] == [True] * 8 + [False]


def kept_mappings() -> dict[str, int]:
    """Anonymous private mappings of this process by address, and their sizes."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, permissions, _offset, device, _inode, *name = line.split()
        if permissions == "rw-p" and device == "00:00" and not name:
            first, last = (int(address, 16) for address in where.split("-"))
            found[where] = last - first
    return found


def test_what_is_kept_takes_no_more_than_two_loans_and_is_unmapped_with_the_last(wire: Wire) -> None:
    """A packet that is kept of a lent batch pins a megabyte at most, which is unmapped when nobody keeps it any more."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(16))
        batches = rx.batches(0)
        packet = next(batches)[5]
        rest = [len(batch) for batch in itertools.islice(batches, 2)]
        at = np.frombuffer(packet.frame, np.uint8).__array_interface__["data"][0]

        def around() -> int:
            """Bytes that are mapped together with the packet's."""
            for where, size in kept_mappings().items():
                first, last = (int(address, 16) for address in where.split("-"))
                if first <= at < last:
                    return size
            return 0

        assert len(rest) == 2
        assert 4 * BLOCK_LEAST <= around() <= 2 * arena.ARENA_BYTES + 4 * mmap.PAGESIZE
        assert bytes(packet) == big(5)
        del packet
        gc.collect()
        rx.close()
        assert around() == 0


@pytest.mark.parametrize("keep", range(len(KEEP)))
def test_what_is_kept_outlives_close(wire: Wire, keep: int) -> None:
    """What is lent when the dispatcher is closed stays true, and the ring is not mapped any more."""
    with packet_socket(wire[0]) as borrowed:
        with ring_on(borrowed, **RING) as rx:
            send(wire, 0, in_blocks(10))
            batch = next(iter(rx.batches(0)))
            assert is_lent(batch)
            kept = KEEP[keep](batch)
            before = digest(kept)
            del batch
        assert ring.mapped() == []
        send(wire, 0, LAP)
        assert digest(kept) == before


def test_a_close_while_nothing_is_kept_leaves_nothing(wire: Wire) -> None:
    """Where blocks are lent and nobody looks at them, close leaves no memory behind."""
    before = 0
    for turn in range(6):
        with ring_on(wire[0], **RING) as rx:
            send(wire, 0, in_blocks(14))
            for _batch in itertools.islice(rx.batches(0), 2):
                pass
            del _batch
        if not turn:
            before = sum(kept_mappings().values())
    gc.collect()
    assert ring.mapped() == []
    assert sum(kept_mappings().values()) < before + 4 * BLOCK_LEAST  # malloc may have made itself larger


def test_who_never_gets_a_loan(wire: Wire) -> None:
    """A small ring, a small batch, small packets and half-empty blocks are copied."""
    for size, options in [
        (SIZE, {"receive_buffer": 15 * BLOCK_LEAST}),
        (SIZE, {"batch_size": PER_BLOCK - 1}),
        (60, {}),
    ]:
        with ring_on(wire[0], **{**RING, **options}) as rx:
            for number in range(2000):
                wire[2].send(frame(number, size))
            assert not any(is_lent(batch) for batch in rx.batches(0))
    with ring_on(wire[0], latency=0.001) as rx:
        while len(ring.waiting()) < 10:
            wire[2].send(frame(1))
        assert not any(is_lent(batch) for batch in rx.batches(0))


def test_a_loan_ends_where_a_batch_would_be_too_large(wire: Wire) -> None:
    """A block whose packets find no room in the batch is left to the next, whole."""
    with ring_on(wire[0], **RING, batch_size=2 * PER_BLOCK + 5) as rx:
        send(wire, 0, in_blocks(9))
        assert [(len(batch), is_lent(batch)) for batch in rx.batches(0)] == [
            *[(2 * PER_BLOCK, True)] * 4,
            (PER_BLOCK, False),
        ]


def test_a_wait_with_blocks_lent_is_one_poll(wire: Wire) -> None:
    """With a loan not yet over, a wait sleeps until something comes, and that is received."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(10))
        for _batch in itertools.islice(rx.batches(0), 3):
            pass
        assert len(ring.waiting()) == 4
        before = rx.stats().waits
        assert list(rx.batches(0.05)) == []
        assert rx.stats().waits == before + 1
        timer = threading.Timer(0.05, send, (wire, in_blocks(10), 2 * PER_BLOCK))
        timer.start()
        assert number_of(rx.recv(10)) == 10 * PER_BLOCK
        timer.join()
        assert rx.stats().waits <= before + 3


def test_asynchronously(wire: Wire) -> None:
    """Under `async for` batches are lent, and all come."""

    async def work(rx: linkrx.Dispatcher) -> list[bool]:
        got, lent = 0, []
        async for batch in rx.batches():
            assert numbers(batch) == list(range(got, got + len(batch)))
            lent.append(is_lent(batch))
            got += len(batch)
            if got == 14 * PER_BLOCK:
                break
        return lent

    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(14))
        assert asyncio.run(asyncio.wait_for(work(rx), 10)) == [True, True, True, False]


# Children.


def test_a_child_sees_what_it_held_at_the_fork(wire: Wire) -> None:
    """What a child has of a lent batch stays what it was, while its parent goes on for laps; and the ring is not the child's."""
    with ring_on(wire[0], **RING) as rx:
        send(wire, 0, in_blocks(10))
        batches = rx.batches(0)
        first, second = next(batches), next(batches)
        assert is_lent(first)
        assert is_lent(second)
        due = [digest(first), digest(second)]
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:  # pragma: no cover, another process
            os.close(writer)
            os.read(reader, 1)  # until the parent has overwritten all of the ring
            os._exit(0 if [digest(first), digest(second)] == due and not ring.mapped() else 1)
        os.close(reader)
        del first, second
        received(rx, 2 * PER_BLOCK)
        for _ in range(3):
            send(wire, 5000, LAP // 2)
            received(rx, LAP // 2)
        os.close(writer)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_in_deliver(wire: Wire) -> None:
    """A child made inside `deliver` has the packet, and its parent delivers the rest."""
    got = []

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        number = number_of(packet)
        got.append(number)
        if number % 97 == 0:
            with child() as forked:
                if forked:
                    assert bytes(packet) == big(number)
        assert bytes(packet) == big(number)

    with ring_on(wire[0], deliver, **RING) as rx:
        send(wire, 0, in_blocks(10))
        while len(got) < 10 * PER_BLOCK:
            rx.drain()
    assert got == list(range(10 * PER_BLOCK))


def test_forks_of_another_thread(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread receives, another forks: the ring moves under the reader, who notices nothing."""
    monkeypatch.setattr(
        loans, "PAUSE", 6
    )  # receives, of which there are not so many between the hook and the fork
    done = threading.Event()
    shown: list[tuple[int, linkrx.Batch]] = []
    codes: list[int] = []
    fresh = threading.Event()

    def work() -> None:
        while fresh.wait(60) and not done.is_set():
            fresh.clear()
            here = shown[-2:]
            pid = os.fork()
            if not pid:  # pragma: no cover, another process
                os._exit(len(ring.mapped()) + sum(digest(batch) != due for due, batch in here))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    other = threading.Thread(target=work)
    lent: list[bool] = []
    with ring_on(wire[0], **RING) as rx:
        sent = 0
        other.start()
        try:
            while sent < 10 * LAP or len(codes) < 10:
                send(wire, sent, LAP // 2)
                sent += LAP // 2
                while rx.stats().packets < sent - PER_BLOCK:
                    for batch in itertools.islice(rx.batches(0), 1):
                        lent.append(is_lent(batch))
                        numbers(batch)
                        if lent[-1]:
                            shown.append((digest(batch), batch))
                            del shown[:-2]
                            fresh.set()
                assert sent < 1000 * LAP
        finally:
            done.set()
            fresh.set()
            other.join()
        assert rx.stats().kernel_drops == 0
    assert set(codes) == {0}
    assert lent.count(True) >= 10


# What goes wrong.


def test_exceptions_at_any_point(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions of a signal handler at any point of the loop neither lose a packet, nor repeat one, nor show another."""
    monkeypatch.setattr(loans, "PAUSE", 2)

    class Interrupt(Exception):
        pass

    interrupts = 0

    def interrupt(_signal: int, interrupted: FrameType | None) -> None:
        nonlocal interrupts
        if is_the_loop(interrupted):
            interrupts += 1
            raise Interrupt

    kept: list[tuple[int, linkrx.Batch]] = []
    got: list[int] = []
    lent = []
    with ring_on(wire[0], **RING) as rx:
        sent = 0
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            while interrupts < 40 or sent < 40 * LAP // 2:
                signal.setitimer(signal.ITIMER_REAL, 0)
                send(wire, sent, LAP // 2)
                sent += LAP // 2
                signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
                while len(got) < sent - PER_BLOCK:
                    batch = None
                    with suppress(Interrupt):
                        batch = rx._next_batch(0)
                    if batch is None:
                        continue
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    lent.append(is_lent(batch))
                    got += numbers(batch)
                    if len(lent) % 17 == 0:
                        kept = [*kept[-3:], (digest(batch), batch)]
                    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
                assert sent < 2000 * LAP
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        told = rx.stats()
        assert told.kernel_drops == 0
    assert got == list(range(len(got)))
    assert any(lent)
    assert [digest(batch) for _, batch in kept] == [due for due, _ in kept]


def test_what_cannot_be_copied_stays_lent(
    wire: Wire, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory for a copy there is one warning, what is kept stays true, nothing is lost, and all is lent again later."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(loans, "PAUSE", 4)  # over before the ring comes round to what is kept
    with packet_socket(wire[0]) as borrowed, ring_on(borrowed, **RING) as rx:
        send(wire, 0, in_blocks(14))
        batches = rx.batches(0)
        kept = next(batches)
        before = digest(kept)
        assert len(next(batches)) == 4 * PER_BLOCK
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with caplog.at_level(logging.WARNING, "linkrx"):
            # Room for what the interpreter may want, and not for a ring.
            resource.setrlimit(resource.RLIMIT_AS, (size + BLOCKS // 2 * BLOCK_LEAST, limits[1]))
            try:
                assert [len(batch) for batch in batches] == [6 * PER_BLOCK]
                with child() as forked:
                    if forked:
                        resource.setrlimit(resource.RLIMIT_AS, limits)
                        assert digest(kept) == before
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        assert caplog.messages == [
            "packet_mmap: a batch that is kept could not be copied: Cannot allocate memory. Its blocks of the ring are out "
            "of use until nobody keeps it, or there is memory for it. receive_buffer= makes a smaller ring"
        ]
        assert is_lent(kept)
        sent = in_blocks(14)
        lent: list[bool] = []

        def some() -> bool:
            nonlocal sent
            send(wire, sent, 10 * PER_BLOCK)
            sent += 10 * PER_BLOCK
            lent.extend(received(rx, 10 * PER_BLOCK))
            return lent[-3:] == [True, True, False]

        assert not some()
        assert digest(kept) == before
        until(some)
        assert not is_lent(kept)
        assert digest(kept) == before
        with child() as forked:
            if forked:
                assert ring.mapped() == []
        assert rx.stats().kernel_drops == 0


def test_no_memory_at_close(wire: Wire) -> None:
    """What is kept stays true where there is no memory for a copy at close, and close raises nothing."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    rx = ring_on(wire[0], **RING)
    send(wire, 0, in_blocks(10))
    kept = next(iter(rx.batches(0)))
    before = digest(kept)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BLOCK_LEAST, limits[1]))
    try:
        rx.close()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert digest(kept) == before
    del kept
    assert ring.mapped() == []


FORKS = """
import itertools, os, signal, sys
sys.path.insert(0, "tests")
late = []
os.register_at_fork(before=lambda: [step() for step in late])  # the first that is registered is the last to be called
from linkrx.namespace import enter_private_network
from linkrx.rigs import veth
from linkrx.device import injector_on
enter_private_network()
from test_packet_mmap import number_of, ring_on
from test_loans import RING, big, in_blocks, is_lent, send
from linkrx import loans

def forked(kept):
    child = os.fork()
    if not child:
        os._exit(not all(bytes(packet) == big(number_of(packet)) for batch in kept for packet in batch))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with veth() as (near, far), injector_on(far) as injector, ring_on(near, **RING) as rx:
    batches = rx.batches(0)
    send((near, far, injector), 0, in_blocks(30))
    kept = [next(batches)]
    assert is_lent(kept[0])
"""


@pytest.mark.parametrize(
    "rest",
    [
        # Received behind linkrx's own hook, as another thread may.
        """
    kept.clear()
    for turn in range(4):  # until nothing is lent any more
        for _ in rx.batches(0):
            pass
        send((near, far, injector), 0, in_blocks(1) * (turn < 3))
    for _ in rx.batches(0):
        pass
    assert not any(rx._reception._mechanism._loans._told.blocks)
    send((near, far, injector), 0, in_blocks(10))
    late.append(lambda: kept.append(next(batches)))
    assert forked(kept) == 0
    assert len(kept) == 1 and not is_lent(kept[0])
""",
        # A handler that raises wherever it comes in the hook.
        """
    class Interrupt(Exception): pass
    def step(frame, event, argument):
        if frame.f_code.co_filename == loans.__file__:
            left[0] -= 1
            if not left[0]:
                raise Interrupt
        return step
    sys.unraisablehook = lambda told: None
    for number in range(1, 40):
        left = [number]
        sys.settrace(step)
        try:
            code = forked(kept)
        except Interrupt:
            code = 0  # of the hook behind the fork
        finally:
            sys.settrace(None)
        assert code == 0, number
""",
    ],
)
def test_whatever_happens_at_a_fork(rest: str) -> None:
    """A batch that is received between the hook and the fork is a copy, and a hook that is interrupted does its work."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS + rest],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_who_reads_while_the_ring_moves_sees_no_gap(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read what they keep, while it is moved out of the ring, neither fault nor see anything else."""
    monkeypatch.setattr(loans, "PAUSE", 2)
    shown: list[tuple[int, np.ndarray[Any, Any]]] = []
    wrong: list[int] = []
    looked = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal looked
        while not done.is_set():
            for due, array in shown[-4:]:
                looked += 1
                if zlib.crc32(array.data) != due:  # without the lock of the interpreter
                    wrong.append(due)

    other = threading.Thread(target=watch)
    places: list[tuple[int, int]] = [(0, 0)]
    moves = 0
    with ring_on(wire[0], **RING) as rx:
        other.start()
        try:
            sent = 0
            while moves < 20 or looked < 100:
                there = ring.mapped()
                moves += there != places
                places = there
                send(wire, sent, LAP // 2)
                sent += LAP // 2
                for batch in rx.batches(0):
                    if is_lent(batch):
                        shown.append((digest(batch), np.frombuffer(batch.memory, np.uint8)))
                del shown[:-6]
        finally:
            done.set()
            other.join()
    assert not wrong


def test_it_leaves_a_process_that_ends_alone() -> None:
    """A process that ends with blocks lent and packets kept, its dispatcher never closed, ends without a word of that."""
    program = """
import itertools, sys, warnings
sys.path.insert(0, "tests")
from linkrx.namespace import enter_private_network
from linkrx.rigs import veth
from linkrx.device import injector_on
enter_private_network()
warnings.simplefilter("ignore", ResourceWarning)
from test_packet_mmap import ring_on
from test_loans import RING, in_blocks, is_lent, send
with veth() as (near, far), injector_on(far) as injector:
    rx = ring_on(near, **RING)
    send((near, far, injector), 0, in_blocks(14))
    kept = [batch for batch in itertools.islice(rx.batches(0), 2)]
    assert all(map(is_lent, kept))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
