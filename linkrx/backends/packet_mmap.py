"""C: packets from a ring that the kernel fills (TPACKET_V3), with no system call while they flow."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import closing
from functools import partial
from typing import Any

from linkrx import _core, arena
from linkrx.arena import Arena
from linkrx.backend import CoreBackend, Receive
from linkrx.batch import Batch
from linkrx.capabilities import Capabilities
from linkrx.columns import Descriptors
from linkrx.errors import BackendUnavailable, UnsupportedOption
from linkrx.framing import Framing
from linkrx.lent import Lease, LentBatch
from linkrx.loans import Loans, most_blocks
from linkrx.packet import OUTGOING, TIMESTAMP
from linkrx.rtnetlink import RouteSocket

logger = logging.getLogger("linkrx")

# The kernel closes a block when it is full, and when the retire time is up and something is in it. So at the default
# latency of 1 ms each block is 1 ms that the reader may be away, be there ever so few packets: many small blocks last
# longer than a few large ones. 64 MiB are 512 of the least size, half a second. A million packets of 64 bytes per
# second, which take 152 bytes each in the ring, fill 1.2 blocks per millisecond: 0.44 s. Memory is taken at once, and
# kept.
RING_BYTES = 64 * 1024 * 1024

# Frames do not cross blocks, and what is longer than a block is cut. The least holds a super-packet of 64 KiB; that is
# what a block has, unless the interface is set up for more (BIG TCP), or the ring is so large that the number of blocks
# is not what limits it. The most holds any frame that Linux makes: capabilities.LARGEST_MESSAGE. The kernel takes what
# is no power of two as the next that is.
BLOCK_LEAST = 128 * 1024
BLOCK_MOST = 1024 * 1024
HEADROOM = 4096  # far more than the kernel puts in front of a frame
BLOCKS_MOST = 4096  # more are not made smaller for
BLOCKS_LEAST = 2  # one to read while the other is filled

LATENCY_LEAST = 0.001  # tp_retire_blk_tov counts milliseconds, and 0 means: as the kernel likes
RETIRE_MOST = 2**31 - 1


class PacketMmap(CoreBackend):
    """The recommended choice for an interface by name."""

    name = "packet_mmap"
    rank = 40
    honours = frozenset({"buffer_sizes", "outgoing", "timestamps", "fanout", "latency", "zero_copy"})
    batch_size = 1024  # more than a block of the least size holds: 862 frames of 64 bytes
    has_queue = True

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """All but packet sockets: the kernel knows no ring for others."""
        if capabilities.kind in ("packet", "packet_cooked"):
            return None
        return f"packet_mmap puts a ring on AF_PACKET sockets only, and the source is {capabilities.a_title}"

    @classmethod
    def discouraged(cls, capabilities: Capabilities) -> str | None:
        """A socket that somebody else uses as well."""
        if capabilities.owned:
            return None
        return "a ring takes the place of the socket's queue for all who use it, and what is in the queue is lost"

    def __init__(self, receive: Receive, descriptors: Descriptors) -> None:
        options = receive.options
        if options.zero_copy and not receive.capabilities.owned:
            raise UnsupportedOption(
                f"zero_copy=True on the {receive.capabilities.title}: the ring could not be taken off while "
                "anything of it is held. Give the name of the interface"
            )
        self._use("lrx_packet_mmap_fill", descriptors)
        self._state, self._block, size = _ring(receive)
        self._memory: memoryview | None = None
        self._lease: Lease | None = None
        self._loans: Loans | None = None
        self._joins = options.fanout is not None
        kept = None
        try:
            if options.zero_copy:
                self._start = _core.lib.lrx_ring_memory(self._state)
                kept = _core.new("struct lrx_kept *", memory=self._start, size=size)
                unmap = partial(_core.lib.lrx_kept_unmap, kept)
                self._memory = memoryview(_core.buffers(self._start, size, unmap)[0])
            elif arena.REFERENCE_COUNTS_ARE_EXACT and not options.segment and most_blocks(size, self._block):
                self._loans = Loans(self._state, size, self._block)
            if self._joins:
                _core.lib.lrx_ring_shut(self._state)
        except BaseException:
            if options.zero_copy and self._memory is None:
                start = _core.lib.lrx_ring_memory(self._state)
                kept = kept or _core.new("struct lrx_kept *", memory=start, size=size)
                _core.lib.lrx_kept_unmap(kept, self._state)
            self.close()
            raise
        self.lends = self._memory is not None or self._loans is not None

    def start(self) -> None:
        """From now on this member of a fanout group takes its share."""
        if self._joins:
            _core.lib.lrx_ring_start(self._state)

    def fill(self, arena: Arena, room: int) -> int:
        """Until no closed block is left, the descriptors are full, or the next packet does not fit."""
        if self._loans is not None:
            self._loans.settle(arena)
        else:
            self.let_go()
        return super().fill(arena, room)

    def lent_batch(self, arena: Arena, table: int, rows: int, count: int, framing: Framing) -> Batch | None:
        """Over blocks that the last fill lent; with `zero_copy` always, and with an end of its own."""
        if self._loans is not None:
            memory = self._loans.memory()
            return None if memory is None else Batch(memory, 0, table, rows, count, framing, arena.memory)
        lease = self._lease_last()
        batch = LentBatch(lease.memory, 0, table, rows, count, framing, arena.memory)
        batch._lease = lease
        return batch

    def _lease_last(self) -> Lease:
        """The block that the last fill was about."""
        assert self._memory is not None
        lease, address = self._lease, _core.lib.lrx_ring_block(self._state)
        if lease is None or lease.address != address:
            start = address - self._start
            self._lease = lease = Lease(self._memory[start : start + self._block].toreadonly(), address)
        if (
            not lease.hold
        ):  # only now, for a lease that an exception keeps from being stored would give the block back
            _core.returning(lease.hold, lease.memory[:], _core.lib.lrx_ring_return)
        return lease

    def let_go(self) -> None:
        """Keep the block for as long only as more of its packets are to come."""
        if self._lease is not None and not self.held:
            self._lease = None

    @property
    def lent(self) -> bool:
        """Poll looks at the most recently closed block only: ready for ever if that is lent, silent if an older is."""
        return self._memory is not None and bool(_core.lib.lrx_ring_lent(self._state))

    @property
    def held(self) -> int:
        """Packets of a block that was begun. The kernel says nothing of them once a later block was given back."""
        waiting: int = _core.lib.lrx_ring_held(self._state) if self._state is not None else 0
        return waiting

    def drops(self) -> int:
        """Those that found no room in the ring: tp_drops, which SO_MEMINFO does not have."""
        dropped: int = _core.lib.lrx_ring_drops(self._state)
        return dropped

    def freezes(self) -> int:
        """tp_freeze_q_cnt."""
        frozen: int = _core.lib.lrx_ring_freezes(self._state)
        return frozen

    def close(self) -> None:
        """Take the ring off the socket."""
        if self._loans is not None:
            self._loans.close()
        state, self._state = self._state, None
        if state is not None:
            _core.lib.lrx_ring_close(state)
        self._memory = self._lease = self._loans = None  # what is lent stays mapped until nobody holds it

    def abandon(self) -> None:
        """The ring is the parent's: it is not mapped in the child."""
        state, self._state = self._state, None
        if state is not None:
            _core.lib.lrx_ring_abandon(state)
        self._memory = self._lease = self._loans = None


def shape(size: int, largest: int = 0) -> tuple[int, int]:
    """Block size and number of blocks for a ring of `size` bytes and frames of `largest` bytes."""
    block = BLOCK_LEAST
    while block < BLOCK_MOST and (block < largest + HEADROOM or size > block * BLOCKS_MOST):
        block *= 2
    return block, max(BLOCKS_LEAST, size // block)


def _largest(receive: Receive) -> int:
    """The most that the interface is set up for; 0 where that is not known, as of one in another namespace."""
    found = receive.capabilities
    if found.ifindex is None:
        return 0
    with closing(RouteSocket()) as route:
        link = route.link(index=found.ifindex)
    return link.super_packet if link and link.name == found.interface else 0


def _ring(receive: Receive) -> tuple[Any, int, int]:
    """A ring as large as was asked for, or as the kernel has memory for; with the sizes of a block and of all."""
    options, found = receive.options, receive.capabilities
    if options.latency < LATENCY_LEAST:
        raise UnsupportedOption(
            f"latency={options.latency} on the {found.title}: packet_mmap can promise {LATENCY_LEAST} at the least, "
            "for the kernel counts milliseconds; backend='recvmmsg' holds nothing back"
        )
    retire = int(min(options.latency * 1000, RETIRE_MOST))
    wanted = (TIMESTAMP if options.timestamps else 0) | (OUTGOING if options.outgoing else 0)
    block, asked = shape(options.receive_buffer or RING_BYTES, _largest(receive))
    blocks = asked
    while True:
        state = _core.lib.lrx_ring_open(
            receive.fd,
            block,
            blocks,
            retire,
            found.vnet_header_size,
            receive.layout.capacity,
            wanted,
            options.zero_copy,
        )
        if state:
            break
        code = _core.last_error()
        if code == errno.EBUSY:
            raise BackendUnavailable(
                f"packet_mmap on the {found.title}: {os.strerror(code)}: it has a ring already. Give linkrx a socket "
                "without one, or the name of the interface"
            )
        if code != errno.ENOMEM or blocks == BLOCKS_LEAST:
            raise OSError(code, os.strerror(code))
        blocks = max(BLOCKS_LEAST, blocks // 2)
    if blocks < asked:
        logger.warning(
            "packet_mmap on the %s: no memory for a ring of %d bytes; it has %d. receive_buffer= asks for less",
            found.title,
            asked * block,
            blocks * block,
        )
    return state, block, block * blocks
