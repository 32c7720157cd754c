"""Questions to the kernel about sockets and the interfaces that they are bound to."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import closing

from linkrx.errors import UnsupportedSource
from linkrx.kernel.libc import SocketOptions
from linkrx.kernel.rtnetlink import RouteSocket
from linkrx.kernel.uapi import (
    ALTIFNAMSIZ,
    IFNAMSIZ,
    IFREQ_BYTES,
    PACKET_VERSION,
    PACKET_VNET_HDR,
    PACKET_VNET_HDR_SZ,
    SIOCGIFHWADDR,
    SIOCGIFINDEX,
    SIOCGIFMTU,
    SIOCGIFNAME,
    SOL_PACKET,
    TUNGETIFF,
    UDP_GRO,
    VNET_HEADER_BYTES,
)


def interface_of(request: socket.socket, name: str) -> tuple[int, int, int]:
    """Index, hardware type and MTU of an interface in the namespace of the socket `request`: netdevice(7).

    An alternative name that is too long for netdevice(7) is looked up in this thread's namespace.
    """
    if IFNAMSIZ <= len(os.fsencode(name)) < ALTIFNAMSIZ:
        with closing(RouteSocket()) as route:
            link = route.link(name=name)
        if link is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return link.index, link.hardware_type, link.mtu or 0
    ifreq = interface_name(name).ljust(IFREQ_BYTES, b"\0")

    def ask(what: int, form: str) -> int:
        value: int = struct.unpack_from(form, fcntl.ioctl(request, what, ifreq), 16)[0]
        return value

    return ask(SIOCGIFINDEX, "i"), ask(SIOCGIFHWADDR, "H"), ask(SIOCGIFMTU, "i")


def interface_name(name: str) -> bytes:
    """The name as bytes. Raises ValueError for a name that no interface can have: dev_valid_name() in net/core/dev.c."""
    encoded = os.fsencode(name)
    if not encoded or len(encoded) >= IFNAMSIZ or name in (".", "..") or set(name) & set("/:\0 \t\n\v\f\r"):
        raise ValueError(
            f"{name!r} cannot be the name of an interface: 1 to {IFNAMSIZ - 1} bytes without '/', ':' or spaces"
        )
    return encoded


def refuse_gro(fd: int) -> None:
    """Raise UnsupportedSource for a UDP socket with UDP_GRO, on which the kernel merges datagrams."""
    try:
        glues = SocketOptions(fd).get_int(socket.IPPROTO_UDP, UDP_GRO)
    except OSError:
        return  # Linux before 5.0
    if glues:
        raise UnsupportedSource(
            f"file descriptor {fd} is a UDP socket with UDP_GRO, on which the kernel merges datagrams: turn it off with "
            f"setsockopt(socket.IPPROTO_UDP, {UDP_GRO}, 0)"
        )


def bound_index(fd: int) -> int:
    """The index of the interface that an AF_PACKET socket is bound to.

    0 for none, or if getsockname(2) is forbidden; GONE for a deleted interface.
    """
    try:
        index: int = struct.unpack_from("i", SocketOptions(fd).name(), 4)[0]  # sll_ifindex
    except PermissionError:
        return 0  # a seccomp filter forbids getsockname(2)
    return index


def has_ring(fd: int) -> bool:
    """Whether a packet socket has a ring, for receiving or sending. PACKET_VERSION cannot be set then, even to its own value."""
    options = SocketOptions(fd)
    try:
        options.set(SOL_PACKET, PACKET_VERSION, options.get_int(SOL_PACKET, PACKET_VERSION))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def interface_at(request: socket.socket | int, index: int) -> str:
    """The name of the interface with that index in the namespace of the socket `request`; empty if there is none."""
    try:
        answer = fcntl.ioctl(request, SIOCGIFNAME, struct.pack("16si20x", b"", index))
    except OSError:
        return ""
    return os.fsdecode(answer[:IFNAMSIZ].rstrip(b"\0"))


def device_of(queue: int) -> str:
    """The name of the device of a TAP or TUN queue; empty if there is none."""
    try:
        answer = fcntl.ioctl(queue, TUNGETIFF, bytes(IFREQ_BYTES))
    except OSError:
        return ""
    return os.fsdecode(answer[:IFNAMSIZ].rstrip(b"\0"))


def packet_vnet_header_size(borrowed: socket.socket) -> int:
    try:
        return borrowed.getsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ)
    except OSError:  # Linux before 6.6
        return VNET_HEADER_BYTES if borrowed.getsockopt(SOL_PACKET, PACKET_VNET_HDR) else 0
