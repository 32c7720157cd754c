"""Frames whose bytes follow from their numbers, sources to which they are sent, and the kernel's counters of these sources.

The comments on the kernel's counters were verified on Linux 6.18, with links that flapped hundreds of times a minute under
floods of a million frames a second.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from compiled import library
from pyroute2 import IPRoute

import linkrx
from linkrx.kernel.uapi import ETH_P_ALL, IFF_UP, SK_MEMINFO_DROPS, SO_MEMINFO, SO_RCVBUFFORCE, SOL_PACKET
from linkrx.sources.capabilities import HasFileno
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import veth

HEAD, LEAST, LONGEST = 14, 60, 9014  # as in traffic.c
MTU = 9000
ETHERTYPES = (0x88B5, 0x88B6, 0xFFFF, 0x88B5, 0x0000, 0x05DC, 0x0003, 0x8100)
VLAN = 0x8100
PACKET_STATISTICS = 6  # linux/if_packet.h
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
_WORD = (1 << 64) - 1
FAULTS_MOST = 20  # in an account; later faults are mostly consequences


class _Control(ctypes.Structure):
    """struct traffic in traffic.c."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("stop", "burst", "pause_us", "idle", "next", "limit")),
        *((name, ctypes.c_uint64) for name in ("accepted", "full", "down", "other", "last_errno")),
        *((name, ctypes.c_uint64) for name in ("seed", "ethernet", "prefix", "strange", "handled")),
        ("block", ctypes.c_char_p),
    ]


class Traffic:
    """One thread that sends numbered frames in bursts, without the GIL, until `finish`."""

    def __init__(self, injector: socket.socket, seed: int, kind: str, *, strange: bool) -> None:
        """With `strange`, frames have every length from LEAST to the MTU, and some are hostile."""
        self._block = random.Random(seed).randbytes(65536 + LONGEST)
        self._injector = injector
        self.control = _Control(
            limit=1 << 38,
            seed=seed,
            ethernet=kind not in ("tun", "cooked"),
            prefix=kind == "cooked",
            strange=strange,
            # Packet sockets get no tagged frames and no 802.3 frames, because rx_dropped must count the frames that were lost
            # with the link. The kernel also counts a tagged frame there that the socket received, if no VLAN device takes
            # it. It does not count an 802.3 frame that no socket received, because its LLC takes it. Cooked sockets get no
            # bare link header: packet_rcv() takes a length of 0 for a filter's refusal, and counts nothing.
            handled=kind == "tap",
            block=self._block,
        )
        self._seed = seed
        self._thread = threading.Thread(target=self._run, name="traffic")

    def _run(self) -> None:
        # A signal must interrupt the system call of the receiving thread, not of this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        library("traffic").send_numbered(self._injector.fileno(), ctypes.byref(self.control))

    def start(self) -> None:
        """Start the thread. It sends nothing until `pace` is called."""
        library("traffic")
        self._thread.start()

    def pace(self, burst: int, pause_us: int) -> None:
        """From now on send bursts of `burst` frames, with a pause after each."""
        self.control.pause_us = pause_us
        self.control.burst = burst

    def quiet(self) -> None:
        """Stop sending until the next `pace`. After the return no send() is running."""
        self.control.burst = self.control.idle = 0
        while not self.control.idle and self._thread.is_alive():
            time.sleep(0.0005)

    def finish(self) -> None:
        """End the thread. Idempotent."""
        self.control.stop = 1
        if self._thread.is_alive():
            self._thread.join()

    def frame(self, number: int) -> bytes:
        """The frame of a number, without the link header that a cooked socket does not show."""
        z = ((number + 1) * 0x9E3779B97F4A7C15 + self._seed) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        z ^= z >> 31
        length, strange = LEAST, False
        if self.control.strange:
            strange = z & 0xFF < 16
            spread = MTU - LEAST + 1 if z >> 8 & 0xFF < 32 else 200
            length = LEAST + (z >> 16 & 0xFFFF) % spread
        start = z >> 40 & 0xFFFF
        digits = number.to_bytes(5, "big")
        if self.control.ethernet:
            kind = ETHERTYPES[(z >> 32) % (8 if self.control.handled else 4) if strange else 0]
            if strange and z & 1 and kind != VLAN:
                length = HEAD
            head = b"\x02\0\0\0\0\x01\x02" + digits + kind.to_bytes(2, "big")
        else:
            head = (b"\x17" if strange else b"\x45" if number & 1 else b"\x60") + digits
        return head + self._block[start + len(head) : start + length]

    def fault(self, packet: linkrx.Packet | bytes, last: int = -1) -> tuple[int, str]:
        """The number in a packet, and its fault.

        There is no fault if the packet is the frame of that number, and the number is greater than `last`.
        """
        got = bytes(packet)
        at = 7 if self.control.ethernet else 1
        number = int.from_bytes(got[at : at + 5], "big")
        if number <= last:
            return number, f"frame {number} came behind frame {last}"
        if number >= self.control.next:
            return number, f"frame {number} was never sent: {got[:20].hex()}"
        return number, "" if got == self.frame(
            number
        ) else f"frame {number} is not what was sent: {got[:20].hex()}"


@dataclass(frozen=True)
class Counted:
    """The frames that send() accepted, by the kernel's counters: passed to a reader, or dropped."""

    handed: int
    no_room: int
    no_link: int


@dataclass
class Account:
    """The account of the frames that send() accepted for one source."""

    sent: int = 0
    kernel: Counted = field(default_factory=lambda: Counted(0, 0, 0))
    delivered: int = 0
    runts: int = 0
    empty: int = 0
    unknown: int = 0
    undelivered: int = 0
    no_room: int = 0  # for rings, by their dispatchers' counters
    left: int = 0  # in rings that were closed
    unread: int = 0  # while there was no ring
    faults: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def lost_by_kernel(self) -> int:
        """Frames that send() accepted, and that the kernel neither passed on nor counted as dropped."""
        return self.sent - self.kernel.handed - self.kernel.no_room - self.kernel.no_link - self.unread

    @property
    def lost_by_linkrx(self) -> int:
        """Frames that the kernel passed on, and that were neither delivered nor counted."""
        counted = self.runts + self.empty + self.unknown + self.undelivered
        return self.kernel.handed - self.delivered - counted - self.left

    def add_fault(self, fault: str) -> None:
        """Record a fault."""
        if len(self.faults) < FAULTS_MOST:
            self.faults.append(fault)


@dataclass
class Wire:
    """A source, the links to it, the traffic on them, and the kernel's counters."""

    name: str
    source: HasFileno | str
    traffic: Traffic
    links: tuple[str, ...]
    counted: Callable[[], Counted]
    drops: Callable[[], int]  # the kernel's counter behind `Stats.kernel_drops`
    # Frames that came since the last call. `without_listener`: whether no socket listened.
    unread: Callable[[bool], int] = lambda without_listener: 0


def device_counters(name: str) -> dict[str, int]:
    """The counters of a device in this network namespace, from /proc/self/net/dev."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, colon, numbers = line.partition(":")
        if colon and device.strip() == name:
            words = [int(word) for word in numbers.split()]
            return {"rx": words[1], "rx_dropped": words[3], "tx": words[9], "tx_dropped": words[11]}
    raise LookupError(f"no device {name!r} here")


def set_link(name: str, up: bool) -> None:
    """Set a link up or down, by ioctl, because pyroute2 is not thread-safe."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = bytearray(struct.pack("16s24x", name.encode()))
        fcntl.ioctl(any_socket, SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | IFF_UP if up else flags & ~IFF_UP)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


@contextmanager
def _queue(mode: str, seed: int, *, strange: bool) -> Iterator[Wire]:
    with ExitStack() as stack:
        queue = stack.enter_context(linkrx.TunTap(mode=mode))
        os.set_blocking(queue.fileno(), False)
        index = socket.if_nametoindex(queue.name)
        with IPRoute() as route:
            route.link("set", index=index, state="up", mtu=MTU)
            # Whether counters are exact over a flap depends on the queueing discipline. With the default, pfifo_fast, a frame
            # that send() accepted as the link goes down may be in a queue that the kernel then empties without counting:
            # up to eight in 150 flaps. pfifo takes a lock for each frame. It refuses late frames with ENOBUFS, which are in
            # no counter. All others reach the ring or are in tx_dropped. (noqueue is exact as well, but its send() fails
            # with ENOBUFS for a full ring, and counts that in tx_dropped.)
            route.tc("replace", "pfifo", index, limit=1000)
        injector = stack.enter_context(injector_on(queue.name))
        traffic = Traffic(injector, seed, mode, strange=strange)
        stack.callback(traffic.finish)

        def counted() -> Counted:
            # tun counts frames as transmitted when they are read from the ring, and keeps the ring while the link is down.
            # tx_dropped counts frames lost to a full ring and frames lost to a link that went down.
            now = device_counters(queue.name)
            return Counted(handed=now["tx"], no_room=now["tx_dropped"], no_link=0)

        def drops() -> int:
            return device_counters(queue.name)["tx_dropped"]

        yield Wire(mode, queue, traffic, (queue.name,), counted, drops)


def _socket(kind: str) -> socket.socket:
    shows_header = socket.SOCK_RAW if kind == "packet" else socket.SOCK_DGRAM
    return socket.socket(socket.AF_PACKET, shows_header | socket.SOCK_NONBLOCK, 0)


def _wire(stack: ExitStack, kind: str, seed: int, *, strange: bool) -> tuple[str, str, Traffic]:
    """Near end, far end, and the traffic from the far end."""
    near, far = stack.enter_context(veth())
    with IPRoute() as route:
        for name in (near, far):
            route.link("set", index=socket.if_nametoindex(name), mtu=MTU)
    traffic = Traffic(stack.enter_context(injector_on(far)), seed, kind, strange=strange)
    stack.callback(traffic.finish)
    return near, far, traffic


def _lost_with_link(near: str, far: str, traffic: Traffic) -> int:
    # A link that goes down loses frames at three places. (1) The sender's carrier is off and its queueing discipline is noop:
    # the far end's tx_dropped counts, and send() succeeds. (2) The near end is no longer up: the far end's tx_dropped and
    # the near end's rx_dropped count, and send() fails with ENOBUFS, so each failed send() is counted twice. (3) The near
    # end's frames are in the CPU's backlog, but the packet socket's hook is removed: the near end's rx_dropped counts, and
    # send() has succeeded.
    lost_with_link = device_counters(far)["tx_dropped"] + device_counters(near)["rx_dropped"]
    return lost_with_link - 2 * int(traffic.control.full)


def _bound(kind: str, near: str) -> socket.socket:
    found = _socket(kind)
    found.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 * 1024 * 1024)
    found.bind((near, ETH_P_ALL))
    return found


@contextmanager
def _packet(kind: str, seed: int, *, strange: bool) -> Iterator[Wire]:
    with ExitStack() as stack:
        near, far, traffic = _wire(stack, kind, seed, strange=strange)
        borrowed = stack.enter_context(_bound(kind, near))
        queued = dropped = 0

        def counted() -> Counted:
            nonlocal queued, dropped
            # tp_packets counts frames that were queued on the socket and frames without room, tp_drops only the latter.
            # Reading clears both.
            packets, drops = struct.unpack("II", borrowed.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            queued, dropped = queued + packets - drops, dropped + drops
            return Counted(handed=queued, no_room=dropped, no_link=_lost_with_link(near, far, traffic))

        def drops() -> int:
            words = borrowed.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * (SK_MEMINFO_DROPS + 1))
            return int(struct.unpack_from("I", words, 4 * SK_MEMINFO_DROPS)[0])

        yield Wire(kind, borrowed, traffic, (near, far), counted, drops)


@contextmanager
def _borrowed_ring(kind: str, seed: int, *, strange: bool) -> Iterator[Wire]:
    with ExitStack() as stack:
        near, far, traffic = _wire(stack, kind, seed, strange=strange)
        borrowed = stack.enter_context(_bound("packet", near))

        def counted() -> Counted:
            return Counted(handed=0, no_room=0, no_link=_lost_with_link(near, far, traffic))

        def unread(without_listener: bool) -> int:
            # Without a ring, frames go to the socket's queue until it is full. The next ring empties it.
            packets, _ = struct.unpack("II", borrowed.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            return int(packets) if without_listener else 0

        yield Wire(kind, borrowed, traffic, (near, far), counted, _not_told, unread)


@contextmanager
def _own_ring(kind: str, seed: int, *, strange: bool) -> Iterator[Wire]:
    with ExitStack() as stack:
        near, far, traffic = _wire(stack, kind, seed, strange=strange)
        arrived = dropped = unheard = 0

        def counted() -> Counted:
            return Counted(handed=0, no_room=0, no_link=_lost_with_link(near, far, traffic) - unheard)

        def unread(without_listener: bool) -> int:
            # Frames that come while no socket listens are in the near end's rx_packets, and in its rx_dropped, which also
            # counts frames lost with the link.
            nonlocal arrived, dropped, unheard
            now, arrived_before, dropped_before = device_counters(near), arrived, dropped
            arrived, dropped = now["rx"], now["rx_dropped"] - traffic.control.full
            if not without_listener:
                return 0
            unheard += dropped - dropped_before
            return int(arrived - arrived_before)

        yield Wire(kind, near, traffic, (near, far), counted, _not_told, unread)


def _not_told() -> int:
    return 0  # only the ring has the counter, and reading resets it


def wire(kind: str, seed: int, *, strange: bool = True) -> AbstractContextManager[Wire]:
    """Make devices, a source and its traffic, of a kind in KINDS. The caller starts the traffic."""
    if kind in ("tap", "tun"):
        return _queue(kind, seed, strange=strange)
    if kind == "ring":
        return _own_ring(kind, seed, strange=strange)
    if kind == "borrowed":
        return _borrowed_ring(kind, seed, strange=strange)
    return _packet(kind, seed, strange=strange)


KINDS = {
    "tap": ("readv", "os_readv"),
    "tun": ("readv", "os_readv"),
    "packet": ("recvmmsg", "readv", "os_readv"),
    "cooked": ("recvmmsg", "readv", "os_readv"),
    # An interface by name, and a borrowed socket on which linkrx makes a ring.
    "ring": ("packet_mmap",),
    "borrowed": ("packet_mmap",),
}
