"""Settings of a device, as ethtool(8) shows them."""

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

    A TAP or TUN device passes such super-packets to its reader. False if this process may not ask.
    """
    try:
        return bool(_ask(interface, ETHTOOL_GTSO))
    except OSError:
        return False


def has_carrier(interface: str, control: socket.socket) -> bool:
    """Whether an interface is up and has a carrier. It is looked up in the namespace of a socket of any kind.

    The call makes the kernel handle a change of carrier at once: linkwatch_sync_dev() of net/core/link_watch.c. So frames that
    are sent after True leave the interface. Raises OSError (ENODEV) if there is no such interface.
    """
    try:
        return bool(_ask(interface, ETHTOOL_GLINK, control=control))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return True


def set_offloads(interface: str, on: bool) -> None:
    """Turn the checksum, segmentation and merging offloads of a device of this namespace on or off.

    With offloads off, frames come as on a wire. Raises OSError if the device does not have them.
    """
    # Without checksum offload a device does not segment: netdev_fix_features() of net/core/dev.c.
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
