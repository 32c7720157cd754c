"""Pure Python: `os.preadv`, or `recvmsg_into` of a socket, one packet per system call. Needs no compiled core, and is read first by
whoever writes a backend.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

from linkrx.backend import Backend, Capabilities, Descriptors, Owner, ReceiveConfig, align
from linkrx.kernel.uapi import (
    ETH_P_8021Q,
    IFNAMSIZ,
    IFREQ_BYTES,
    PACKET_AUXDATA,
    SIOCGIFINDEX,
    SOL_PACKET,
    TP_STATUS_CSUMNOTREADY,
    TP_STATUS_VLAN_TPID_VALID,
    TP_STATUS_VLAN_VALID,
)
from linkrx.packets.headers import CHECKSUM_UNFINISHED, OUTGOING, TRUNCATED, VLAN

# A Python that was built with musl may lack it.
RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)

# What preadv2 answers where a driver or the kernel does not have RWF_NOWAIT.
_NOWAIT_UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

# What a seccomp filter that does not know recvmsg(2) answers in its place.
_REFUSED = frozenset({errno.EPERM, errno.ENOSYS})


CONTROL_BYTES = 512  # room for all that the owner of a borrowed socket may have switched on
_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata

STRIDE_LEAST = 64
ARENAS = 2  # of a receiver: for no more are buffers kept, for they keep the arena
MADE_MOST = 4  # strides and counts of each


class _Duplicate(socket.socket):
    """One that may be dropped: without this Python warns of sockets that nobody has closed."""

    def __del__(self) -> None:
        self.close()


class OsReadv(Backend):
    """Works on every source. Cut packets are flagged; their true length is known of sockets."""

    name = "os_readv"
    rank = 10
    honours = frozenset({"buffer_sizes", "snaplen"})
    tells_metadata = True

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """A stream of bytes, and a packet socket whose interface has a name that Python's socket module cannot read."""
        if capabilities.kind == "capture_file":
            return "os_readv reads one packet per system call, and a capture file is a stream of bytes"
        name = capabilities.interface or ""
        if capabilities.socket and name.encode(errors="replace").decode() != name:
            return f"with each packet Python reads the name of the interface as UTF-8, and {name!r} is none"
        return None

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._fd = receive.fd
        self._layout = receive.layout
        self._descriptors = descriptors
        # What a read that took a packet returned: its length, or of a socket what recvmsg(2) tells.
        self._taken: list[Any] = []
        self._socket: socket.socket | None = None
        # The call, and its arguments behind the descriptor and the buffers. O_NONBLOCK is no help: it belongs to all who have
        # the open file, and any of them may clear it at any time. With RWF_NOWAIT no read waits, whatever they do.
        self._read: Callable[..., Any]
        self._arguments: tuple[Iterator[int], ...]
        self._ready: select.poll | None = None
        if receive.capabilities.socket:
            self._use_socket(receive.capabilities)
        else:
            self._use_reads()
        self._stride = STRIDE_LEAST  # between the starts of two packets
        self._made: dict[Owner, dict[tuple[int, int], list[list[memoryview]]]] = {}
        self._flagged = False

    def fill(self, arena: Owner, room: int) -> int:
        """Read until nothing is there, the descriptors are full, or a further packet might not fit."""
        taken = self._taken
        if not taken:
            self._receive(arena, room)
        count = len(taken)
        if count > 1 or (count and (self._socket is not None or taken[0] > self._layout.capacity)):
            self._report(count)
        elif count:
            self._report_one(taken[0])
        return count

    @property
    def held(self) -> int:
        """Packets that were read when an exception came, and not reported yet."""
        return len(self._taken)

    def leave_to_parent(self) -> None:
        """See Mechanism."""
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        """Let go of the arenas, and of the duplicate of a socket."""
        self._made.clear()
        if self._socket is not None:
            self._socket.close()

    def _receive(self, arena: Owner, room: int) -> None:
        # Each length goes into the list in the same C call that read the packet: a signal handler that raises,
        # such as Ctrl-C, can run between two packets but never between a packet and its length.
        try:
            buffers = self._until_long(self._buffers(arena, room))
            self._taken.extend(map(self._read, buffers, *self._arguments))
        except BlockingIOError:
            pass  # the queue is empty
        except OSError as error:
            if self._taken:
                self._descriptors.report.error = error.errno or 0  # behind what was read
            elif error.errno in _REFUSED and self._socket is not None and not self._packets:
                self._use_reads()
                self._receive(arena, room)
            elif error.errno in _NOWAIT_UNKNOWN and self._socket is None and self._arguments:
                self._ask_first()  # the driver knows no RWF_NOWAIT
                self._receive(arena, room)
            else:
                raise

    def _use_reads(self) -> None:
        self._read, self._arguments = partial(os.preadv, self._fd), (repeat(-1), repeat(RWF_NOWAIT or 0))
        if RWF_NOWAIT is None:
            self._ask_first()
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _ask_first(self) -> None:
        """Poll before each read, which cannot be told not to wait. Another reader of the same queue could still take the
        packet between the two, and make the read wait.
        """
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        self._ready = ready  # first: without it a read would wait
        self._read, self._arguments = partial(os.readv, self._fd), ()

    def _use_socket(self, found: Capabilities) -> None:
        """recvmsg(2) tells the true length of each packet and, of packet sockets, all that the kernel knows about it.

        A duplicate, which Python closes by itself.
        """
        self._packets = found.kind in ("packet", "packet_cooked")
        self._interface = found.interface, found.ifindex
        duplicate = os.dup(self._fd)
        try:
            # With SOCK_NONBLOCK in the type, Python leaves O_NONBLOCK alone even under socket.setdefaulttimeout().
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
            family = (
                socket.AF_PACKET if self._packets else socket.AF_UNIX
            )  # how Python reads the sender's address
            self._socket = _Duplicate(family, kind, 0, fileno=duplicate)
        except BaseException:
            os.close(duplicate)
            raise
        self._read = self._socket.recvmsg_into
        self._arguments = (
            repeat(CONTROL_BYTES if self._packets else 0),
            repeat(socket.MSG_DONTWAIT | socket.MSG_TRUNC),
        )

    def _buffers(self, arena: Owner, room: int) -> list[list[memoryview]]:
        """The iovecs of each read: a stride apart, and each with room for the largest packet.

        They overlap, so a packet longer than the stride must be the last. One byte more than what is kept: a packet
        that reaches it was cut. Making a memoryview costs almost half of what the read does, so they are kept for
        the next time, which is in the same place when nothing is held.
        """
        last = room - self._layout.capacity - 1
        most = self._descriptors.report.most or self._descriptors.rows
        starts = range(0, last + 1, self._stride)[:most]
        if arena not in self._made and len(self._made) == ARENAS:
            self._made.clear()
        made = self._made.setdefault(arena, {})
        key = (self._stride, len(starts))
        buffers = made.get(key)
        if buffers is None:
            if len(made) >= MADE_MOST:
                made.clear()
            sizes = self._layout.sizes or (self._layout.capacity,)
            memory = arena.view[arena.cursor : arena.cursor + room]
            buffers = made[key] = [_ladder(memory[start:], sizes) for start in starts]
        return buffers

    def _until_long(self, buffers: list[list[memoryview]]) -> Iterator[list[memoryview]]:
        taken, stride, ready, messages = self._taken, self._stride, self._ready, self._socket is not None
        for buffer in buffers:
            if ready is not None and not ready.poll(0):
                return
            yield buffer
            if (taken[-1][0] if messages else taken[-1]) > stride:
                return

    def _report_one(self, length: int) -> None:
        """A packet that came alone, and was not cut."""
        columns, report = self._descriptors.columns, self._descriptors.report
        if self._flagged:
            columns.flags[0] = 0
        columns.starts[0] = 0
        columns.lengths[0] = length
        report.receives = 1
        report.end = align(length)
        report.count = 1
        self._taken.clear()
        if length > self._stride:
            self._learn_stride(length)

    def _report(self, count: int) -> None:
        descriptors, capacity, stride = self._descriptors, self._layout.capacity, self._stride
        columns, report = descriptors.columns, descriptors.report
        wire_lengths: list[int] = [message[0] for message in self._taken] if self._socket else self._taken
        kept, longest = wire_lengths, max(wire_lengths)
        if self._flagged:
            columns.flags[:] = array("H", bytes(2 * descriptors.rows))
            self._flagged = False
        if longest > capacity:
            self._flagged = True
            columns.flags[:count] = array("H", [TRUNCATED if length > capacity else 0 for length in kept])
            kept = [min(length, capacity) for length in kept]
        if self._socket is not None:
            columns.wire_lengths[:count] = array("I", wire_lengths)
            if self._packets:
                self._flagged = True
                self._describe()
        columns.starts[:count] = array("I", range(0, count * stride, stride))
        columns.lengths[:count] = array("I", kept)
        report.receives = count
        report.end = align((count - 1) * stride + kept[-1])
        report.count = count
        self._taken.clear()
        self._learn_stride(longest)

    def _describe(self) -> None:
        """What the kernel tells about each packet: struct sockaddr_ll, and struct tpacket_auxdata of linux/if_packet.h."""
        columns, known = self._descriptors.columns, dict([self._interface])
        for row, (_, control, _, (name, protocol, kind, link_type, address)) in enumerate(self._taken):
            if name not in known:
                known[name] = self._index_of(name)
            columns.interfaces[row] = known[name] or 0
            columns.protocols[row] = protocol
            columns.link_types[row] = link_type
            columns.addresses[row] = int.from_bytes(address[:8].ljust(8, b"\0"), sys.byteorder)
            columns.address_lengths[row] = min(len(address), 8)
            columns.vlan_tcis[row] = columns.vlan_tpids[row] = 0
            flags = OUTGOING if kind == socket.PACKET_OUTGOING else 0
            for level, what, data in control:
                if (level, what) != (SOL_PACKET, PACKET_AUXDATA) or len(data) < _AUXDATA.size:
                    continue
                status, length, kept, _, _, tci, tpid = _AUXDATA.unpack_from(data)
                # A socket filter may have cut the packet; only here is its true length told.
                columns.wire_lengths[row] += max(0, length - kept)
                if status & TP_STATUS_CSUMNOTREADY:
                    flags |= CHECKSUM_UNFINISHED
                if status & TP_STATUS_VLAN_VALID:  # a tag of 0 is legal
                    flags |= VLAN
                    columns.vlan_tcis[row] = tci
                    columns.vlan_tpids[row] = tpid if status & TP_STATUS_VLAN_TPID_VALID else ETH_P_8021Q
            columns.flags[row] |= flags

    def _index_of(self, name: str) -> int:
        """In the socket's own namespace; 0 where the interface is gone."""
        request = os.fsencode(name).ljust(IFREQ_BYTES, b"\0")
        try:
            index: int = struct.unpack_from("i", fcntl.ioctl(self._fd, SIOCGIFINDEX, request), IFNAMSIZ)[0]
        except OSError:
            return 0
        return index

    def _learn_stride(self, longest: int) -> None:
        """Room for the longest just seen, and towards shorter ones by halves: what is kept should lie close together."""
        needed = -(-longest // STRIDE_LEAST) * STRIDE_LEAST
        self._stride = max(needed, self._stride // 2 // STRIDE_LEAST * STRIDE_LEAST, STRIDE_LEAST)


def _ladder(memory: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    pieces = []
    for size in (*sizes, 1):
        pieces.append(memory[:size])
        memory = memory[size:]
    return pieces
