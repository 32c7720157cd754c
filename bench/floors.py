"""The bare C loops of floors.c, and the frames for their queues."""

from __future__ import annotations

import ctypes
import mmap
import random
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from compiled import library
from race import Check, Drain, Queue, Reader

from linkrx.kernel.uapi import ETH_P_ALL
from linkrx.testing.rigs import LOCAL, REMOTE

MEMORY = 512 * 1024
MESSAGES = 64  # of one recvmmsg()
STAMP = 42  # as in floors.c
RING_BLOCK, RING_BLOCKS = 128 * 1024, 512  # linkrx's default


class Account(ctypes.Structure):
    """struct account in floors.c."""

    _fields_ = [
        ("packets", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("check", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
    ]


class Flood(ctypes.Structure):
    """struct flood in floors.c: frames that send() accepted and refused, and its processor time."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("accepted", "refused", "took_ns", "cpu_ns")]

    accepted: int
    refused: int
    took_ns: int
    cpu_ns: int


def _memory(size: int) -> tuple[mmap.mmap, ctypes.c_void_p]:
    """Memory whose pages are already mapped, and its address, which is valid while the memory is held."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return memory, ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))


class Frames:
    """Frames of one size that fill a queue: Ethernet, IPv4, UDP, random bytes. Each contains its number in the fill."""

    def __init__(self, size: int, neighbours: int = 1) -> None:
        """Make frames from `neighbours` senders in turn."""
        self.size = size
        self.distinct = max(1, min(64, 1024 * 1024 // size))
        chance = random.Random(size)
        frames = b"".join(
            udp_frame(size, REMOTE[:-1] + bytes([2 + number % neighbours]), chance.randbytes(size))
            for number in range(self.distinct)
        )
        self._memory, self._address = _memory(len(frames))
        self._memory[:] = frames

    def flood(self, injector: socket.socket, seconds: float) -> Flood:
        """Send the first frame, numbered, as fast as possible for `seconds`."""
        result = Flood()
        library("floors").flood(
            injector.fileno(),
            self._address,
            ctypes.c_long(self.size),
            ctypes.c_uint64(int(seconds * 1e9)),
            ctypes.byref(result),
        )
        return result

    def send_singly(self, injector: socket.socket, pauses_ns: Sequence[int]) -> list[int]:
        """Send one frame after each pause. Returns when each was sent: CLOCK_MONOTONIC, nanoseconds."""
        packets = len(pauses_ns)
        pauses, sent = (ctypes.c_uint64 * packets)(*pauses_ns), (ctypes.c_uint64 * packets)()
        library("floors").send_singly(
            injector.fileno(),
            self._address,
            ctypes.c_long(self.size),
            ctypes.c_long(packets),
            pauses,
            sent,
        )
        return list(sent)

    def send(self, injector: socket.socket, packets: int, first: int = 0) -> int:
        """Send `packets` frames, numbered from `first`. Returns how many the kernel accepted."""
        call = library("floors").fill
        call.restype = ctypes.c_long
        numbers = map(ctypes.c_long, (self.size, self.distinct, first, packets))
        return int(call(injector.fileno(), self._address, *numbers))

    def send_paced(self, injector: socket.socket, packets: int, interval_ns: int) -> tuple[int, int]:
        """Send `packets` frames, one every `interval_ns`. Returns how many the kernel accepted, and how many of them were late."""
        call, late = library("floors").send_paced, ctypes.c_uint64(0)
        call.restype = ctypes.c_long
        sent = call(
            injector.fileno(),
            self._address,
            *map(ctypes.c_long, (self.size, self.distinct, packets)),
            ctypes.c_uint64(interval_ns),
            ctypes.byref(late),
        )
        return int(sent), late.value

    def numbered(self, packets: int) -> Iterator[bytes]:
        """The frames that `send` sends."""
        for number in range(packets):
            at = number % self.distinct * self.size
            yield (
                self._memory[at : at + STAMP]
                + struct.pack("!I", number)
                + self._memory[at + STAMP + 4 : at + self.size]
            )

    def check(self, packets: int) -> int:
        """The Adler-32 checksum of `packets` frames, in order."""
        check = 1
        for frame in self.numbered(packets):
            check = zlib.adler32(frame, check)
        return check


def udp_frame(size: int, remote: bytes, content: bytes) -> bytes:
    """A frame of `size` bytes whose headers are all valid for a dissector."""
    udp = struct.pack("!HHHH", 4000, 4001, size - 34, 0)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size - 14, 0, 0, 64, 17, 0, b"\x0a\0\0\2", b"\x0a\0\0\1")
    total = sum(struct.unpack("!10H", ip))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", total ^ 0xFFFF) + ip[12:]
    return (LOCAL + remote + b"\x08\x00" + ip + udp + content)[:size]


def _account(check: Check | None) -> Account:
    return Account(check=1, checked=check is not None)


def _tell(check: Check | None, account: Account) -> int:
    if check is not None:
        check.set(account.packets, account.bytes, account.check)
    return int(account.packets)


def receive_singly(fd: int, packets: int) -> list[int]:
    """Receive packets with poll() and read(). Returns when each was received: CLOCK_MONOTONIC, nanoseconds."""
    _kept, address = _memory(65_600)
    arrived = (ctypes.c_uint64 * packets)()
    library("floors").receive_singly(fd, address, ctypes.c_long(packets), arrived)
    return list(arrived)


def receive_polled(fd: int, packets: int, check: Check | None) -> int:
    """Receive packets with poll() and read(), one by one. Returns how many came."""
    _kept, address = _memory(65_600)
    account = _account(check)
    library("floors").receive_polled(fd, address, ctypes.c_long(packets), ctypes.byref(account))
    return _tell(check, account)


def loop_floor(queue: Queue, fd: int, function: str) -> Reader:
    """A loop in floors.c that drains a descriptor: `drain_read`, `drain_recvmmsg` or `drain_recvmmsg_metadata`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        slot = (queue.frames.size + 127) & ~63
        room = MEMORY if function == "drain_read" else slot * MESSAGES
        _kept, address = _memory(room)
        call, wanted = getattr(library("floors"), function), ctypes.c_long(queue.packets)
        argument = ctypes.c_long(room if function == "drain_read" else slot)

        def drain() -> int:
            account = _account(check)
            call(fd, address, argument, wanted, ctypes.byref(account))
            return _tell(check, account)

        yield drain

    return Reader(queue, opened)


class RingWalk:
    """A ring on a packet socket, and a bare walk of it."""

    def __init__(self, source: socket.socket, check: Check | None = None) -> None:
        """Call `close` before the socket is closed, because the kernel then removes the ring."""
        self.source = source
        make = library("floors").make_ring
        make.restype = ctypes.c_void_p
        self._shape = (ctypes.c_uint(RING_BLOCK), ctypes.c_uint(RING_BLOCKS))
        self._ring, self._block = ctypes.c_void_p(make(source.fileno(), *self._shape)), ctypes.c_uint32(0)
        self._walk, self._check = library("floors").walk_ring, check
        assert self._ring.value, "no ring"

    def __call__(self) -> int:
        """Walk all closed blocks."""
        account = _account(self._check)
        self._walk(self._ring, *self._shape, ctypes.byref(self._block), ctypes.byref(account))
        return _tell(self._check, account)

    def close(self) -> None:
        """Unmap the ring."""
        library("floors").free_ring(self._ring, *self._shape)


def ring_floor(queue: Queue, near: str) -> Reader:
    """A bare walk of a new TPACKET_V3 ring on an interface."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[RingWalk]:
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as source,
            closing(RingWalk(source, check)) as walk,
        ):
            source.bind((near, ETH_P_ALL))
            yield walk

    return Reader(queue, opened)
