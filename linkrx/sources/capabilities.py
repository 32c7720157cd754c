"""Probes a source: asks the kernel what kind it is and what it can do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
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

# The largest frame of each kind in bytes. Default layouts cut no frame.
# TUN/TAP: an MTU of 65,535 at most, an Ethernet header and two VLAN tags, or a super-packet of 64 KiB with headers. gVisor's
# buffers hold 65,664.
LARGEST_TUN_FRAME = 65_664
# A super-packet on a veth has GSO_MAX_SIZE = 8 * 65,535 bytes at most, and an Ethernet header. A datagram of an unprivileged
# AF_UNIX sender has 425,952: twice the default of net.core.wmem_max less 32. Beyond raised limits, packets are cut and flagged.
LARGEST_MESSAGE = 524_416
LARGEST_UDP = 65_535
LARGEST_PIPE_PACKET = 4096  # PIPE_BUF: the kernel splits longer writes

_INT_MAX = 2**31 - 1

GONE = -1  # the interface index of getsockname(2) after the interface was deleted

# With SOCK_NONBLOCK in the type, Python does not change O_NONBLOCK even under socket.setdefaulttimeout().
_TYPE = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK


# The name for every interface, as in tcpdump.
EVERY_INTERFACE = "any"


class HasFileno(Protocol):
    """An open file, socket or queue."""

    def fileno(self) -> int: ...


AnySource: TypeAlias = "int | str | HasFileno | CaptureFile | os.PathLike[str]"  # what linkrx.open takes


@dataclass(frozen=True)
class Capabilities:
    """What probing found about a source. None means that the source does not report it.

    * `kind` is `tap`, `tun`, `packet` (AF_PACKET with link headers), `packet_cooked` (without), `unix_dgram`, `unix_seqpacket`,
      `udp`, `pipe` (in packet mode) or `capture_file`, whose name is `path`.
    * `socket`: the source is a socket. `largest_frame` is in bytes.
    * `ethernet`: frames start with an Ethernet header.
    * `vnet_header_size` is the size in bytes of the virtio-net header in front of every frame; 0 for none. `packet_info`: struct
      tun_pi is in front of every frame.
    * `hardware_gso`: super-packets may come. Without a virtio-net header they look like other frames, with unfinished checksums.
    * `interface`, `ifindex`, `hardware_type` (ARPHRD_*) and `mtu` describe the device, also in another network namespace; then
      `local` is False. `ifindex` is GONE, -1, after the interface of a packet socket was deleted.
    * `owned`: linkrx opens the source itself, by name. `nonblocking`: O_NONBLOCK is set.
    * `has_ring`: the packet socket has a ring.
    * `silent_end`: a macvtap or ipvtap queue. The kernel does not report that its device is deleted, so linkrx polls.
    * `file_type`: the link type of the first packet of a capture file, as in `_core/report.h`, if a look at its beginning shows it.
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
        """A short description for messages, without an article."""
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
        """Whether this is a packet socket of linkrx for "any". `interface` and `ifindex` are then None."""
        return self.owned and self.kind == "packet" and self.interface is None

    @property
    def a_title(self) -> str:
        """The title with "a" or "an"."""
        return f"{'an' if self.title.startswith('A') else 'a'} {self.title}"


def probe(source: AnySource) -> Capabilities:
    """Find out what `source` can do. Changes nothing and reads no packet.

    `source` is a file descriptor, an object with `fileno()`, an interface name or "any", or a capture file: a CaptureFile or a
    pathlib.Path. For a name, the result describes the packet socket that linkrx would open. Raises UnsupportedSource for a
    source that has no packet boundaries, is closed, or is of another kind.
    """
    # Imported here, because it imports this module.
    from linkrx.sources.capture_file import (
        CaptureFile,
        capture_of,
        perhaps_a_file,
    )

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
            + (". For a capture file, give linkrx.CaptureFile(file)" if stat.S_ISREG(mode) else "")
        )
    return replace(found, nonblocking=bool(flags & os.O_NONBLOCK))


def descriptor(source: int | HasFileno) -> int:
    """The descriptor of an int or of an object with `fileno()`. Raises UnsupportedSource if it has none."""
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
    """A socket object on a duplicate of `fd`, which the caller closes.

    Its family and type are placeholders. Reading the true ones needs getsockname(2), which a seccomp filter may forbid.
    """
    duplicate = os.dup(fd)
    try:
        return socket.socket(socket.AF_UNIX, _TYPE, 0, fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def ethernet_of(hardware_type: int) -> bool | None:
    """Whether frames of this ARPHRD_* type start with an Ethernet header. None for an unknown type."""
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
        return found  # bound to no interface: frames come from every kind of device
    name = interface_at(borrowed, index)
    if not name:
        return replace(found, ifindex=GONE)
    index, hardware_type, mtu = interface_of(borrowed, name)
    if not cooked:
        found = replace(found, ethernet=ethernet_of(hardware_type))
    return replace(found, interface=name, ifindex=index, hardware_type=hardware_type, mtu=mtu)


def _probe_pipe(fd: int, flags: int) -> Capabilities:
    # pipe2(O_DIRECT) sets the flag on the writing end only. The flag of the writer makes packets.
    if not flags & os.O_DIRECT:
        ends = writing_ends(fd)
        if not all(end & os.O_DIRECT for end in ends):
            raise UnsupportedSource(
                f"file descriptor {fd} is a pipe, a byte stream without packet boundaries: make it with "
                "os.pipe2(os.O_DIRECT), or, if it carries a capture file, give linkrx.CaptureFile(file)"
            )
        if not ends:
            raise UnsupportedSource(
                f"file descriptor {fd} is a pipe that another process writes, so linkrx cannot find out whether it is in packet "
                f"mode. If it is, call fcntl.fcntl({fd}, fcntl.F_SETFL, {flags} | os.O_DIRECT)"
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
    if flags & IFF_VNET_HDR:  # TUNGETVNETHDRSZ returns 10 without a header, too
        size = struct.unpack("i", fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))[0]
    link, local = _device_of(fd, name, tap=tap)
    # A queue of macvtap or ipvtap answers the same ioctls. It has no packet information, and does not report that its device is
    # deleted.
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
        # IFF_NO_PI and IFF_NOFILTER are the same bit of TUNGETIFF. A clear bit means that packet information is on. A set bit
        # does not mean that it is off.
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
    def is_set(request: int) -> bool:
        try:
            return bool(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])
        except OSError:
            return False  # EINVAL: the kernel was built without CONFIG_TUN_VNET_CROSS_LE

    if is_set(TUNGETVNETLE):
        return True
    return not is_set(TUNGETVNETBE) and sys.byteorder == "little"


def route_socket_for(fd: int) -> tuple[RouteSocket, bool | None] | None:
    """A route socket in the namespace of a TAP or TUN queue's device, and whether that is this thread's namespace.

    None if the device is deleted, or in another namespace that this process may not enter. Without CAP_NET_ADMIN the kernel does
    not report the namespace. Then the socket is in this thread's namespace, and the second value is None.
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
    """The device of a queue, and whether it is in this namespace. None if another device of that name cannot be excluded."""
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
