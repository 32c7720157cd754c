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
from linkrx.errors import BackendUnavailable
from linkrx.kernel.rtnetlink import Link, RouteSocket
from linkrx.kernel.uapi import ARPHRD_LOOPBACK
from linkrx.packets.headers import OUTGOING, TIMESTAMP
from linkrx.sources.capabilities import LARGEST_MESSAGE

logger = logging.getLogger("linkrx")

# The kernel closes a block when it is full, or when the retire time is over and it has a packet. So at the default latency of
# 1 ms a block lasts 1 ms, however few packets come: many small blocks last longer than a few large ones. 64 MiB are 512 blocks of
# the least size, which last half a second. A million packets of 64 bytes per second take 152 bytes each in the ring and fill
# 1.2 blocks per millisecond, which lasts 0.44 s. The memory is taken at once, and kept.
RING_BYTES = 64 * 1024 * 1024

# A frame is in one block, and a longer frame is cut. A block of the least size holds a super-packet of 64 KiB. Blocks are larger
# if the interface is configured for longer packets (BIG TCP), or if the ring would have too many blocks. A block of the largest
# size holds any frame that Linux makes: capabilities.LARGEST_MESSAGE. The kernel rounds sizes up to a power of two.
BLOCK_LEAST = 128 * 1024
BLOCK_MOST = 1024 * 1024
# Devices that pass on packets of other devices with limits of their own, and devices that are one end of a pair.
MASTERS = frozenset({"bridge", "bond", "team", "openvswitch"})
PAIRS = frozenset({"veth", "netkit", "vxcan"})
STACKED_MOST = 8  # devices above one another: net/core/dev.c, MAX_NEST_DEV
HEADROOM = 4096  # more than the kernel puts in front of a frame
BLOCKS_MOST = 4096  # a ring with more blocks is not made smaller
BLOCKS_LEAST = 2  # one is read while the other is filled

# The blocks of a batch that is read in place, and the largest share of the ring for them. At most two batches are in place, and
# the kernel fills the other blocks meanwhile. The frames of smaller rings are copied.
BLOCKS_IN_PLACE = 4
SHARE_IN_PLACE = 8

LATENCY_LEAST = 0.001  # tp_retire_blk_tov is in milliseconds; with 0 the kernel chooses
RETIRE_MOST = 2**31 - 1

# The kernel checks the open block once per retire time, and closes it if it has been open since the last check. Before Linux 6.18
# this counts timer ticks, rounded up and one late.
RETIRE_LOOKS = 2
_CLOCK_MONOTONIC_COARSE = 6  # linux/time.h; its resolution is a tick

# Bytes of the shortest frame in a ring: struct tpacket3_hdr, struct sockaddr_ll and an Ethernet header, aligned.
FRAME_LEAST = 96


class PacketMmap(CoreBackend):
    """The recommended choice for an interface by name."""

    name = "packet_mmap"
    rank = 40
    honours = frozenset({"buffer_sizes", "snaplen", "outgoing", "timestamps", "fanout"})
    latency_least = LATENCY_LEAST
    tells_metadata = True
    batch_size = 1024  # more than the 862 frames of 64 bytes in a block of the least size
    has_queue = True
    coalesces = True

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Other sources than packet sockets: the kernel has no ring for them."""
        if capabilities.kind in ("packet", "packet_cooked"):
            return None
        return f"packet_mmap puts a ring on AF_PACKET sockets only, and the source is {capabilities.a_title}"

    @classmethod
    def discouraged(cls, capabilities: Capabilities) -> str | None:
        """Borrowed sockets, whose queue a ring would replace."""
        if capabilities.owned:
            return None
        return "a ring takes the place of the socket's queue for all who use it, and what is in the queue is lost"

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._use("lrx_packet_mmap_fill", descriptors)
        self._joins = receive.options.fanout is not None
        tick = time.clock_getres(_CLOCK_MONOTONIC_COARSE)
        self.readable_within = RETIRE_LOOKS * ((receive.options.latency or LATENCY_LEAST) + 2 * tick)
        self._state = _core.owned(_core.lib.lrx_ring_new(), "lrx_ring_free")
        try:
            self._blocks = _open_ring(self._state, receive)
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
        """Forget the drops up to here: other members of the group receive these packets. Later drops count."""
        _core.lib.lrx_ring_forget_drops(self._state)

    def start(self) -> None:
        """Give the kernel room in the ring, so that this member of a fanout group receives its share."""
        if self._joins:
            _core.lib.lrx_ring_start(self._state)

    @property
    def queue_limit(self) -> int:  # type: ignore[override]
        """The number of shortest packets that the ring holds."""
        size: int = _core.lib.lrx_ring_size(self._state)
        return size // FRAME_LEAST

    @property
    def held(self) -> int:
        """Packets of a block that is partly read. poll(2) does not report them once a later block was released."""
        waiting: int = _core.lib.lrx_ring_held(self._state) if self._state is not None else 0
        return waiting

    def drops(self) -> int:
        """tp_drops: packets for which the ring had no room. SO_MEMINFO does not include them."""
        state = self._state  # another thread may close this, which adds the drops to the Tally first
        dropped: int = _core.lib.lrx_ring_drops(state) if state is not None else 0
        return dropped

    def freezes(self) -> int | None:
        """tp_freeze_q_cnt; None if a seccomp filter forbids getsockopt(2)."""
        state = self._state
        frozen: int = _core.lib.lrx_ring_freezes(state) if state is not None else -1
        return None if frozen < 0 else frozen

    def close(self) -> None:
        """Remove the ring from the socket. Its state stays while another thread asks for its counters."""
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
        """Free the memory of the child. The ring belongs to the parent, and is not mapped here."""
        self._state = None


def shape(size: int, largest: int = 0) -> tuple[int, int]:
    """Block size and number of blocks for a ring of `size` bytes and frames of `largest` bytes."""
    block = BLOCK_LEAST
    while block < BLOCK_MOST and (block < largest + HEADROOM or size > block * BLOCKS_MOST):
        block *= 2
    return block, max(BLOCKS_LEAST, size // block)


def _largest(receive: ReceiveConfig) -> int:
    """The size of the longest frame that the limits of the interface and of its peer allow, now or after `ip link set`.

    0 if the limits are not known, as of an interface in another namespace.
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
    """The limit of a device, and of the devices that it receives through: the peer of a veth, or the device below.

    A device that cannot be asked may have any limit.
    """
    if link is None or link.hardware_type == ARPHRD_LOOPBACK or link.kind in MASTERS or above == STACKED_MOST:
        return LARGEST_MESSAGE
    own = max(link.super_packet, link.mtu or 0)
    if link.peer in (None, 0):
        return own
    peer = route.link(index=link.peer or 0, namespace=link.peer_namespace)
    if link.kind in PAIRS or (link.peer_namespace is not None and peer and peer.peer in (None, 0)):
        return max(own, peer.super_packet if peer else LARGEST_MESSAGE)
    # The index is of another namespace.
    return max(own, _largest_through(route, peer if link.peer_namespace is None else None, above + 1))


def _open_ring(state: Any, receive: ReceiveConfig) -> int:
    """Make a ring of the wanted size, or as large as the kernel has memory for. Returns the number of its blocks."""
    options, found = receive.options, receive.capabilities
    retire = int(min((options.latency or LATENCY_LEAST) * 1000, RETIRE_MOST))
    wanted = (TIMESTAMP if options.timestamps else 0) | (OUTGOING if options.outgoing else 0)
    if receive.framing.per_packet:
        wanted |= _core.lib.LRX_WANT_SENDER
    block, asked = shape(options.receive_buffer or RING_BYTES, _largest(receive))
    blocks = asked
    while True:
        refused = _core.lib.lrx_ring_open(
            state,
            receive.fd,
            block,
            blocks,
            retire,
            found.vnet_header_size,
            receive.layout.capacity,
            wanted,
        )
        if not refused:
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
    return blocks
