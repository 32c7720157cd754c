"""The socket options that linkrx sets and restores, and the identity of borrowed descriptors."""

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
    """The steps that undo what was done, last first. Each can run twice: after an exception within a step, `run` repeats it."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        """Add a step."""
        self._steps.append(step)

    def run(self) -> None:
        """Run all steps. A second call does nothing."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def forget(self) -> None:
        """Drop all steps without running them."""
        self._steps.clear()


class Duplicate:
    """A duplicate of the borrowed descriptor `borrowed`."""

    def __init__(self, borrowed: int) -> None:
        self.borrowed = borrowed
        self.fd = os.dup(borrowed)

    def is_alone(self) -> bool:
        """Whether the owner has closed the descriptor. Its number may belong to another file now."""
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
    """Whether to receive outgoing frames. On `lo` each frame comes in as well, so the outgoing one is left out."""
    return options.outgoing and capabilities.hardware_type != ARPHRD_LOOPBACK


def configure(fd: int, settings: Settings, undo: Undo) -> None:
    """Set socket options on a packet socket, and add the steps that restore them to `undo`. Raises UnsupportedOption, OSError."""
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
                f"promiscuous=True on {capabilities.a_title}, which is bound to no interface: promiscuous mode is for a single "
                "interface. Bind the socket first, or open an interface by name"
            )
        # A membership of the socket, not IFF_PROMISC: the kernel drops it when the process ends.
        request = struct.pack("iHH8x", capabilities.ifindex, PACKET_MR_PROMISC, 0)
        sock.set(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
        undo.add(partial(_restore, fd, file, SOL_PACKET, PACKET_DROP_MEMBERSHIP, request))
    size = settings.vnet_header_to_set
    if size:
        # PACKET_VNET_HDR sets the size of 10 bytes only. Both options also affect packets that are queued.
        usual = size == VNET_HEADER_BYTES
        try:
            change(SOL_PACKET, PACKET_VNET_HDR if usual else PACKET_VNET_HDR_SZ, int(usual) or size)
        except OSError as error:
            raise UnsupportedOption(
                f"{'segment=True' if options.segment else f'vnet_header={options.vnet_header}'} on the "
                f"{capabilities.title}: the kernel refuses a virtio-net header of {size} bytes "
                f"({'PACKET_VNET_HDR' if usual else 'PACKET_VNET_HDR_SZ, since Linux 6.6'}): {error.strerror}"
                + ("; the socket has a ring already" if error.errno == errno.EBUSY else "")
            ) from error


def _set_timestamps(sock: SocketOptions, undo: Undo) -> None:
    """Switch SO_TIMESTAMPNS on. The forms of the option exclude each other: setting one, also to 0, clears the others."""

    def value(name: int) -> int:
        try:
            return sock.get_int(socket.SOL_SOCKET, name)
        except OSError:
            return 0  # before Linux 5.1, which has no *_NEW options

    forms = (SO_TIMESTAMPNS, SO_TIMESTAMP, SO_TIMESTAMPNS_NEW, SO_TIMESTAMP_NEW)
    before = next((name for name in forms if value(name)), None)
    if before == SO_TIMESTAMPNS:
        return
    stamping = value(SO_TIMESTAMPING_NEW)  # setting another form changes the format of its messages

    def restore() -> None:
        with suppress(OSError):
            sock.set(socket.SOL_SOCKET, before or SO_TIMESTAMPNS, 1 if before else 0)
            if stamping:
                sock.set(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW, stamping)

    undo.add(restore)
    sock.set(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


# The sockets that dispatchers of this process receive from, by process id and cookie. A forked child has its own.
_claimed: dict[tuple[int, bytes], object] = {}


def claim(fd: int, capabilities: Capabilities, undo: Undo) -> None:
    """Claim a socket for one dispatcher. Raises Busy if another dispatcher of this process has it.

    Two would share its packets, and restore each other's options. The kernel's cookie identifies the socket, because descriptor
    and inode numbers are reused.
    """
    try:
        cookie = SocketOptions(fd).get(socket.SOL_SOCKET, SO_COOKIE, 8)
    except OSError:  # before Linux 4.6, or a seccomp filter
        cookie = struct.pack("=QQ", *file_of(fd))
    key, claim = (os.getpid(), cookie), object()
    if _claimed.setdefault(key, claim) is not claim:
        raise Busy(
            f"another dispatcher of this process receives from the {capabilities.title}: close that one first, or open a "
            "socket for each"
        )
    undo.add(lambda: _claimed.pop(key, None))


def file_of(fd: int) -> tuple[int, int]:
    """The device and inode of an open file. They show whether a descriptor number was reused for another file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _restore(fd: int, file: tuple[int, int], level: int, name: int, value: int | bytes) -> None:
    """Restore a socket option, unless the owner has closed the socket."""
    with suppress(OSError):
        if file_of(fd) == file:
            SocketOptions(fd).set(level, name, value)


def restore_filter(fd: int, file: tuple[int, int], program: bytes) -> None:
    """Restore the filter of a borrowed socket, unless the owner has closed it."""
    with suppress(OSError):
        if file_of(fd) == file:
            socket_filter.attach(fd, program)


def set_receive_buffer(sock: SocketOptions, size: int, *, asked: bool) -> None:
    """Set the receive buffer to `size` bytes, or to as many as the kernel allows. `asked`: then log a warning."""
    try:
        sock.set(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.set(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        try:
            # The kernel doubles the value, for its own data: socket(7), SO_RCVBUF.
            got = sock.get_int(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        except OSError as error:
            if error.errno not in FORBIDDEN:
                raise
            return  # a seccomp filter: the size is unknown
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
    """Restore the receive buffer of a borrowed socket, unless the owner has closed it."""
    with suppress(OSError):
        if file_of(fd) == file:
            set_receive_buffer(SocketOptions(fd), size, asked=False)
