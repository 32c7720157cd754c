"""Dispatchers that live short and disturbed lives on one road, and the account of every frame sent on it."""

from __future__ import annotations

import random
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from traffic import Counted, Road, set_link

import linkrx

# Frames in a burst and microseconds behind it: a flood, three that a reader who looks at every byte can nearly, just or
# easily follow, a trickle, and silence.
PACES = ((4096, 0), (64, 400), (64, 1500), (8, 300), (1, 100), (0, 0))
KEPT_MOST = 48  # each may hold on to an arena, of half a megabyte and more
PATIENCE = 0.02  # seconds that a receive waits
FAULTS_MOST = 20  # what follows is a consequence, or more of the same

_LINKRX = Path(linkrx.__file__).parent


def _receiving(frame: FrameType | None) -> bool:
    """Whether a dispatcher runs there, called by one of the ways to receive and not by what looks at packets."""
    entered = None  # what of linkrx was called from outside
    while frame is not None and Path(frame.f_code.co_filename).is_relative_to(_LINKRX):
        entered, frame = frame.f_code, frame.f_back
    if entered is None or frame is None or Path(entered.co_filename).name != "dispatcher.py":
        return False
    if entered.co_name == "__del__":  # of an earlier dispatcher, called by the interpreter
        return False
    return frame.f_code.co_name in ("_dispatch", "_drain", "_batches", "_recv", "_each", "_run")


class Interrupted(Exception):
    """Raised by the signal handler, as KeyboardInterrupt is."""


class Refused(Exception):
    """Raised by deliver."""


@dataclass
class Account:
    """What became of the frames that send() took on one road."""

    sent: int = 0
    kernel: Counted = field(default_factory=lambda: Counted(0, 0, 0))
    delivered: int = 0
    runts: int = 0
    empty: int = 0
    unknown: int = 0
    undelivered: int = 0
    no_room: int = 0  # of rings, by their dispatchers' own count
    left: int = 0  # in rings that were closed
    unread: int = 0  # while there was no ring
    faults: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def lost_by_kernel(self) -> int:
        """Frames that send() took, and that the kernel neither handed over nor counted as dropped."""
        return self.sent - self.kernel.handed - self.kernel.no_room - self.kernel.no_link - self.unread

    @property
    def lost_by_linkrx(self) -> int:
        """Frames that the kernel handed over, and that were neither delivered nor counted."""
        counted = self.runts + self.empty + self.unknown + self.undelivered
        return self.kernel.handed - self.delivered - counted - self.left

    def blame(self, fault: str) -> None:
        """Note what is wrong."""
        if len(self.faults) < FAULTS_MOST:
            self.faults.append(fault)


class Mayhem:
    """Opens one dispatcher after the other on a road and disturbs each, with choices from one seed.

    One thread flaps links, changes the pace of the traffic and stops dispatchers; a signal handler raises and stops;
    so does deliver. The handler raises only while a dispatcher receives: elsewhere the exception would take away what
    linkrx has handed over already.
    """

    def __init__(self, road: Road, backend: str, seed: int) -> None:
        self.account = Account()
        self._road, self._backend = road, backend
        self._random, self._other_random = random.Random(seed), random.Random(seed + 1)
        self._last = -1
        self._kept: list[tuple[linkrx.Packet | memoryview, bytes]] = []
        self._current: linkrx.Dispatcher | None = None
        self._over = threading.Event()
        self._turn = threading.Lock()  # held by who disturbs, and by who wants no disturbance
        self._handle: str | None = None  # what the signal handler is to do
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
        """Live for so long, then receive the rest in peace, and settle the account."""
        before = signal.signal(signal.SIGALRM, self._on_signal)
        disturber = threading.Thread(target=self._disturb, name="disturber")
        end = time.monotonic() + seconds
        try:
            self._road.traffic.start()
            self._road.traffic.pace(*PACES[1])
            disturber.start()
            while time.monotonic() < end and not self.account.faults:
                self._live()
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

    # What disturbs.

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

    # What receives.

    def _take(self, packet: linkrx.Packet, *, keep: bool = True) -> None:
        self.account.delivered += 1
        number, fault = self._road.traffic.fault(packet, last=self._last)
        if fault:
            self.account.blame(f"{fault} (life {self.account.happened['lives']})")
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
        """Receive in one way, with or without a signal. What waits for ever gets one in any case."""
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

    def _live(self) -> None:
        road, account = self._road, self.account
        account.happened["lives"] += 1
        delivered = account.delivered
        handed = road.counted().handed
        before_open = road.drops()
        size = self._random.choice((1, 7, 64, 64, 64, 300))
        with linkrx.open(road.source, self._deliver, backend=self._backend, batch_size=size) as rx:
            opened = road.drops()
            self._current = rx
            end = time.monotonic() + self._random.uniform(0.01, 0.5)
            while rx.end is None and time.monotonic() < end:
                self._step(rx)
            self._current = None
            rx.stop()
            rx.drain()  # takes notice of the stop: what waited is now `undelivered`
            asked = road.drops()
            stats = rx.stats()
            answered = road.drops()
            ended = rx.end
        account.runts += stats.runts
        account.empty += stats.empty
        account.unknown += stats.unknown_protocol
        account.undelivered += stats.undelivered
        where = f"in life {account.happened['lives']}, batch_size={size}: {stats}"
        if stats.packets != account.delivered - delivered:
            account.blame(
                f"stats() says {stats.packets} of {account.delivered - delivered} delivered {where}"
            )
        if ended is not linkrx.End.STOPPED:
            account.blame(f"the end is {ended} {where}")
        if stats.kernel_drops is None or not asked - opened <= stats.kernel_drops <= answered - before_open:
            account.blame(f"kernel_drops is not in {asked - opened}..{answered - before_open} {where}")
        if road.name in ("tap", "tun"):  # their kernel counts what was read, so each life can be settled
            handed = road.counted().handed - handed
            known = stats.packets + stats.runts + stats.empty + stats.unknown_protocol + stats.undelivered
            if handed != known:
                account.blame(f"{handed - known} of {handed} frames are in no counter {where}")

    # What is left.

    def _settle(self) -> None:
        road, account = self._road, self.account
        for link in road.links:
            set_link(link, True)
        account.sent = road.traffic.control.accepted
        with linkrx.open(road.source, backend=self._backend) as rx:
            for _ in range(20):  # frames may still be in the backlog of the other processor
                for batch in rx.batches(0.1):
                    for packet in batch:
                        self._take(packet)
                account.kernel = road.counted()
                if not account.lost_by_kernel:
                    break
            stats = rx.stats()
        account.unknown += stats.unknown_protocol
        account.runts += stats.runts
        account.empty += stats.empty
        self._close_account()

    def _close_account(self) -> None:
        road, account = self._road, self.account
        for kept, sent in self._kept:
            if bytes(kept) != sent:
                account.blame(f"a kept frame changed: {sent[:20].hex()}")
        account.happened["kept"] = len(self._kept)
        self._kept.clear()
        if road.traffic.control.other:
            account.blame(f"send() failed with errno {road.traffic.control.last_errno}")
        if account.lost_by_kernel:
            account.blame(f"{account.lost_by_kernel} frames that send() took are in no counter of the kernel")
        if account.lost_by_linkrx:
            account.blame(f"{account.lost_by_linkrx} frames that the kernel handed over are in no counter")
