"""One open source: how it was opened or borrowed, what was changed on it, and what it can be asked."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Callable
from enum import Enum
from functools import partial

from linkrx.errors import MissingPrivilege, UnsupportedOption
from linkrx.kernel import remedies
from linkrx.kernel.libc import SocketOptions, bind_to_interface
from linkrx.kernel.rtnetlink import Link
from linkrx.kernel.sockets import interface_at
from linkrx.kernel.uapi import (
    ETH_P_ALL,
    IFF_UP,
    IFNAMSIZ,
    IFREQ_BYTES,
    SIOCGIFFLAGS,
    SK_MEMINFO_DROPS,
    SO_MEMINFO,
    TUNGETIFF,
)
from linkrx.sources import socket_filter
from linkrx.sources.capabilities import AnySource, Capabilities, descriptor, route_socket_for
from linkrx.sources.capture_file import CaptureFile, CaptureReader, capture_of
from linkrx.sources.fanout import Fanout
from linkrx.sources.resolve import Settings
from linkrx.sources.settings import (
    Duplicate,
    Undo,
    claim,
    configure,
    file_of,
    restore_filter,
    restore_receive_buffer,
    set_receive_buffer,
    shows_outgoing,
)

logger = logging.getLogger("linkrx")

# Without more, a socket holds 256 frames of 64 bytes or 93 of 1514: bursts are lost without a word. 32 MiB hold
# some 40,000 small frames. The kernel takes the memory only while frames are queued.
RECEIVE_BUFFER = 32 * 1024 * 1024

# More than any file has.
RECORDS_MOST = 1 << 48

# A packet that waits in a socket takes more of SO_RCVBUF than this, be it ever so short: include/linux/skbuff.h
# SKB_TRUESIZE, the sizes of struct sk_buff and struct skb_shared_info.
PACKET_LEAST = 512


class LinkState(Enum):
    """Of the interface that a packet socket is bound to."""

    UP = "up"
    DOWN = "down"
    GONE = "gone"


class Source:
    """Where packets come from, with everything that `close` has to undo."""

    def __init__(
        self,
        fd: int,
        settings: Settings,
        held: object,
        undo: Undo,
        duplicate: Duplicate | None = None,
    ) -> None:
        """Of a packet socket for an interface `held` is the socket, not bound yet; it is to join the fanout group of the options."""
        options = settings.options
        self.fd = fd
        self.fanout: int | None = None  # the group, once it is joined
        self._joins = None if options.fanout is None else Fanout.of(options.fanout)
        self._outgoing = shows_outgoing(settings.capabilities, options)
        self._protocol = options.protocol or ETH_P_ALL
        self._receive_buffer = options.receive_buffer
        self._enlarged = False
        self.capabilities = settings.capabilities
        self._held = held  # an object with fileno() must not be collected, and so closed, while it is in use
        self._undo = undo
        self._duplicate = duplicate
        self._queue_dropped: int | None = None
        self._filter_before: bytes | None = None  # once it was asked for
        self._drops_at_open = self._drops()

    @property
    def file(self) -> CaptureReader | None:
        """What a capture file is read through."""
        return self._held if isinstance(self._held, CaptureReader) else None

    def start(self, joining: Callable[[], object]) -> None:
        """Bind the packet socket of an interface, with everything set up that packets could need: from here on they
        come. Nothing to do for a borrowed descriptor, from which they always did. `joining` is called right before it joins a
        fanout group.
        """
        if isinstance(self._held, socket.socket) and self.capabilities.owned:
            _bind(self._held, self.capabilities, self._protocol)
            if self._joins is not None:  # the kernel wants a member bound
                joining()
                self.fanout = self._joins.join(self._held, outgoing=self._outgoing)

    def enlarge_queue(self) -> None:
        """Of a socket, to `receive_buffer`; for a backend whose packets wait there."""
        wanted = self._receive_buffer or (RECEIVE_BUFFER if self.capabilities.owned else None)
        if wanted is None or not self.capabilities.socket or self._enlarged:
            return
        sock = SocketOptions(self.fd)
        if not self.capabilities.owned:
            before = sock.get_int(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
            self._undo.add(partial(restore_receive_buffer, self.fd, file_of(self.fd), before))
        set_receive_buffer(sock, wanted, asked=self._receive_buffer is not None)
        self._enlarged = True

    def set_filter(self, program: bytes | None) -> None:
        """Let the kernel run a program on what comes from now on; empty: none, None: the one that was there before linkrx.

        Raises UnsupportedOption where the kernel refuses it, and then all is as it was.
        """
        title = self.capabilities.title
        if self.capabilities.kind not in ("packet", "packet_cooked"):
            return
        try:
            if self._filter_before is None:
                if program is None:
                    return
                # A socket of linkrx's own had none.
                before = b"" if self.capabilities.owned else socket_filter.attached(self.fd)
                if not self.capabilities.owned:
                    self._undo.add(partial(restore_filter, self.fd, file_of(self.fd), before))
                self._filter_before = before
        except OSError as error:
            raise UnsupportedOption(
                f"filter= on the {title}: the filter that its owner may have put on it cannot be read, and so not be put back at "
                f"close: {error.strerror}"
            ) from error
        try:
            socket_filter.attach(self.fd, self._filter_before if program is None else program)
        except OSError as error:
            advice = {
                errno.EPERM: "; its owner has locked the one that it has (SO_LOCK_FILTER)",
                errno.ENOMEM: "; `sudo sysctl net.core.optmem_max=1048576` allows longer ones",
            }.get(error.errno or 0, "")
            raise UnsupportedOption(
                f"the kernel does not attach the filter to the {title}: {error.strerror}{advice}"
            ) from error

    def leave_to_parent(self) -> None:
        """In a forked child, at once: a member of a fanout group stays one for as long as any copy of its descriptor is open."""
        fd, self.fd = self.fd, -1
        if isinstance(self._held, CaptureReader):
            self._held.close()  # what it closes is the child's own
        elif fd >= 0:
            os.close(fd)
        if self.capabilities.owned and isinstance(self._held, socket.socket):
            self._held.detach()

    def close(self) -> None:
        """Restore what was changed on a borrowed descriptor, close an owned one. Idempotent."""
        self._undo.run()
        self._held = None

    def abandon(self) -> None:
        """In a forked child: let go without changing what the parent still uses."""
        self._undo.forget()
        self.leave_to_parent()
        self._held = None

    def kernel_drops(self) -> int | None:
        """Packets dropped for want of room since `open`; None where the kernel does not say.

        For a TAP or TUN queue the device's `tx_dropped`, which all queues of a multi-queue device share.
        """
        drops = self._drops()
        if drops is None or self._drops_at_open is None:
            return None
        # A socket's counter has 32 bits and wraps; a device's has 64.
        return (
            (drops - self._drops_at_open) % 2**32 if self.capabilities.socket else drops - self._drops_at_open
        )

    def _drops(self) -> int | None:
        return self._socket_drops() if self.capabilities.socket else self._queue_drops()

    def _socket_drops(self) -> int | None:
        try:
            words = SocketOptions(self.fd).get(socket.SOL_SOCKET, SO_MEMINFO, 4 * 16)
        except OSError:
            return None
        return (
            struct.unpack_from("=I", words, 4 * SK_MEMINFO_DROPS)[0]
            if len(words) > 4 * SK_MEMINFO_DROPS
            else None
        )

    def _queue_drops(self) -> int | None:
        """What the device counted as tx_dropped, asked in its own namespace; the last answer once it is gone."""
        link = self._queue_link()
        if link:
            self._queue_dropped = link.tx_dropped
        return self._queue_dropped

    def _queue_link(self) -> Link | None:
        """The device of a TAP or TUN queue, asked in its own namespace; None once it is gone, and for other sources."""
        found = self.capabilities
        if found.kind not in ("tap", "tun") or found.ifindex is None or found.silent_end:
            return None
        asked = route_socket_for(self.fd)
        if asked is None:
            return None
        route, certain = asked
        try:
            link = route.link(index=found.ifindex)
        finally:
            route.close()
        # Where the kernel does not say which namespace it is, only the same name proves the same device.
        return link if link and (certain is not None or link.name == found.interface) else None

    def queue_limit(self) -> int | None:
        """How many packets can wait in the source's queue at the most; None where the kernel does not tell."""
        if self.capabilities.kind == "capture_file" and not stat.S_ISFIFO(os.fstat(self.fd).st_mode):
            return RECORDS_MOST  # all that a file has was there before anybody asks
        if self.capabilities.kind in ("packet", "packet_cooked", "udp"):
            try:
                return SocketOptions(self.fd).get_int(socket.SOL_SOCKET, socket.SO_RCVBUF) // PACKET_LEAST + 1
            except OSError:  # a seccomp filter
                return None
        link = self._queue_link()
        return link.queue_length if link else None

    def interface_name(self, index: int) -> str | None:
        """The name of an interface in the namespace of a packet socket, where one may have left; of another source its own."""
        found = self.capabilities
        if index in (0, found.ifindex) or found.kind not in ("packet", "packet_cooked"):
            return found.interface
        return interface_at(self.fd, index) or None

    @property
    def watched(self) -> bool:
        """Whether the source tells when its link goes down: a packet socket bound to an interface."""
        return self.capabilities.kind in ("packet", "packet_cooked") and self.capabilities.ifindex is not None

    def link_state(self) -> LinkState:
        """How the interface of a packet socket is doing; UP for sources that do not say."""
        if self.capabilities.silent_end:
            return self._queue_state()
        if not self.watched:
            return LinkState.UP
        # By index: the name may be another by now. In the socket's own namespace, which an interface leaves when it is deleted
        # or moved.
        name = interface_at(self.fd, self.capabilities.ifindex or 0)
        try:
            answer = fcntl.ioctl(self.fd, SIOCGIFFLAGS, os.fsencode(name).ljust(IFREQ_BYTES, b"\0"))
        except OSError:
            return LinkState.GONE
        return LinkState.UP if struct.unpack_from("H", answer, IFNAMSIZ)[0] & IFF_UP else LinkState.DOWN

    def _queue_state(self) -> LinkState:
        """Of a macvtap queue: DOWN, which is looked at again and again, until its device is gone."""
        try:
            fcntl.ioctl(self.fd, TUNGETIFF, bytes(IFREQ_BYTES))
        except OSError:
            return LinkState.GONE
        return LinkState.DOWN

    def is_closed_by_owner(self) -> bool:
        """Whether the owner of a borrowed descriptor has closed it: its number may be another file's by now."""
        return self._duplicate is not None and self._duplicate.is_alone()

    def hung_up(self) -> bool:
        """Whether nothing more can come: the peer of a seqpacket socket or pipe is gone and nothing is queued."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        told = sum(events for _, events in poll.poll(0))
        if not told & (select.POLLRDHUP | select.POLLHUP):
            return False
        queued: int = struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0]
        return queued == 0


def open_source(source: AnySource, settings: Settings) -> Source:
    """Open and configure a source, for `start`. On any failure what was done is undone."""
    capabilities = settings.capabilities
    if isinstance(source, (CaptureFile, os.PathLike)):
        reader, undo = CaptureReader(capture_of(source)), Undo()
        undo.add(reader.close)
        return Source(reader.fd, settings, reader, undo)
    if capabilities.hardware_gso and not capabilities.vnet_header_size:
        logger.warning(
            "the %s hands over super-packets, and no virtio-net header tells which they are: an earlier owner of the "
            "device left offloads on. Open it with linkrx.TunTap, which resets them, or call TUNSETOFFLOAD with 0",
            capabilities.title,
        )
    undo = Undo()
    try:
        if isinstance(source, str):
            opened = _packet_socket(source)
            undo.add(opened.close)
            configure(opened.fileno(), settings, undo)
            return Source(opened.fileno(), settings, opened, undo)
        # A duplicate: were the owner to close the descriptor, the number could be another file's a moment later.
        duplicate = Duplicate(descriptor(source))
        undo.add(duplicate.close)
        fd = duplicate.fd
        if capabilities.socket:
            claim(fd, capabilities, undo)
            configure(fd, settings, undo)
        return Source(fd, settings, source, undo, duplicate)
    except BaseException:
        undo.run()
        raise


def _packet_socket(interface: str) -> socket.socket:
    try:
        # Protocol 0: nothing is received before bind. With ETH_P_ALL here, frames of other interfaces would
        # queue up until then, and stay.
        return socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0
        )
    except PermissionError as error:
        raise MissingPrivilege(
            f"opening a packet socket on {interface!r}",
            "CAP_NET_RAW",
            remedies.capability("CAP_NET_RAW"),
            error.errno,
        ) from error


def _bind(packet: socket.socket, found: Capabilities, protocol: int) -> None:
    """To an interface, or to every one, also those that come later.

    By the index that probing found: the name may be another interface's by now.
    """
    try:
        bind_to_interface(packet.fileno(), protocol, found.ifindex or 0)
    except OSError as error:
        name = "every interface" if found.interface is None else repr(found.interface)
        raise OSError(
            error.errno, f"binding a packet socket to {name}: {os.strerror(error.errno or 0)}"
        ) from error
    # Binding to an interface that is down leaves an ENETDOWN behind. That is no link going down: take it away.
    packet.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
