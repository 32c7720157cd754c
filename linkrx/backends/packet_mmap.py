"""C: packets from a ring that the kernel fills (TPACKET_V3), with no system call while they flow."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import closing
from typing import Any

from linkrx import _core
from linkrx.backend import Capabilities, CoreBackend, Descriptors, ReceiveConfig
from linkrx.errors import BackendUnavailable, UnsupportedOption
from linkrx.kernel.rtnetlink import Link, RouteSocket
from linkrx.kernel.uapi import ARPHRD_LOOPBACK
from linkrx.packets.headers import OUTGOING, TIMESTAMP
from linkrx.sources.capabilities import LARGEST_MESSAGE

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
# Devices that hand on what comes in through others, each with limits of its own; and those that are one end of a pair.
MASTERS = frozenset({"bridge", "bond", "team", "openvswitch"})
PAIRS = frozenset({"veth", "netkit", "vxcan"})
STACKED_MOST = 8  # devices above one another: net/core/dev.c, MAX_NEST_DEV
HEADROOM = 4096  # far more than the kernel puts in front of a frame
BLOCKS_MOST = 4096  # more are not made smaller for
BLOCKS_LEAST = 2  # one to read while the other is filled

# Blocks that one batch may read in place, and the share of the ring that this may be: two batches at most are in place, and
# the kernel fills the rest meanwhile. Smaller rings are copied from.
BLOCKS_IN_PLACE = 4
SHARE_IN_PLACE = 8

LATENCY_LEAST = 0.001  # tp_retire_blk_tov counts milliseconds, and 0 means: as the kernel likes
RETIRE_MOST = 2**31 - 1

# The kernel looks at the open block once in a retire time, and closes it when nothing has closed it since the last look. Both
# are counted in timer ticks, before Linux 6.18: rounded up, and one late.
RETIRE_LOOKS = 2
_CLOCK_MONOTONIC_COARSE = 6  # linux/time.h; its resolution is a tick

# What the shortest frame takes in a ring: struct tpacket3_hdr, struct sockaddr_ll and an Ethernet header, aligned.
FRAME_LEAST = 96


class PacketMmap(CoreBackend):
    """The recommended choice for an interface by name."""

    name = "packet_mmap"
    rank = 40
    honours = frozenset({"buffer_sizes", "snaplen", "outgoing", "timestamps", "fanout"})
    tells_metadata = True
    batch_size = 1024  # more than a block of the least size holds: 862 frames of 64 bytes
    has_queue = True
    coalesces = True

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

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._use("lrx_packet_mmap_fill", descriptors)
        self._joins = receive.options.fanout is not None
        tick = time.clock_getres(_CLOCK_MONOTONIC_COARSE)
        self.readable_within = RETIRE_LOOKS * ((receive.options.latency or LATENCY_LEAST) + 2 * tick)
        self._state, self._blocks = _ring(receive)
        try:
            if not receive.options.segment:
                most = min(BLOCKS_IN_PLACE, self._blocks // SHARE_IN_PLACE)
                self._mechanism.slots = _core.lib.lrx_ring_read_in_place(self._state, most)
                self._mechanism.release = _core.function("lrx_ring_release")
            if self._joins:
                _core.lib.lrx_ring_shut(self._state)
        except BaseException:
            self.close()
            raise

    def joining(self) -> None:
        """What it drops up to here, another member receives; what it drops between here and `start` is lost."""
        _core.lib.lrx_ring_forget_drops(self._state)

    def start(self) -> None:
        """From now on this member of a fanout group takes its share."""
        if self._joins:
            _core.lib.lrx_ring_start(self._state)

    @property
    def queue_limit(self) -> int:  # type: ignore[override]
        """As many as the ring holds of the shortest."""
        size: int = _core.lib.lrx_ring_size(self._state)
        return size // FRAME_LEAST

    @property
    def held(self) -> int:
        """Packets of a block that was begun. The kernel says nothing of them once a later block was given back."""
        waiting: int = _core.lib.lrx_ring_held(self._state) if self._state is not None else 0
        return waiting

    def drops(self) -> int:
        """Those that found no room in the ring: tp_drops, which SO_MEMINFO does not have."""
        dropped: int = _core.lib.lrx_ring_drops(self._state)
        return dropped

    def freezes(self) -> int | None:
        """tp_freeze_q_cnt; None where a seccomp filter forbids getsockopt(2)."""
        frozen: int = _core.lib.lrx_ring_freezes(self._state)
        return None if frozen < 0 else frozen

    def close(self) -> None:
        """Take the ring off the socket."""
        state, self._state = self._state, None
        if state is None:
            return
        if self.held_by_others:
            logger.warning(
                "packet_mmap: no memory to copy the packets that are still held, so the ring of %d bytes stays mapped",
                _core.lib.lrx_ring_size(state),
            )
        _core.lib.lrx_ring_close(state, not self.held_by_others)

    def abandon(self) -> None:
        """The ring is the parent's: it is not mapped in the child."""
        state, self._state = self._state, None
        if state is not None:
            _core.lib.lrx_ring_abandon(state)


def shape(size: int, largest: int = 0) -> tuple[int, int]:
    """Block size and number of blocks for a ring of `size` bytes and frames of `largest` bytes."""
    block = BLOCK_LEAST
    while block < BLOCK_MOST and (block < largest + HEADROOM or size > block * BLOCKS_MOST):
        block *= 2
    return block, max(BLOCKS_LEAST, size // block)


def _largest(receive: ReceiveConfig) -> int:
    """The longest frame that can come: of what the interface and its peer are set up for, and of what both may be told later.

    0 where that is not known, as of one in another namespace: then it is no more than usual.
    """
    found = receive.capabilities
    with closing(RouteSocket()) as route:
        if found.every_interface:
            return max(link.super_packet for link in route.links())
        if found.ifindex is None:
            return 0
        link = route.link(index=found.ifindex)
        names = (link.name, *link.alternative_names) if link else ()
        if link is None or (not found.owned and found.interface not in names):
            return 0  # the same index in another namespace
        return _largest_through(route, link)


def _largest_through(route: RouteSocket, link: Link | None, above: int = 0) -> int:
    """Of a device, and of what it receives through: a veth sends what its peer's limit lets through, and what comes to a device
    above another has come to that one. What cannot be asked may have any limit.
    """
    if link is None or link.hardware_type == ARPHRD_LOOPBACK or link.kind in MASTERS or above == STACKED_MOST:
        return LARGEST_MESSAGE
    own = max(link.super_packet, link.mtu or 0)
    if link.peer in (None, 0):
        return own
    peer = route.link(index=link.peer or 0, namespace=link.peer_namespace)
    if link.kind in PAIRS or (link.peer_namespace is not None and peer and peer.peer in (None, 0)):
        return max(own, peer.super_packet if peer else LARGEST_MESSAGE)
    # The number of another device in another namespace means nothing here.
    return max(own, _largest_through(route, peer if link.peer_namespace is None else None, above + 1))


def _ring(receive: ReceiveConfig) -> tuple[Any, int]:
    """A ring as large as was asked for, or as the kernel has memory for; and the number of its blocks."""
    options, found = receive.options, receive.capabilities
    latency = LATENCY_LEAST if options.latency is None else options.latency
    if latency < LATENCY_LEAST:
        raise UnsupportedOption(
            f"latency={latency} on the {found.title}: packet_mmap can promise {LATENCY_LEAST} at the least, "
            "for the kernel counts milliseconds; backend='recvmmsg' holds nothing back"
        )
    retire = int(min(latency * 1000, RETIRE_MOST))
    wanted = (TIMESTAMP if options.timestamps else 0) | (OUTGOING if options.outgoing else 0)
    if receive.framing.per_packet:
        wanted |= _core.lib.LRX_WANT_SENDER
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
    return state, blocks
