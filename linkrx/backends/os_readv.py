"""Pure Python: `os.preadv`, or recvmsg(2) on sockets, one packet per system call. Needs no compiled core. Authors of backends can
begin here.
"""

from __future__ import annotations

import errno
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
from linkrx.kernel import messages
from linkrx.kernel.errnos import FORBIDDEN, NOWAIT_UNKNOWN
from linkrx.kernel.uapi import (
    ETH_P_8021Q,
    PACKET_AUXDATA,
    SOL_PACKET,
    TP_STATUS_CSUMNOTREADY,
    TP_STATUS_VLAN_TPID_VALID,
    TP_STATUS_VLAN_VALID,
)
from linkrx.packets.headers import CHECKSUM_UNFINISHED, OUTGOING, TRUNCATED, VLAN

# A Python that was built with musl may lack it.
RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)

_NOTHING = frozenset({errno.EAGAIN, errno.EINTR})
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_TRUNC

_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata

STRIDE_LEAST = 64
ARENAS = 2  # the arenas of a receiver; cached buffers keep an arena alive, so no more are cached
MADE_MOST = 4  # pairs of stride and count that are cached for each arena


class OsReadv(Backend):
    """Works on every source but capture files. Cut packets are flagged; on sockets their length before cutting is known."""

    name = "os_readv"
    rank = 10
    honours = frozenset({"buffer_sizes", "snaplen"})
    tells_metadata = True

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Capture files, which are byte streams."""
        if capabilities.kind == "capture_file":
            return "os_readv reads one packet per system call, and a capture file is a stream of bytes"
        return None

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._fd = receive.fd
        self._layout = receive.layout
        self._descriptors = descriptors
        self._taken: list[int] = []  # the length of each packet that was read; a last -1: recvmsg failed
        # recvmsg(2) reports the length before cutting, and on packet sockets all metadata of a packet.
        self._messages = receive.capabilities.socket
        self._packets = receive.capabilities.kind in ("packet", "packet_cooked")
        # A last piece of one byte more than the layout keeps: a packet that reaches it is cut.
        self._sizes = (*(self._layout.sizes or (self._layout.capacity,)), 1)
        # The buffers of the last fill, of which the first hold the packets that were read; their places in the memory of the
        # fill; and the arguments for which these are the buffers.
        self._used: list[Any] = []
        self._starts = range(0)
        self._ready_for: tuple[Owner, int, int, int, int] | None = None
        # The call, and its arguments after descriptor and buffers. RWF_NOWAIT applies to one read. O_NONBLOCK would apply to all
        # processes that have the file open, and each of them could clear it.
        self._read: Callable[..., int]
        self._arguments: tuple[Iterator[int], ...]
        self._ready: select.poll | None = None
        self._stride = STRIDE_LEAST  # between the starts of two packets
        self._made: dict[Owner, dict[tuple[int, int], list[Any]]] = {}
        if not self._messages:
            self._use_reads()
        self._flagged = False

    def fill(self, arena: Owner, room: int) -> int:
        """Read until the queue is empty, the descriptors are full, or another packet might not fit."""
        taken = self._taken
        if taken and taken[0] < 0 and messages.last_errno() in _NOTHING:
            taken.clear()  # an exception came when the queue was empty; packets may have come since
        if not taken:
            self._receive(arena, room)
        if taken and taken[-1] < 0:
            self._end(arena, room)
        count = len(taken)
        if count > 1 or (count and (self._messages or taken[0] > self._layout.capacity)):
            self._report(count)
        elif count:
            self._report_one(taken[0])
        return count

    @property
    def held(self) -> int:
        """The number of packets that were read and not reported, because an exception came."""
        taken = self._taken
        return len(taken) - (taken[-1] < 0) if taken else 0

    def close(self) -> None:
        """Release the arenas."""
        self._forget_buffers()

    def _forget_buffers(self) -> None:
        self._made.clear()
        self._used, self._ready_for = [], None

    def _receive(self, arena: Owner, room: int) -> None:
        # The C call that reads a packet also appends its length to the list. So an exception of a signal handler, such as Ctrl-C,
        # never comes between the two.
        buffers = self._buffers(arena, room)
        if self._messages:
            self._taken.extend(messages.receive(self._fd, buffers, _FLAGS))
            return
        try:
            self._taken.extend(map(self._read, buffers, *self._arguments))
        except BlockingIOError:
            pass  # the queue is empty
        except OSError as error:
            if self._taken:
                self._descriptors.report.error = error.errno or 0  # it follows the packets
            elif error.errno in NOWAIT_UNKNOWN and self._arguments:
                self._poll_first()  # the driver does not support RWF_NOWAIT
                self._receive(arena, room)
            else:
                raise

    def _end(self, arena: Owner, room: int) -> None:
        """Handle the errno of recvmsg(2). It follows the packets that were read before."""
        taken, code = self._taken, messages.last_errno()
        if code in FORBIDDEN and not self._packets and len(taken) == 1:
            taken.clear()
            self._use_reads()
            self._receive(arena, room)
            return
        if code not in _NOTHING:
            self._descriptors.report.error = code
        taken.pop()

    def _use_reads(self) -> None:
        self._read, self._arguments = partial(os.preadv, self._fd), (repeat(-1), repeat(RWF_NOWAIT or 0))
        if RWF_NOWAIT is None:
            self._poll_first()
        self._forget_buffers()
        self._messages = False

    def _poll_first(self) -> None:
        """Without RWF_NOWAIT, poll before each read. The read still waits if another reader takes the packet in between."""
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        self._ready = ready  # set before `_read`, because an exception may come between
        self._read, self._arguments = partial(os.readv, self._fd), ()

    def _buffers(self, arena: Owner, room: int) -> Iterator[Any]:
        """The buffers of each read: a stride apart, and each with room for the largest packet.

        Buffers overlap, so a packet longer than the stride must be the last. Each has one byte more than the layout keeps: a
        packet that reaches it is cut. Making buffers takes longer than the read, so they are cached. The next receive is at the
        same place in the arena if no packet of this one is kept.
        """
        wanted = (arena, arena.cursor, room, self._descriptors.report.most, self._stride)
        if wanted != self._ready_for:
            self._find_buffers(arena, room)
            self._ready_for = wanted
        return self._places(arena) if self._messages else self._ladders(arena)

    def _find_buffers(self, arena: Owner, room: int) -> None:
        """Take the buffers that an earlier fill made for this arena, stride and number of packets, or make them."""
        report, stride = self._descriptors.report, self._stride
        starts = range(0, room - self._layout.capacity, stride)[: report.most or self._descriptors.rows]
        if report.held_back:  # each such fill is at another place, so its buffers are not cached
            self._starts, self._used = starts, []
            return
        if arena not in self._made and len(self._made) == ARENAS:
            self._made.clear()
        made = self._made.setdefault(arena, {})
        key = (stride, len(starts))
        if key not in made:
            if len(made) >= MADE_MOST:
                made.clear()
            memory = arena.view[arena.cursor :]
            made[key] = [] if self._messages else [_ladder(memory[start:], self._sizes) for start in starts]
        self._starts, self._used = starts, made[key]

    def _places(self, arena: Owner) -> Iterator[Any]:
        """The places for messages. They are made when they are needed, because a packet that comes alone needs one only."""
        taken, stride, places = self._taken, self._stride, self._used
        for number, start in enumerate(self._starts):
            if number == len(places):
                memory = arena.view[arena.cursor + start :][: sum(self._sizes)]
                places.append(messages.Place(memory, self._sizes, metadata=self._packets))
            place = places[number]
            place.prepare()
            yield place.pointer
            if not 0 <= taken[-1] <= stride:
                return

    def _ladders(self, arena: Owner) -> Iterator[Any]:
        taken, stride, ready = self._taken, self._stride, self._ready
        for buffer in self._used or self._new_ladders(arena):
            if ready is not None and not ready.poll(0):
                return
            yield buffer
            if taken[-1] > stride:
                return

    def _new_ladders(self, arena: Owner) -> Iterator[Any]:
        return (_ladder(arena.view[arena.cursor + start :], self._sizes) for start in self._starts)

    def _report_one(self, length: int) -> None:
        """Report one packet that is not cut. The first of a fill always starts at 0, so its start is never another."""
        descriptors = self._descriptors
        columns, report = descriptors.columns, descriptors.report
        if self._flagged:
            columns.flags[0] = 0
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
        kept, longest = self._taken, max(self._taken)
        if self._flagged:
            columns.flags[:] = array("H", bytes(2 * descriptors.rows))
            self._flagged = False
        if longest > capacity:
            self._flagged = True
            columns.flags[:count] = array("H", [TRUNCATED if length > capacity else 0 for length in kept])
            kept = [min(length, capacity) for length in kept]
        if self._messages:
            columns.wire_lengths[:count] = array("I", self._taken)
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
        """Write the metadata of each packet: struct sockaddr_ll and struct tpacket_auxdata of linux/if_packet.h."""
        columns = self._descriptors.columns
        for row, place in enumerate(self._used[: len(self._taken)]):
            index, protocol, kind, link_type, address = place.sender()
            columns.interfaces[row] = index
            columns.protocols[row] = protocol
            columns.link_types[row] = link_type
            columns.addresses[row] = int.from_bytes(address.ljust(8, b"\0"), sys.byteorder)
            columns.address_lengths[row] = len(address)
            columns.vlan_tcis[row] = columns.vlan_tpids[row] = 0
            flags = OUTGOING if kind == socket.PACKET_OUTGOING else 0
            for level, what, data in place.control():
                if (level, what) != (SOL_PACKET, PACKET_AUXDATA) or len(data) < _AUXDATA.size:
                    continue
                status, length, kept, _, _, tci, tpid = _AUXDATA.unpack_from(data)
                # A socket filter may have cut the packet. Only tp_len has its length before that.
                columns.wire_lengths[row] += max(0, length - kept)
                if status & TP_STATUS_CSUMNOTREADY:
                    flags |= CHECKSUM_UNFINISHED
                if status & TP_STATUS_VLAN_VALID:  # the flag, because a TCI of 0 is valid
                    flags |= VLAN
                    columns.vlan_tcis[row] = tci
                    columns.vlan_tpids[row] = tpid if status & TP_STATUS_VLAN_TPID_VALID else ETH_P_8021Q
            columns.flags[row] |= flags

    def _learn_stride(self, longest: int) -> None:
        """Set the stride to the longest packet of this receive, but at least to half the last stride, so that packets lie close."""
        needed = -(-longest // STRIDE_LEAST) * STRIDE_LEAST
        self._stride = max(needed, self._stride // 2 // STRIDE_LEAST * STRIDE_LEAST, STRIDE_LEAST)


def _ladder(memory: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    pieces = []
    for size in sizes:
        pieces.append(memory[:size])
        memory = memory[size:]
    return pieces
