"""An open source: opening, configuring and restoring it, its link state and its counters."""

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
from dataclasses import replace
from enum import Enum
from functools import partial

from linkrx.errors import MissingPrivilege, UnsupportedOption
from linkrx.kernel import remedies
from linkrx.kernel.libc import SocketOptions, bind_to_interface
from linkrx.kernel.rtnetlink import Link
from linkrx.kernel.sockets import device_of, interface_at
from linkrx.kernel.uapi import (
    ETH_P_ALL,
    IFF_UP,
    IFNAMSIZ,
    IFREQ_BYTES,
    SIOCGIFFLAGS,
    SK_MEMINFO_DROPS,
    SO_MEMINFO,
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

# Bytes of SO_RCVBUF. By default a socket holds 256 frames of 64 bytes or 93 of 1514, so the kernel drops packets of a burst. 32 MiB
# hold some 40,000 small frames. The kernel uses the memory only while frames are queued.
RECEIVE_BUFFER = 32 * 1024 * 1024

RECORDS_MOST = 1 << 48  # more than any file has

# The least bytes of SO_RCVBUF that a queued packet takes: include/linux/skbuff.h SKB_TRUESIZE, the sizes of struct sk_buff and
# struct skb_shared_info.
PACKET_LEAST = 512


class LinkState(Enum):
    """The state of the interface that a packet socket is bound to."""

    UP = "up"
    DOWN = "down"
    GONE = "gone"


class Source:
    """An open source, with the steps that `close` runs."""

    def __init__(
        self,
        fd: int,
        settings: Settings,
        held: object,
        undo: Undo,
        duplicate: Duplicate | None = None,
    ) -> None:
        """`held` is the object that the descriptor belongs to. For an interface it is a packet socket that is not bound yet."""
        options = settings.options
        self.fd = fd
        self.fanout: int | None = None  # the number of the fanout group, after joining it
        self._joins = None if options.fanout is None else Fanout.of(options.fanout)
        self._outgoing = shows_outgoing(settings.capabilities, options)
        self._protocol = options.protocol or ETH_P_ALL
        self._receive_buffer = options.receive_buffer
        self._enlarged = False
        self.capabilities = settings.capabilities
        self._held = held  # a reference, because collecting the object would close the descriptor
        self._undo = undo
        self._duplicate = duplicate
        self._queue_dropped: int | None = None
        self._filter_before: bytes | None = None  # the owner's filter, once it was read
        self._drops_at_open = self._drops()

    @property
    def file(self) -> CaptureReader | None:
        """The reader of a capture file. None for other sources."""
        return self._held if isinstance(self._held, CaptureReader) else None

    def start(self, joining: Callable[[], object]) -> None:
        """Bind the packet socket of an interface. From here on packets come, so everything else must be set up before.

        `joining` is called right before the socket joins a fanout group. Does nothing for a borrowed descriptor.
        """
        if isinstance(self._held, socket.socket) and self.capabilities.owned:
            _bind(self._held, self.capabilities, self._protocol)
            if self._joins is not None:  # the kernel refuses a socket that is not bound
                joining()
                self.fanout = self._joins.join(self._held, outgoing=self._outgoing)

    def enlarge_queue(self) -> None:
        """Set the receive buffer of a socket to `receive_buffer` bytes, for a backend that reads from it."""
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
        """Attach a program to a packet socket. An empty one detaches; None restores the owner's.

        Raises UnsupportedOption if the kernel refuses it. Then nothing has changed.
        """
        title = self.capabilities.title
        if self.capabilities.kind not in ("packet", "packet_cooked"):
            return
        try:
            if self._filter_before is None:
                if program is None:
                    return
                # A socket that linkrx opened has no filter.
                before = b"" if self.capabilities.owned else socket_filter.attached(self.fd)
                if not self.capabilities.owned:
                    self._undo.add(partial(restore_filter, self.fd, file_of(self.fd), before))
                self._filter_before = before
        except OSError as error:
            raise UnsupportedOption(
                f"filter= on the {title}: linkrx cannot read the filter that its owner may have attached, and so could not "
                f"restore it at close: {error.strerror}"
            ) from error
        try:
            socket_filter.attach(self.fd, self._filter_before if program is None else program)
        except OSError as error:
            advice = {
                errno.EPERM: "; its owner has locked its filter (SO_LOCK_FILTER)",
                errno.ENOMEM: "; `sudo sysctl net.core.optmem_max=1048576` allows longer filters",
            }.get(error.errno or 0, "")
            raise UnsupportedOption(
                f"the kernel does not attach the filter to the {title}: {error.strerror}{advice}"
            ) from error

    def leave_to_parent(self) -> None:
        """Close the descriptor in a forked child. A socket stays in its fanout group while any copy of its descriptor is open."""
        fd, self.fd = self.fd, -1
        if isinstance(self._held, CaptureReader):
            self._held.close()  # closes descriptors of the child only
        elif fd >= 0:
            os.close(fd)
        if self.capabilities.owned and isinstance(self._held, socket.socket):
            self._held.detach()

    def close(self) -> None:
        """Restore the options of a borrowed descriptor; close an owned one. Idempotent."""
        self.fd = -1  # for another thread, which could use a descriptor that belongs to another file by then
        self._undo.run()
        self._held = None

    def abandon(self) -> None:
        """Close the descriptor in a forked child, and change nothing that the parent uses."""
        self._undo.forget()
        self.leave_to_parent()
        self._held = None

    def kernel_drops(self) -> int | None:
        """Packets that the kernel has dropped since `open` because a queue was full. None if the kernel does not report them.

        For a TAP or TUN queue this is `tx_dropped` of the device, which all its queues share.
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
        """`tx_dropped` of the device, read in its own namespace. After the device is deleted, the last value."""
        link = self._queue_link()
        if link:
            self._queue_dropped = link.tx_dropped
        return self._queue_dropped

    def _queue_link(self) -> Link | None:
        """The device of a TAP or TUN queue, read in its own namespace. None after it is deleted, and for other sources."""
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
        # If the namespace is not certain, an equal index is no proof of the same device. The name must be equal, too.
        return link if link and (certain is not None or link.name == found.interface) else None

    def queue_limit(self) -> int | None:
        """The most packets that the queue of the source can hold. None if the kernel does not report it."""
        if self.capabilities.kind == "capture_file" and not stat.S_ISFIFO(os.fstat(self.fd).st_mode):
            return RECORDS_MOST  # all packets of a regular file are there
        if self.capabilities.kind in ("packet", "packet_cooked", "udp"):
            try:
                return SocketOptions(self.fd).get_int(socket.SOL_SOCKET, socket.SO_RCVBUF) // PACKET_LEAST + 1
            except OSError:  # a seccomp filter
                return None
        link = self._queue_link()
        return link.queue_length if link else None

    def interface_name(self, index: int) -> str | None:
        """The present name of the interface with this index, in the namespace of a packet socket. For other sources the source's own.

        After its interface was deleted, the name that it had at open. None if there is none.
        """
        found = self.capabilities
        if found.kind in ("packet", "packet_cooked") and index not in (0, found.ifindex):
            return interface_at(self.fd, index) or None
        return self.present.interface

    @property
    def present(self) -> Capabilities:
        """The capabilities with the present name of the interface, for messages. After it was deleted, with the name at open."""
        found = self.capabilities
        name = ""
        if self.fd >= 0 and found.kind in ("packet", "packet_cooked") and found.ifindex:
            name = interface_at(self.fd, found.ifindex)
        elif self.fd >= 0 and found.kind in ("tap", "tun"):
            name = device_of(self.fd)
        return replace(found, interface=name) if name and name != found.interface else found

    @property
    def watched(self) -> bool:
        """Whether the source reports a link that goes down: a packet socket that is bound to an interface does."""
        return self.capabilities.kind in ("packet", "packet_cooked") and self.capabilities.ifindex is not None

    def link_state(self) -> LinkState:
        """The state of the interface of a packet socket. UP for sources that do not report it."""
        if self.capabilities.silent_end:
            return self._queue_state()
        if not self.watched:
            return LinkState.UP
        # By index, because the name may have changed. In the socket's namespace: the index is gone after the interface is deleted
        # or moved to another one.
        name = interface_at(self.fd, self.capabilities.ifindex or 0)
        try:
            answer = fcntl.ioctl(self.fd, SIOCGIFFLAGS, os.fsencode(name).ljust(IFREQ_BYTES, b"\0"))
        except OSError:
            return LinkState.GONE
        return LinkState.UP if struct.unpack_from("H", answer, IFNAMSIZ)[0] & IFF_UP else LinkState.DOWN

    def _queue_state(self) -> LinkState:
        """The state of a macvtap queue: DOWN until its device is deleted, because linkrx polls the state of links that are down."""
        return LinkState.DOWN if device_of(self.fd) else LinkState.GONE

    def is_closed_by_owner(self) -> bool:
        """Whether the owner of a borrowed descriptor has closed it. Its number may belong to another file now."""
        return self._duplicate is not None and self._duplicate.is_alone()

    def hung_up(self) -> bool:
        """Whether no packet can come: the peer of a seqpacket socket or pipe has closed, and nothing is queued."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        ready = sum(events for _, events in poll.poll(0))
        if not ready & (select.POLLRDHUP | select.POLLHUP):
            return False
        queued: int = struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0]
        return queued == 0


def open_source(source: AnySource, settings: Settings) -> Source:
    """Open and configure a source. `start` begins to receive. On any failure, everything is undone."""
    capabilities = settings.capabilities
    if isinstance(source, (CaptureFile, os.PathLike)):
        reader, undo = CaptureReader(capture_of(source)), Undo()
        undo.add(reader.close)
        return Source(reader.fd, settings, reader, undo)
    if capabilities.hardware_gso and not capabilities.vnet_header_size:
        logger.warning(
            "the %s delivers super-packets without a virtio-net header, so linkrx cannot recognise them: an earlier owner of the "
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
        # A duplicate, because the owner may close the descriptor, and another file may get its number.
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
        # With protocol 0 nothing is received before bind(2). With ETH_P_ALL, frames of all interfaces would be queued until then.
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
    """Bind to an interface, or to every interface, including later ones.

    By the index that probing found, because the name may belong to another interface now.
    """
    try:
        bind_to_interface(packet.fileno(), protocol, found.ifindex or 0)
    except OSError as error:
        name = "every interface" if found.interface is None else repr(found.interface)
        raise OSError(
            error.errno, f"binding a packet socket to {name}: {os.strerror(error.errno or 0)}"
        ) from error
    # Binding to an interface that is down leaves ENETDOWN in SO_ERROR. Clear it, because no link went down.
    packet.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
