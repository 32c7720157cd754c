"""Short and disturbed lives on a ring, and where each frame of it went: also those that a closed ring takes with it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mayhem import PACES, Mayhem
from traffic import Counted, Road, set_link

import linkrx
from linkrx import _core

# struct tpacket_block_desc: num_pkts behind block_status, and seq_num behind offset_to_first_pkt and blk_len
PACKETS, SEQUENCE = 12, 24

SIZES = (1, 2**20, 4 * 2**20, 16 * 2**20)  # of a ring; two blocks are the least
LATENCIES = (0.001, 0.001, 0.005, 0.02)
PAUSE = 0.02  # seconds at most from one life to the next
SETTLING = 5.0  # seconds until frames that are under way in the kernel have arrived


def left_in_ring(rx: linkrx.Dispatcher) -> int:
    """Packets in the ring that its dispatcher has not begun with: those go with it. Nothing may be sent meanwhile.

    In all blocks: those that wait, and the open one, which the timer may close just now. Not in the one that was begun,
    the oldest: `undelivered` has its rest. Blocks that were given back say 0.
    """
    mechanism: Any = rx._mechanism
    first = _core.lib.lrx_ring_memory(mechanism._state)
    size = _core.lib.lrx_ring_size(mechanism._state)
    waiting = []
    for block in range(first, first + size, size // mechanism._blocks):
        packets = ctypes.c_uint32.from_address(block + PACKETS).value
        if packets:
            waiting.append((ctypes.c_uint64.from_address(block + SEQUENCE).value, packets))
    # The oldest are read in place already, and not released.
    places = mechanism._mechanism.places
    read = sum(places.lent) if places else 0
    return sum(packets for _, packets in sorted(waiting)[read + bool(mechanism.held) :])


class RingMayhem(Mayhem):
    """Opens one ring after the other and disturbs each, as `Mayhem` does.

    While a ring is put on and while it is taken off nothing is sent and no link changes: the kernel counts what a
    socket got, what it had no room for, and what came while no socket listened, but not for whom. So every life is
    settled by itself, to the frame, by what is known of each moment.
    """

    def __init__(self, road: Road, seed: int) -> None:
        super().__init__(road, "packet_mmap", seed)
        self._sent = self._eaten = 0  # until the last turn

    @contextmanager
    def _calm(self) -> Iterator[None]:
        """Nothing is sent, and no link goes down or up."""
        with self._turn:
            self._road.traffic.quiet()
            yield
            self._road.traffic.pace(*self._random.choice(PACES))

    def _turn_over(self, known: Callable[[], int], what: str) -> None:
        """All that was sent since the last turn is `known`, or was lost with a link."""
        road = self._road
        end = time.monotonic() + SETTLING
        while True:  # the other processor may still be at work on some
            others, eaten, sent = known(), road.counted().no_link, road.traffic.control.accepted
            lost = sent - self._sent - (eaten - self._eaten) - others
            if not lost or time.monotonic() > end:
                break
            time.sleep(0.001)
        if lost:
            self.account.blame(f"{lost} of {sent - self._sent} frames are in no counter {what}")
        self._sent, self._eaten = sent, eaten

    def _count_unread(self) -> None:
        """What came while nobody was there: for nobody, or into the queue of a socket that a ring then empties."""
        unread = 0

        def known() -> int:
            nonlocal unread
            unread += self._road.unread(True)
            return unread

        self._turn_over(known, "between two lives")
        self.account.unread += unread

    def _live(self) -> None:
        road, account = self._road, self.account
        account.happened["lives"] += 1
        delivered = account.delivered
        options: dict[str, Any] = {
            "batch_size": self._random.choice((None, 1, 7, 64, 300)),
            "receive_buffer": self._random.choice(SIZES),
            "latency": self._random.choice(LATENCIES),
        }
        self._over.wait(self._random.uniform(0, PAUSE))
        with self._calm():
            self._count_unread()
            rx = linkrx.open(road.source, self._deliver, backend=self._backend, **options)
        with rx:
            self._current = rx
            end = time.monotonic() + self._random.uniform(0.01, 0.5)
            while rx.end is None and time.monotonic() < end:
                self._step(rx)
            self._current = None
            rx.stop()
            assert not list(rx.batches())  # takes notice of the stop
            with self._calm():
                self._settle_life(rx, account.delivered - delivered, options)
                rx.close()
                road.unread(False)  # what the ring has counted is settled

    def _settle_life(self, rx: linkrx.Dispatcher, delivered: int, options: dict[str, Any]) -> None:
        account = self.account

        def known() -> int:
            stats = rx.stats()
            drops = stats.kernel_drops
            assert drops is not None
            counted = stats.runts + stats.empty + stats.unknown_protocol + stats.undelivered
            return stats.packets + counted + drops + left_in_ring(rx)

        where = f"in life {account.happened['lives']}, {options}"
        self._turn_over(known, where)
        stats = rx.stats()
        account.runts += stats.runts
        account.empty += stats.empty
        account.unknown += stats.unknown_protocol
        account.undelivered += stats.undelivered
        account.no_room += stats.kernel_drops or 0
        account.left += left_in_ring(rx)
        account.happened["freezes"] += stats.ring_freezes or 0
        if stats.packets != delivered:
            account.blame(f"stats() says {stats.packets} of {delivered} delivered {where}: {stats}")
        if rx.end is not linkrx.End.STOPPED:
            account.blame(f"the end is {rx.end} {where}: {stats}")

    # What is left.

    def _settle(self) -> None:
        road, account = self._road, self.account
        for link in road.links:
            set_link(link, True)
        self._count_unread()
        account.sent = road.traffic.control.accepted
        no_link = road.counted().no_link
        handed = account.sent - account.no_room - no_link - account.unread
        account.kernel = Counted(handed=handed, no_room=account.no_room, no_link=no_link)
        self._close_account()


def mayhem(road: Road, backend: str, seed: int) -> Mayhem:
    """The one for a backend."""
    return RingMayhem(road, seed) if backend == "packet_mmap" else Mayhem(road, backend, seed)
