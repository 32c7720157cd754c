"""Opens and disturbs one dispatcher after the other on a source, and accounts for every frame that was sent to it."""

from __future__ import annotations

import ctypes
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from traffic import Account, Counted, Wire, set_link

import linkrx
from linkrx import _core

# Frames in a burst and microseconds behind it: a flood, three that a reader who looks at every byte can nearly, just or
# easily follow, a trickle, and silence.
PACES = ((4096, 0), (64, 400), (64, 1500), (8, 300), (1, 100), (0, 0))
KEPT_MOST = 48  # each may hold an arena of half a megabyte or more
PATIENCE = 0.02  # seconds that a receive waits

# struct tpacket_block_desc: num_pkts behind block_status, and seq_num behind offset_to_first_pkt and blk_len
PACKETS, SEQUENCE = 12, 24

RING_SIZES = (1, 2**20, 4 * 2**20, 16 * 2**20)  # a ring has at least two blocks
LATENCIES = (0.001, 0.001, 0.005, 0.02)
PAUSE = 0.02  # maximal seconds between two rings
SETTLING = 5.0  # seconds after which frames in the kernel must have arrived

_LINKRX = Path(linkrx.__file__).parent


def _receiving(frame: FrameType | None) -> bool:
    """Whether a frame is inside a call that receives, and not in one that reads packets."""
    entered = None  # the outermost function of linkrx
    while frame is not None and Path(frame.f_code.co_filename).is_relative_to(_LINKRX):
        entered, frame = frame.f_code, frame.f_back
    if entered is None or frame is None or Path(entered.co_filename).name != "dispatcher.py":
        return False
    if entered.co_name == "__del__":  # of an earlier dispatcher, called by the interpreter
        return False
    return frame.f_code.co_name in ("_dispatch", "_drain", "_batches", "_recv", "_each", "_run")


class Interrupted(Exception):
    """Raised by the signal handler, like KeyboardInterrupt."""


class Refused(Exception):
    """Raised by deliver."""


class Disturbed:
    """Opens one dispatcher after the other on a source and disturbs each, with choices from one seed.

    One thread flaps links, changes the pace of the traffic and stops dispatchers; a signal handler raises and stops;
    so does deliver. The handler raises only while a dispatcher receives: elsewhere the exception would discard packets that
    linkrx has already delivered.
    """

    def __init__(self, wire: Wire, backend: str, seed: int) -> None:
        self.account = Account()
        self._road, self._backend = wire, backend
        self._random, self._other_random = random.Random(seed), random.Random(seed + 1)
        self._last = -1
        self._kept: list[tuple[linkrx.Packet | memoryview, bytes]] = []
        self._current: linkrx.Dispatcher | None = None
        self._over = threading.Event()
        self._turn = threading.Lock()  # held while disturbing, and while nothing may disturb
        self._handle: str | None = None  # the next action of the signal handler
        self._iterator: object = None  # outlives the step: closing it must not be interrupted
        self._ways: tuple[tuple[Callable[[linkrx.Dispatcher], None], bool], ...] = (
            (self._dispatch, False),
            (self._drain, False),
            (self._batches, False),
            (self._recv, False),
            (self._each, True),
            (self._run, True),
        )

    def run(self, seconds: float) -> Account:
        """Disturb dispatchers for `seconds`, receive the remaining frames undisturbed, and complete the account."""
        before = signal.signal(signal.SIGALRM, self._on_signal)
        disturber = threading.Thread(target=self._disturb, name="disturber")
        end = time.monotonic() + seconds
        try:
            self._road.traffic.start()
            self._road.traffic.pace(*PACES[1])
            disturber.start()
            while time.monotonic() < end and not self.account.faults:
                self._disturb_one()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._over.set()
            if disturber.ident is not None:
                disturber.join()
            signal.signal(signal.SIGALRM, before)
            self._road.traffic.quiet()
            self._road.traffic.finish()
        self._settle()
        return self.account

    # Disturbances.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        current = self._current
        if self._handle is None or current is None:
            return
        if self._handle == "stop":
            self._handle = None
            self.account.happened["handler stops"] += 1
            current.stop()
        elif _receiving(frame):
            self._handle = None
            self.account.happened["handler raises"] += 1
            raise Interrupted
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.00005)

    def _disturb(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        chance = self._other_random
        while not self._over.wait(chance.uniform(0.001, 0.03)):
            what = chance.randrange(10)
            with self._turn:
                if what < 3:
                    link = chance.choice(self._road.links)
                    set_link(link, False)
                    self._over.wait(chance.uniform(0, 0.01))
                    set_link(link, True)
                    self.account.happened["flaps"] += 1
                elif what < 4:
                    current = self._current
                    if current is not None:
                        current.stop()
                        self.account.happened["thread stops"] += 1
                else:
                    self._road.traffic.pace(*chance.choice(PACES))

    def _deliver(
        self, remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet
    ) -> None:
        self._take(packet)
        chance = self._random.random()
        if chance < 0.0002:
            self.account.happened["deliver stops"] += 1
            if self._current is not None:
                self._current.stop()
        elif chance < 0.001:
            self.account.happened["deliver raises"] += 1
            raise Refused

    # Calls that receive.

    def _take(self, packet: linkrx.Packet, *, keep: bool = True) -> None:
        self.account.delivered += 1
        number, fault = self._road.traffic.fault(packet, last=self._last)
        if fault:
            self.account.add_fault(f"{fault} (dispatcher {self.account.happened['opened']})")
        self._last = number
        if keep and len(self._kept) < KEPT_MOST and self._random.random() < 0.001:
            self._kept.append((packet if number & 1 else packet.frame, self._road.traffic.frame(number)))

    def _dispatch(self, rx: linkrx.Dispatcher) -> None:
        for _ in range(self._random.randrange(50)):
            if not rx.dispatch(PATIENCE):
                return

    def _drain(self, rx: linkrx.Dispatcher) -> None:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        for _ in range(self._random.randrange(50)):
            poll.poll(PATIENCE * 1000)
            rx.drain()

    def _batches(self, rx: linkrx.Dispatcher) -> None:
        left = self._random.randrange(2000)
        for batch in rx.batches(PATIENCE):
            for packet in batch:
                self._take(packet)
            left -= len(batch)
            if left < 0:
                return

    def _recv(self, rx: linkrx.Dispatcher) -> None:
        for _ in range(self._random.randrange(500)):
            try:
                self._take(rx.recv(PATIENCE))
            except (TimeoutError, EOFError):
                return

    def _each(self, rx: linkrx.Dispatcher) -> None:
        left = self._random.randrange(1, 1000)
        self._iterator = packets = iter(rx)
        for packet in packets:
            self._take(packet)
            left -= 1
            if not left:
                return

    def _run(self, rx: linkrx.Dispatcher) -> None:
        rx.run()

    def _step(self, rx: linkrx.Dispatcher) -> None:
        """Receive with one call, with or without a signal. A call that waits for ever always gets one."""
        way, endless = self._random.choice(self._ways)
        self.account.happened[way.__name__[1:]] += 1
        if endless or self._random.random() < 0.4:
            self._handle = "stop" if self._random.random() < 0.03 else "raise"
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(0.00002, 0.03 if endless else 0.005))
        try:
            way(rx)
        except (Interrupted, Refused):
            pass
        finally:
            self._handle = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._iterator = None

    # One dispatcher.

    def _options(self) -> dict[str, Any]:
        return {"batch_size": self._random.choice((1, 7, 64, 64, 64, 300))}

    @contextmanager
    def _opened(self, options: dict[str, Any], where: str) -> Iterator[linkrx.Dispatcher]:
        """Open a dispatcher. At the end, its counters are compared with the kernel's."""
        wire = self._road
        handed, before_open = wire.counted().handed, wire.drops()
        with linkrx.open(wire.source, self._deliver, backend=self._backend, **options) as rx:
            opened = wire.drops()
            yield rx
            asked = wire.drops()
            stats = rx.stats()
            answered = wire.drops()
        if stats.kernel_drops is None or not asked - opened <= stats.kernel_drops <= answered - before_open:
            self.account.add_fault(
                f"kernel_drops is not in {asked - opened}..{answered - before_open} {where}: {stats}"
            )
        # The kernel counts the frames that were read, so each dispatcher can be accounted for.
        if wire.name in (
            "tap",
            "tun",
        ):
            handed = wire.counted().handed - handed
            known = stats.packets + stats.runts + stats.empty + stats.unknown_protocol + stats.undelivered
            if handed != known:
                self.account.add_fault(
                    f"{handed - known} of {handed} frames are in no counter {where}: {stats}"
                )

    def _disturb_one(self) -> None:
        """Open a dispatcher, receive and disturb for a while, stop, and add up its counters."""
        account, options = self.account, self._options()
        account.happened["opened"] += 1
        delivered = account.delivered
        where = f"of dispatcher {account.happened['opened']}, {options}"
        with self._opened(options, where) as rx:
            self._current = rx
            end = time.monotonic() + self._random.uniform(0.01, 0.5)
            while rx.end is None and time.monotonic() < end:
                self._step(rx)
            self._current = None
            rx.stop()
            rx.drain()  # notices the stop: packets that waited are now `undelivered`
            stats, ended = rx.stats(), rx.end
        account.runts += stats.runts
        account.empty += stats.empty
        account.unknown += stats.unknown_protocol
        account.undelivered += stats.undelivered
        if stats.packets != account.delivered - delivered:
            account.add_fault(
                f"stats() says {stats.packets} of {account.delivered - delivered} delivered {where}: {stats}"
            )
        if ended is not linkrx.End.STOPPED:
            account.add_fault(f"the end is {ended} {where}: {stats}")

    # Frames that remain.

    def _settle(self) -> None:
        wire, account = self._road, self.account
        for link in wire.links:
            set_link(link, True)
        account.sent = wire.traffic.control.accepted
        with linkrx.open(wire.source, backend=self._backend) as rx:
            for _ in range(20):  # frames may still be in the backlog of the other processor
                for batch in rx.batches(0.1):
                    for packet in batch:
                        self._take(packet)
                account.kernel = wire.counted()
                if not account.lost_by_kernel:
                    break
            stats = rx.stats()
        account.unknown += stats.unknown_protocol
        account.runts += stats.runts
        account.empty += stats.empty
        self._close_account()

    def _close_account(self) -> None:
        wire, account = self._road, self.account
        for kept, sent in self._kept:
            if bytes(kept) != sent:
                account.add_fault(f"a kept frame changed: {sent[:20].hex()}")
        account.happened["kept"] = len(self._kept)
        self._kept.clear()
        if wire.traffic.control.other:
            account.add_fault(f"send() failed with errno {wire.traffic.control.last_errno}")
        if account.lost_by_kernel:
            account.add_fault(
                f"{account.lost_by_kernel} frames that send() took are in no counter of the kernel"
            )
        if account.lost_by_linkrx:
            account.add_fault(
                f"{account.lost_by_linkrx} frames that the kernel handed over are in no counter"
            )


def left_in_ring(rx: linkrx.Dispatcher) -> int:
    """The packets in the ring that its dispatcher has not begun to read, which are lost with it. Nothing may be sent meanwhile.

    These are in the blocks that wait, and in the open one, which the timer may close now. The rest of the oldest block, which
    was begun, is in `undelivered`. Released blocks have 0.
    """
    mechanism: Any = rx._mechanism
    first = _core.lib.lrx_ring_memory(mechanism._state)
    size = _core.lib.lrx_ring_size(mechanism._state)
    waiting = []
    for block in range(first, first + size, size // mechanism._blocks):
        packets = ctypes.c_uint32.from_address(block + PACKETS).value
        if packets:
            waiting.append((ctypes.c_uint64.from_address(block + SEQUENCE).value, packets))
    # The oldest blocks are being read in place, and are not released.
    slots = mechanism._mechanism.slots
    read = sum(slots.unreleased) if slots else 0
    return sum(packets for _, packets in sorted(waiting)[read + bool(mechanism.held) :])


class DisturbedRings(Disturbed):
    """Disturbs dispatchers with rings.

    While a ring is set up or removed, nothing is sent and no link changes. The kernel counts frames that a socket got, frames
    without room, and frames that came while no socket listened, but not per socket. So every ring is accounted for by itself,
    to the frame.
    """

    def __init__(self, wire: Wire, seed: int) -> None:
        super().__init__(wire, "packet_mmap", seed)
        self._sent = self._lost_with_link = 0  # until the last settlement

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Within this context, nothing is sent, and no link goes down or up."""
        with self._turn:
            self._road.traffic.quiet()
            yield
            self._road.traffic.pace(*self._random.choice(PACES))

    def _settle_since(self, known: Callable[[], int], where: str) -> None:
        """Assert that each frame sent since the last call is in `known`, or was lost with a link."""
        wire = self._road
        end = time.monotonic() + SETTLING
        while True:  # the other processor may still process some
            others, lost_with_link, sent = known(), wire.counted().no_link, wire.traffic.control.accepted
            lost = sent - self._sent - (lost_with_link - self._lost_with_link) - others
            if not lost or time.monotonic() > end:
                break
            time.sleep(0.001)
        if lost:
            self.account.add_fault(f"{lost} of {sent - self._sent} frames are in no counter {where}")
        self._sent, self._lost_with_link = sent, lost_with_link

    def _count_unread(self) -> None:
        """Count frames that came without a ring: without a listening socket, or into a queue that the next ring empties."""
        unread = 0

        def known() -> int:
            nonlocal unread
            unread += self._road.unread(True)
            return unread

        self._settle_since(known, "between two rings")
        self.account.unread += unread

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self._random.choice((None, 1, 7, 64, 300)),
            "receive_buffer": self._random.choice(RING_SIZES),
            "latency": self._random.choice(LATENCIES),
        }

    @contextmanager
    def _opened(self, options: dict[str, Any], where: str) -> Iterator[linkrx.Dispatcher]:
        """Open a dispatcher with a ring. Each frame that was sent until its stop must be in one of its counters."""
        self._over.wait(self._random.uniform(0, PAUSE))
        with self._undisturbed():
            self._count_unread()
            rx = linkrx.open(self._road.source, self._deliver, backend=self._backend, **options)
        with rx:
            yield rx
            with self._undisturbed():
                self._settle_since(lambda: self._known(rx), where)
                stats = rx.stats()
                self.account.no_room += stats.kernel_drops or 0
                self.account.left += left_in_ring(rx)
                self.account.happened["freezes"] += stats.ring_freezes or 0
                rx.close()
                self._road.unread(False)  # the frames in the ring's counters are accounted for

    def _known(self, rx: linkrx.Dispatcher) -> int:
        """The frames in all counters of a ring."""
        stats = rx.stats()
        assert stats.kernel_drops is not None
        counted = stats.runts + stats.empty + stats.unknown_protocol + stats.undelivered
        return stats.packets + counted + stats.kernel_drops + left_in_ring(rx)

    # Frames that remain.

    def _settle(self) -> None:
        wire, account = self._road, self.account
        for link in wire.links:
            set_link(link, True)
        self._count_unread()
        account.sent = wire.traffic.control.accepted
        no_link = wire.counted().no_link
        handed = account.sent - account.no_room - no_link - account.unread
        account.kernel = Counted(handed=handed, no_room=account.no_room, no_link=no_link)
        self._close_account()


def disturb(wire: Wire, backend: str, seed: int) -> Disturbed:
    """The class that disturbs dispatchers of a backend."""
    return DisturbedRings(wire, seed) if backend == "packet_mmap" else Disturbed(wire, backend, seed)
