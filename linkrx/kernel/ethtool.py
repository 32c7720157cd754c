"""What ethtool(8) tells of a device, as far as linkrx asks."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from linkrx.kernel.uapi import ETHTOOL_GTSO, IFNAMSIZ, SIOCETHTOOL


def takes_super_packets(interface: str) -> bool:
    """Whether the kernel leaves the segmentation of TCP to a device of this namespace: `ethtool -k`.

    A TAP or TUN device hands such super-packets on to who reads it. False where this process may not ask, or the kernel does not answer.
    """
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_GTSO, 0), 8)
    request = struct.pack(f"{IFNAMSIZ}sP16x", os.fsencode(interface), ctypes.addressof(value))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            fcntl.ioctl(asked, SIOCETHTOOL, request)
    except OSError:
        return False
    return bool(struct.unpack("II", value.raw)[1])
