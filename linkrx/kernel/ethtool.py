"""What ethtool(8) tells of a device, as far as linkrx asks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

from linkrx.kernel.uapi import (
    ETHTOOL_GLINK,
    ETHTOOL_GTSO,
    ETHTOOL_SGRO,
    ETHTOOL_STSO,
    ETHTOOL_STXCSUM,
    IFNAMSIZ,
    SIOCETHTOOL,
)


def takes_super_packets(interface: str) -> bool:
    """Whether the kernel leaves the segmentation of TCP to a device of this namespace: `ethtool -k`.

    A TAP or TUN device hands such super-packets on to who reads it. False where this process may not ask, or the kernel does not answer.
    """
    try:
        return bool(_ask(interface, ETHTOOL_GTSO))
    except OSError:
        return False


def has_carrier(interface: str, control: socket.socket) -> bool:
    """Whether an interface, of the namespace of a socket of any kind, is up and has a carrier, or knows of none.

    To ask makes the kernel do at once what it does about a change of carrier: linkwatch_sync_dev() of net/core/link_watch.c.
    So what is sent after True leaves the interface. Raises OSError (ENODEV) where there is no such interface.
    """
    try:
        return bool(_ask(interface, ETHTOOL_GLINK, control=control))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return True


def set_offloads(interface: str, on: bool) -> None:
    """Whether checksums and segmentation are left to a device of this namespace, and packets merged that it receives.

    Off, frames come as they would on a wire. Raises OSError where the device does not know of them.
    """
    # Without checksums there is no segmentation in a device: netdev_fix_features() of net/core/dev.c. With them it is as asked.
    for command in (ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGRO):
        _ask(interface, command, int(on))


def _ask(interface: str, command: int, value: int = 0, control: socket.socket | None = None) -> int:
    """SIOCETHTOOL with a struct ethtool_value, in the namespace of `control`, or of this thread."""
    asked = ctypes.create_string_buffer(struct.pack("II", command, value), 8)
    request = struct.pack(f"{IFNAMSIZ}sP16x", os.fsencode(interface), ctypes.addressof(asked))
    if control is not None:
        fcntl.ioctl(control, SIOCETHTOOL, request)
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            fcntl.ioctl(own, SIOCETHTOOL, request)
    answer: int = struct.unpack("II", asked.raw)[1]
    return answer
