"""What a source is, found out by asking the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from linkrx.sources.capture_file import CaptureFile

from linkrx.errors import UnsupportedSource
from linkrx.kernel.ethtool import takes_super_packets
from linkrx.kernel.pipes import writing_ends
from linkrx.kernel.rtnetlink import Link, RouteSocket, same_namespace
from linkrx.kernel.sockets import (
    bound_index,
    has_ring,
    interface_at,
    interface_of,
    packet_vnet_header_size,
    refuse_gro,
)
from linkrx.kernel.uapi import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFNAMSIZ,
    IFREQ_BYTES,
    SIOCGIFHWADDR,
    SO_DOMAIN,
    SO_PROTOCOL,
    TUNGETDEVNETNS,
    TUNGETIFF,
    TUNGETVNETBE,
    TUNGETVNETHDRSZ,
    TUNGETVNETLE,
)
from linkrx.memory.framing import BARE_IP_TYPES, ETHERNET_TYPES

# The largest frame of each kind, so that no default layout cuts one.
# TUN/TAP: 65,535 bytes of MTU at most, an Ethernet header, two VLAN tags, and a 64 KiB super-packet with headers;
# gVisor's ladder holds 65,664.
LARGEST_TUN_FRAME = 65_664
# A super-packet on a veth has GSO_MAX_SIZE = 8 * 65,535 bytes at most and an Ethernet header; a datagram of an
# unprivileged AF_UNIX sender 425,952, twice net.core.wmem_max as it comes less 32. Who raises these sees packets cut,
# flagged, and their true length.
LARGEST_MESSAGE = 524_416
LARGEST_UDP = 65_535
LARGEST_PIPE_PACKET = 4096  # PIPE_BUF: the kernel splits longer writes

_INT_MAX = 2**31 - 1

GONE = -1  # what getsockname(2) has of an interface that was deleted

# With SOCK_NONBLOCK in the type, Python leaves O_NONBLOCK alone even under socket.setdefaulttimeout().
_TYPE = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK


# In place of an interface name: every interface, as tcpdump has it.
EVERY_INTERFACE = "any"


class HasFileno(Protocol):
    """An open file, socket or queue."""

    def fileno(self) -> int: ...


AnySource: TypeAlias = "int | str | HasFileno | CaptureFile | os.PathLike[str]"  # what linkrx.open takes


@dataclass(frozen=True)
class Capabilities:
    """What probing a source found. None means that the source does not say.

    `kind` is one of `tap`, `tun`, `packet` (AF_PACKET with link headers), `packet_cooked` (without),
    `unix_dgram`, `unix_seqpacket`, `udp`, `pipe` (in packet mode), `capture_file`, of the name `path`. `ethernet` tells whether frames start with an
    Ethernet header. `vnet_header_size` is the size in bytes of the virtio-net header in front of every frame, 0
    for none. `hardware_gso`: super-packets may come; without a virtio-net header nothing tells them from other frames, and
    their checksums are unfinished. `interface`, `ifindex` and `mtu` describe the
    device, also when it lives in another network namespace (`local` is then False). `owned`: linkrx opened the
    source itself, by interface name. `nonblocking`: O_NONBLOCK is set. `has_ring`: somebody has put a ring on the packet socket.
    `silent_end`: a macvtap or ipvtap queue, of which nothing tells that its device is deleted: linkrx asks now and then.
    `file_type`: the link type of the first packet of a capture file, as `_core/report.h` has it, where that can be seen without reading from it.
    `ifindex` is GONE, -1, where the interface that a packet socket was bound to is deleted.
    """

    kind: str
    socket: bool
    largest_frame: int
    ethernet: bool | None = None
    vnet_header_size: int = 0
    vnet_little_endian: bool = True
    packet_info: bool | None = False
    hardware_gso: bool = False
    interface: str | None = None
    ifindex: int | None = None
    hardware_type: int | None = None
    mtu: int | None = None
    multi_queue: bool = False
    has_ring: bool = False
    silent_end: bool = False
    local: bool | None = None
    nonblocking: bool = False
    owned: bool = False
    path: str | None = None
    file_type: int | None = None

    @property
    def title(self) -> str:
        """The source in a few words, for messages: "the" may stand in front."""
        words = {
            "tap": "TAP queue",
            "tun": "TUN queue",
            "packet": "AF_PACKET socket",
            "packet_cooked": "cooked AF_PACKET socket",
            "unix_dgram": "AF_UNIX datagram socket",
            "unix_seqpacket": "AF_UNIX seqpacket socket",
            "udp": "UDP socket",
            "pipe": "packet pipe",
            "capture_file": f"capture file {self.path}",
        }[self.kind]
        if self.every_interface:
            return f"{words} on every interface"
        return f"{words} on {self.interface}" if self.interface else words

    @property
    def every_interface(self) -> bool:
        """A packet socket that linkrx opened for "any": `interface` and `ifindex` are None."""
        return self.owned and self.kind == "packet" and self.interface is None

    @property
    def a_title(self) -> str:
        """The same with its article."""
        return f"{'an' if self.title.startswith('A') else 'a'} {self.title}"


def probe(source: AnySource) -> Capabilities:
    """Find out what `source` can do. Changes nothing and reads no packet.

    A file descriptor, an object with `fileno()`, an interface name or "any" (then: what a socket that linkrx opens on it will
    be), or a CaptureFile. Raises UnsupportedSource for what has no packet boundaries, is closed, or is not a source at all.
    """
    from linkrx.sources.capture_file import (
        CaptureFile,
        capture_of,
        perhaps_a_file,
    )  # which imports this module

    if isinstance(source, (CaptureFile, os.PathLike)):
        return capture_of(source).probe()
    if isinstance(source, str):
        with perhaps_a_file(source):
            return _probe_interface(source)
    fd = descriptor(source)
    try:
        mode = os.fstat(fd).st_mode
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise UnsupportedSource(f"file descriptor {fd} is not open: {error.strerror}") from error
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise UnsupportedSource(f"file descriptor {fd} is open for writing only: give the reading end")
    if stat.S_ISSOCK(mode):
        found = _probe_socket(fd)
    elif stat.S_ISFIFO(mode):
        found = _probe_pipe(fd, flags)
    elif stat.S_ISCHR(mode):
        found = _probe_queue(fd)
    else:
        raise UnsupportedSource(
            f"file descriptor {fd} is a {_name_of(mode)}: linkrx receives packets from TAP and TUN queues, packet "
            "and datagram sockets, and packet pipes"
        )
    return replace(found, nonblocking=bool(flags & os.O_NONBLOCK))


def descriptor(source: int | HasFileno) -> int:
    """The descriptor of an int or of an object with `fileno()`."""
    fd: object = source
    if not isinstance(source, int):
        try:
            fd = source.fileno()
        except AttributeError:
            fd = None
        except (OSError, ValueError) as error:
            raise UnsupportedSource(f"{source!r} has no file descriptor: {error}") from error
    if not isinstance(fd, int) or isinstance(fd, bool) or fd > _INT_MAX:
        raise UnsupportedSource(
            f"{source!r} is no source: give a file descriptor, an object with fileno(), or an interface name"
        )
    if fd < 0:
        raise UnsupportedSource(
            f"{fd} is no file descriptor"
            if source is fd
            else f"{source!r} is closed: its file descriptor is {fd}"
        )
    return fd


def borrowed_socket(fd: int) -> socket.socket:
    """A socket object on a duplicate of `fd`: close it soon, the file stays open with it.

    The family and type are placeholders: asking for the true ones needs getsockname(2), which a seccomp filter
    may forbid.
    """
    duplicate = os.dup(fd)
    try:
        return socket.socket(socket.AF_UNIX, _TYPE, 0, fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def ethernet_of(hardware_type: int) -> bool | None:
    """Whether frames of this ARPHRD_* type start with an Ethernet header; None for types linkrx does not know."""
    if hardware_type in ETHERNET_TYPES:
        return True
    return False if hardware_type in BARE_IP_TYPES else None


def _probe_interface(name: str) -> Capabilities:
    if name == EVERY_INTERFACE:
        return Capabilities(
            kind="packet",
            socket=True,
            largest_frame=LARGEST_MESSAGE,
            local=True,
            nonblocking=True,
            owned=True,
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as request:
        try:
            index, hardware_type, mtu = interface_of(request, name)
        except ValueError as error:
            raise UnsupportedSource(str(error)) from error
        except OSError as error:
            raise UnsupportedSource(
                f"interface {name!r}: {error.strerror}; `ip link` lists the interfaces of this network namespace"
            ) from error
    return Capabilities(
        kind="packet",
        socket=True,
        largest_frame=LARGEST_MESSAGE,
        ethernet=ethernet_of(hardware_type),
        interface=name,
        ifindex=index,
        hardware_type=hardware_type,
        mtu=mtu,
        local=True,
        nonblocking=True,
        owned=True,
    )


def _probe_socket(fd: int) -> Capabilities:
    with borrowed_socket(fd) as borrowed:
        domain = borrowed.getsockopt(socket.SOL_SOCKET, SO_DOMAIN)
        kind = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if kind == socket.SOCK_STREAM:
            raise UnsupportedSource(
                f"file descriptor {fd} is a SOCK_STREAM socket, a byte stream without packet boundaries: use "
                "SOCK_DGRAM or SOCK_SEQPACKET"
            )
        if domain == socket.AF_PACKET and kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
            return _probe_packet_socket(fd, borrowed, cooked=kind == socket.SOCK_DGRAM)
        if domain == socket.AF_UNIX:
            name = "unix_seqpacket" if kind == socket.SOCK_SEQPACKET else "unix_dgram"
            return Capabilities(name, socket=True, largest_frame=LARGEST_MESSAGE)
        protocol = borrowed.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)
        if domain in (socket.AF_INET, socket.AF_INET6) and protocol == socket.IPPROTO_UDP:
            refuse_gro(fd)
            return Capabilities("udp", socket=True, largest_frame=LARGEST_UDP)
    raise UnsupportedSource(
        f"file descriptor {fd} is a socket of family {domain}, type {kind}: linkrx receives from AF_PACKET, AF_UNIX "
        "(datagram, seqpacket) and UDP sockets"
    )


def _probe_packet_socket(fd: int, borrowed: socket.socket, *, cooked: bool) -> Capabilities:
    found = Capabilities(
        kind="packet_cooked" if cooked else "packet",
        socket=True,
        largest_frame=LARGEST_MESSAGE,
        ethernet=False if cooked else None,
    )
    if not cooked:
        size = packet_vnet_header_size(borrowed)
        found = replace(found, vnet_header_size=size, hardware_gso=size > 0)
    found = replace(found, has_ring=has_ring(fd))
    index = bound_index(fd)
    if not index:
        return found  # bound to no interface: frames of every kind of device may come
    name = interface_at(borrowed, index)
    if not name:
        return replace(found, ifindex=GONE)
    index, hardware_type, mtu = interface_of(borrowed, name)
    if not cooked:
        found = replace(found, ethernet=ethernet_of(hardware_type))
    return replace(found, interface=name, ifindex=index, hardware_type=hardware_type, mtu=mtu)


def _probe_pipe(fd: int, flags: int) -> Capabilities:
    # pipe2(O_DIRECT) marks the writing end only: what makes packets is how they are written.
    if not flags & os.O_DIRECT:
        ends = writing_ends(fd)
        if not all(end & os.O_DIRECT for end in ends):
            raise UnsupportedSource(
                f"file descriptor {fd} is a pipe, a byte stream without packet boundaries: make it with "
                "os.pipe2(os.O_DIRECT)"
            )
        if not ends:
            raise UnsupportedSource(
                f"file descriptor {fd} is a pipe that another process writes: whether that is in packet mode cannot be "
                f"told. If it is, say so with fcntl.fcntl({fd}, fcntl.F_SETFL, {flags} | os.O_DIRECT)"
            )
    return Capabilities("pipe", socket=False, largest_frame=LARGEST_PIPE_PACKET)


def _probe_queue(fd: int) -> Capabilities:
    try:
        answer = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ_BYTES))
    except OSError as error:
        if isinstance(error, PermissionError) or os.fstat(fd).st_rdev != os.makedev(10, 200):
            raise UnsupportedSource(
                f"file descriptor {fd} is a character device that is no TAP or TUN queue: {error.strerror}"
            ) from error
        raise UnsupportedSource(
            f"file descriptor {fd} is open on /dev/net/tun but attached to no device ({error.strerror}): its device "
            "was deleted, or TUNSETIFF is still to come; linkrx.TunTap opens and attaches a queue"
        ) from error
    name = os.fsdecode(answer[:IFNAMSIZ].rstrip(b"\0"))
    flags: int = struct.unpack_from("H", answer, 16)[0]
    tap = bool(flags & IFF_TAP)
    size = 0
    if flags & IFF_VNET_HDR:  # TUNGETVNETHDRSZ answers 10 without a header as well
        size = struct.unpack("i", fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))[0]
    link, local = _device_of(fd, name, tap=tap)
    # A queue of macvtap or ipvtap answers the same calls, has no packet information, and nothing tells when its device is gone.
    foreign = os.fstat(fd).st_rdev != os.makedev(10, 200)
    packet_info = link.packet_info if link else None
    if foreign or not flags & IFF_NO_PI:
        packet_info = not foreign
    return Capabilities(
        kind="tap" if tap else "tun",
        socket=False,
        largest_frame=LARGEST_TUN_FRAME,
        ethernet=tap,
        vnet_header_size=size,
        vnet_little_endian=_vnet_little_endian(fd),
        # TUNGETIFF says IFF_NO_PI also when only IFF_NOFILTER, the same bit, is meant: a clear bit proves that
        # packet information is on, a set one proves nothing.
        packet_info=packet_info,
        hardware_gso=size > 0 or (local is True and takes_super_packets(name)),
        interface=name,
        ifindex=link.index if link else None,
        hardware_type=link.hardware_type if link else None,
        mtu=link.mtu if link else None,
        multi_queue=bool(flags & IFF_MULTI_QUEUE),
        silent_end=foreign,
        local=local,
    )


def _vnet_little_endian(fd: int) -> bool:
    def told(what: int) -> bool:
        try:
            return bool(struct.unpack("i", fcntl.ioctl(fd, what, bytes(4)))[0])
        except OSError:
            return False  # EINVAL: the kernel was built without the choice

    if told(TUNGETVNETLE):
        return True
    return not told(TUNGETVNETBE) and struct.pack("=H", 1) == struct.pack("<H", 1)


def route_socket_for(fd: int) -> tuple[RouteSocket, bool | None] | None:
    """A route socket in the namespace of a TAP or TUN queue's device, and whether that is this thread's own.

    None when the device is gone, or in a foreign namespace that may not be entered. Without CAP_NET_ADMIN the kernel does not say which
    namespace it is: the socket is then this thread's, and the second value None.
    """
    try:
        namespace = fcntl.ioctl(fd, TUNGETDEVNETNS)
    except OSError as error:
        return None if error.errno == errno.EBADFD else (RouteSocket(), None)
    try:
        if same_namespace(namespace):
            return RouteSocket(), True
        return RouteSocket(namespace), False
    except OSError:
        return None
    finally:
        os.close(namespace)


def _device_of(fd: int, name: str, *, tap: bool) -> tuple[Link | None, bool | None]:
    """The device behind a queue, never another one of the same name in this namespace."""
    found = route_socket_for(fd)
    if found is None:
        return None, False
    route, local = found
    try:
        link = route.link(name=name)
    finally:
        route.close()
    if local is None and not (link and tap and link.address == _hardware_address(fd)):
        return None, None
    return link, True if local is None else local


def _hardware_address(fd: int) -> bytes:
    return fcntl.ioctl(fd, SIOCGIFHWADDR, bytes(IFREQ_BYTES))[18:24]


def _name_of(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "regular file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "block device" if stat.S_ISBLK(mode) else "file of another kind"
