"""Whether frames can be sent through a source, and the errors if they cannot. `_core/types/send.c` sends."""

from __future__ import annotations

import errno
import fcntl
import os

from linkrx.errors import UnsupportedSource
from linkrx.kernel.errnos import INTERFACE_GONE, QUEUE_GONE
from linkrx.kernel.uapi import ETH_HEADER_BYTES
from linkrx.sources.capabilities import Capabilities

# The system call that sends: enum lrx_sends in _core/types/types.h.
NOTHING, WRITES, MESSAGES, POLLED = range(4)

# Why a frame cannot be sent: enum unsendable in _core/types/send.c.
UNFINISHED, SUPER_PACKET, NO_PROTOCOL = -1, -2, -3

# The queue is full. ENOBUFS: the device's queue was full, and the frame was dropped.
FULL = frozenset({errno.EAGAIN, errno.ENOBUFS})

# A datagram socket without a peer, or one whose peer has closed.
_NO_PEER = frozenset({errno.ENOTCONN, errno.EDESTADDRREQ})


def why_not(capabilities: Capabilities) -> str | None:
    """Why nothing can be sent through a source, as the end of a sentence; None if frames can be sent."""
    kind = capabilities.kind
    if kind == "packet_cooked":
        return "takes frames without a link header, and linkrx knows no address to send them to: give it a SOCK_RAW socket"
    if kind == "packet" and capabilities.ifindex is None:
        return "is bound to no interface, so there is none to send on: open an interface by name"
    if kind == "pipe":
        return "is the end to read from: write into the other one"
    if kind in ("tap", "tun", "packet", "unix_dgram", "unix_seqpacket", "udp"):
        return None
    return "can be read only"


def way_to_send(fd: int, capabilities: Capabilities) -> int:
    """The system call for a source: NOTHING, WRITES or MESSAGES."""
    if why_not(capabilities) is not None or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return NOTHING
    return MESSAGES if capabilities.socket else WRITES


def refusal(code: int, length: int, capabilities: Capabilities) -> Exception:
    """The exception for a frame of `length` bytes that was not sent.

    `code`: an errno, one of the numbers above, or 0 for a source that sends nothing.
    """
    title, name = capabilities.title, capabilities.interface
    if code == 0:
        return UnsupportedSource(
            f"nothing can be sent: the {title} {why_not(capabilities) or 'is open for reading only'}"
        )
    if code in _NO_PEER:
        return UnsupportedSource(
            f"nothing can be sent: the {title} has no peer ({os.strerror(code)}): connect() it"
        )
    needs = ", but the {} has no virtio-net header, which would describe that. Receive such packets with segment=True"
    if code == UNFINISHED:
        return ValueError("the packet's checksum is unfinished" + needs.format(title))
    if code == SUPER_PACKET:
        return ValueError(
            "the packet is a super-packet, which stands for several frames" + needs.format(title)
        )
    if code == NO_PROTOCOL:
        return ValueError(
            f"a packet of {length} bytes that is neither IPv4 nor IPv6: the {title} needs its EtherType in struct tun_pi. Send "
            "a linkrx.Packet, which has an EtherType"
        )
    tried = f"sending {length} bytes on the {title}"
    if code in FULL:
        return BlockingIOError(code, f"{tried}: its queue is full ({os.strerror(code)})")
    queue = capabilities.kind in ("tap", "tun")
    # A queue says EIO: tun_get_user() in drivers/net/tun.c.
    if code == errno.ENETDOWN or (queue and code == errno.EIO):
        return OSError(errno.ENETDOWN, f"{tried}: the link is down; `ip link set {name} up` brings it up")
    if code in (QUEUE_GONE if queue else INTERFACE_GONE):
        return OSError(errno.ENODEV, f"{tried}: the device is gone ({os.strerror(code)})")
    if code == errno.EMSGSIZE and capabilities.mtu is not None:
        return OSError(
            code, f"{tried}: longer than its MTU allows; that was {capabilities.mtu} when it was opened"
        )
    if code == errno.EINVAL and capabilities.ethernet and length < ETH_HEADER_BYTES:
        return OSError(code, f"{tried}: an Ethernet header alone has {ETH_HEADER_BYTES}")
    if code == errno.EINVAL and capabilities.kind == "tun":
        return OSError(code, f"{tried}: it takes IPv4 and IPv6 packets only")
    return OSError(code, f"{tried}: {os.strerror(code)}")
