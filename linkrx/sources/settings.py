"""What linkrx changes on a socket, and how that is set back; and what tells a borrowed descriptor from others."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from linkrx.errors import Busy, UnsupportedOption
from linkrx.kernel.errnos import FORBIDDEN
from linkrx.kernel.libc import SocketOptions
from linkrx.kernel.uapi import (
    ARPHRD_LOOPBACK,
    PACKET_ADD_MEMBERSHIP,
    PACKET_AUXDATA,
    PACKET_DROP_MEMBERSHIP,
    PACKET_IGNORE_OUTGOING,
    PACKET_MR_PROMISC,
    PACKET_VNET_HDR,
    PACKET_VNET_HDR_SZ,
    SO_COOKIE,
    SO_RCVBUFFORCE,
    SO_TIMESTAMP,
    SO_TIMESTAMP_NEW,
    SO_TIMESTAMPING_NEW,
    SO_TIMESTAMPNS,
    SO_TIMESTAMPNS_NEW,
    SOL_PACKET,
    VNET_HEADER_BYTES,
)
from linkrx.sources import socket_filter
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.options import Options
from linkrx.sources.resolve import Settings

logger = logging.getLogger("linkrx")


class Undo:
    """What `close` has to undo, the last first. Steps can be done again: where an exception cuts one short, it is."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        """Note what undoes something."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo everything. Again does nothing."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def forget(self) -> None:
        """Let everything be."""
        self._steps.clear()


class Duplicate:
    """A descriptor of linkrx's own for a file that is somebody else's, who knows it by the number `borrowed`."""

    def __init__(self, borrowed: int) -> None:
        self.borrowed = borrowed
        self.fd = os.dup(borrowed)

    def is_alone(self) -> bool:
        """Whether the owner has closed the descriptor, or its number is another file's by now."""
        try:
            return file_of(self.borrowed) != file_of(self.fd)
        except OSError:
            return True

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


def shows_outgoing(capabilities: Capabilities, options: Options) -> bool:
    """Whether frames of this host are to be seen as they leave. What is sent on `lo` comes in there: once is enough."""
    return options.outgoing and capabilities.hardware_type != ARPHRD_LOOPBACK


def configure(fd: int, settings: Settings, undo: Undo) -> None:
    """Set socket options, and note in `undo` how to set them back."""
    options, capabilities = settings.options, settings.capabilities
    file = file_of(fd)
    sock = SocketOptions(fd)

    def change(level: int, name: int, value: int) -> None:
        before = sock.get_int(level, name)
        if before != value:
            undo.add(partial(_restore, fd, file, level, name, before))
            sock.set(level, name, value)

    if capabilities.kind not in ("packet", "packet_cooked"):
        return
    change(SOL_PACKET, PACKET_AUXDATA, 1)
    change(SOL_PACKET, PACKET_IGNORE_OUTGOING, int(not shows_outgoing(capabilities, options)))
    if options.timestamps:
        _set_timestamps(sock, undo)
    if options.promiscuous:
        if capabilities.ifindex is None:
            raise UnsupportedOption(
                f"promiscuous=True on {capabilities.a_title}, which is bound to no interface: the kernel sets single "
                "interfaces to it. Bind it first, or open one by name"
            )
        # A membership of the socket, not a flag of the interface: the kernel undoes it however we end.
        request = struct.pack("iHH8x", capabilities.ifindex, PACKET_MR_PROMISC, 0)
        sock.set(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
        undo.add(partial(_restore, fd, file, SOL_PACKET, PACKET_DROP_MEMBERSHIP, request))
    size = settings.vnet_header_to_set
    if size:
        # The older option knows one size only. Either takes effect when a packet is read: also for those that wait.
        usual = size == VNET_HEADER_BYTES
        try:
            change(SOL_PACKET, PACKET_VNET_HDR if usual else PACKET_VNET_HDR_SZ, int(usual) or size)
        except OSError as error:
            raise UnsupportedOption(
                f"{'segment=True' if options.segment else f'vnet_header={options.vnet_header}'} on the "
                f"{capabilities.title}: it takes no virtio-net header of {size} bytes "
                f"({'PACKET_VNET_HDR' if usual else 'PACKET_VNET_HDR_SZ, Linux 6.6'}): {error.strerror}"
                + ("; it has a ring already" if error.errno == errno.EBUSY else "")
            ) from error


def _set_timestamps(sock: SocketOptions, undo: Undo) -> None:
    """The forms of the option exclude each other, and each takes the others away when it is set, also to 0."""

    def value(name: int) -> int:
        try:
            return sock.get_int(socket.SOL_SOCKET, name)
        except OSError:
            return 0  # Linux before 5.1 has the older forms only

    forms = (SO_TIMESTAMPNS, SO_TIMESTAMP, SO_TIMESTAMPNS_NEW, SO_TIMESTAMP_NEW)
    before = next((name for name in forms if value(name)), None)
    if before == SO_TIMESTAMPNS:
        return
    stamping = value(SO_TIMESTAMPING_NEW)  # whose messages have the older form behind another's setting

    def restore() -> None:
        with suppress(OSError):
            sock.set(socket.SOL_SOCKET, before or SO_TIMESTAMPNS, 1 if before else 0)
            if stamping:
                sock.set(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW, stamping)

    undo.add(restore)
    sock.set(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


# Sockets that a dispatcher of this process receives from, by process and cookie. A forked child has its own.
_claimed: dict[tuple[int, bytes], object] = {}


def claim(fd: int, capabilities: Capabilities, undo: Undo) -> None:
    """Two on one socket would each restore what the other has set, and share its packets. By cookie: numbers are used again."""
    try:
        cookie = SocketOptions(fd).get(socket.SOL_SOCKET, SO_COOKIE, 8)
    except OSError:  # Linux before 4.6, or a seccomp filter
        cookie = struct.pack("=QQ", *file_of(fd))
    key, claim = (os.getpid(), cookie), object()
    if _claimed.setdefault(key, claim) is not claim:
        raise Busy(
            f"another dispatcher of this process receives from the {capabilities.title}: close that one first, or open a "
            "socket for each"
        )
    undo.add(lambda: _claimed.pop(key, None))


def file_of(fd: int) -> tuple[int, int]:
    """What tells one open socket from another that got its number: stat's device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _restore(fd: int, file: tuple[int, int], level: int, name: int, value: int | bytes) -> None:
    """Set a socket option back, unless its owner has closed the socket: then there is nothing to restore."""
    with suppress(OSError):
        if file_of(fd) == file:
            SocketOptions(fd).set(level, name, value)


def restore_filter(fd: int, file: tuple[int, int], program: bytes) -> None:
    """Give a borrowed socket back the filter that it had."""
    with suppress(OSError):
        if file_of(fd) == file:
            socket_filter.attach(fd, program)


def set_receive_buffer(sock: SocketOptions, size: int, *, asked: bool) -> None:
    try:
        sock.set(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.set(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        try:
            # The kernel doubles it for its own needs.
            got = sock.get_int(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        except OSError as error:
            if error.errno not in FORBIDDEN:
                raise
            return  # a seccomp filter keeps it from being known
        if got < size:
            logger.log(
                logging.WARNING if asked else logging.INFO,
                "a receive buffer of %d bytes needs CAP_NET_ADMIN; the kernel gave %d. "
                "`sudo sysctl net.core.rmem_max=%d` allows it for everyone",
                size,
                got,
                size,
            )


def restore_receive_buffer(fd: int, file: tuple[int, int], size: int) -> None:
    with suppress(OSError):
        if file_of(fd) == file:
            set_receive_buffer(SocketOptions(fd), size, asked=False)
