"""System calls through the C library that `os` has in later versions of Python only.

`os` has `unshare` and `setns` from Python 3.12 and `timerfd_create` from 3.13.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterable

from linkrx.kernel import uapi

_CLOCK_MONOTONIC = 1
# sys/timerfd.h: the values of O_CLOEXEC and O_NONBLOCK.
_TFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def _checked(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces that `flags` names for new ones. See man 2 unshare."""
    _checked(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move this thread into the namespace that `fd` refers to. See man 2 setns."""
    _checked(_libc.setns(fd, kind), "setns")


def keep_capabilities(kept: Iterable[int]) -> None:
    """Drop all other capabilities, and pass these on to programs that this process starts. See man 7 capabilities.

    A program that does not run as root keeps ambient capabilities only.
    """
    kept = tuple(kept)
    mask = sum(1 << capability for capability in kept)
    header = struct.pack("=Ii", uapi.LINUX_CAPABILITY_VERSION_3, 0)  # of this thread
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    _checked(_libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)), "capset")
    for capability in kept:
        _checked(_libc.prctl(uapi.PR_CAP_AMBIENT, uapi.PR_CAP_AMBIENT_RAISE, capability, 0, 0), "prctl")


class SocketOptions:
    """getsockopt(2) and setsockopt(2) on a borrowed descriptor.

    A `socket.socket` would close it. A duplicate could stay open after an exception of a signal handler.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def get(self, level: int, name: int, size: int = 4) -> bytes:
        """The value of an option, at most `size` bytes."""
        value = ctypes.create_string_buffer(size)
        length = ctypes.c_uint32(size)
        _checked(_libc.getsockopt(self._fd, level, name, value, ctypes.byref(length)), "getsockopt")
        return value.raw[: length.value]

    def get_items(self, level: int, name: int, size: int) -> bytes:
        """All items, of `size` bytes each, of an option whose length counts items: SO_GET_FILTER."""
        count = ctypes.c_uint32(0)
        _checked(_libc.getsockopt(self._fd, level, name, None, ctypes.byref(count)), "getsockopt")
        value = ctypes.create_string_buffer(max(1, size * count.value))
        if count.value:
            _checked(_libc.getsockopt(self._fd, level, name, value, ctypes.byref(count)), "getsockopt")
        return value.raw[: size * count.value]

    def get_int(self, level: int, name: int) -> int:
        """An int."""
        return int.from_bytes(self.get(level, name), sys.byteorder, signed=True)

    def name(self) -> bytes:
        """getsockname(2): the address that the socket is bound to."""
        value = ctypes.create_string_buffer(128)
        length = ctypes.c_uint32(128)
        _checked(_libc.getsockname(self._fd, value, ctypes.byref(length)), "getsockname")
        return value.raw[: length.value]

    def set(self, level: int, name: int, value: int | bytes) -> None:
        """An int, or a structure."""
        data = value if isinstance(value, bytes) else value.to_bytes(4, sys.byteorder, signed=True)
        _checked(_libc.setsockopt(self._fd, level, name, data, len(data)), "setsockopt")


def send(fd: int, data: bytes, flags: int) -> None:
    """Send one message. See man 2 send."""
    _checked(_libc.send(fd, data, len(data), flags), "send")


def bind_to_interface(fd: int, protocol: int, index: int) -> None:
    """Bind a packet socket to an interface by its index; 0 is every interface. See man 7 packet, struct sockaddr_ll."""
    address = struct.pack("=HHi12x", socket.AF_PACKET, socket.htons(protocol), index)
    _checked(_libc.bind(fd, address, len(address)), "bind")


def timerfd() -> int:
    """A descriptor of a stopped timer: timerfd_create(2)."""
    return _checked(_libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS), "timerfd_create")


def set_timerfd(fd: int, interval: float) -> None:
    """Make a timer readable every `interval` seconds; 0 stops it: timerfd_settime(2)."""
    seconds, rest = divmod(int(interval * 1e9), 10**9)
    period = _Timespec(seconds, rest)
    _checked(_libc.timerfd_settime(fd, 0, ctypes.byref(_Itimerspec(period, period)), None), "timerfd_settime")
