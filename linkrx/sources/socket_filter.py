"""The filter program of a socket, which the kernel runs: socket(7), SO_ATTACH_FILTER."""

from __future__ import annotations

import ctypes
import socket
import struct
from contextlib import suppress

from linkrx.kernel.libc import SocketOptions
from linkrx.kernel.uapi import SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_GET_FILTER

INSTRUCTION_BYTES = 8  # linux/filter.h: struct sock_filter


def attach(fd: int, program: bytes) -> None:
    """Attach a program of struct sock_filter. An empty one detaches the filter. Queued packets stay. Raises the kernel's OSError."""
    options = SocketOptions(fd)
    if not program:
        with suppress(FileNotFoundError):  # no filter is attached
            options.set(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        return
    memory = ctypes.create_string_buffer(program, len(program))
    # linux/filter.h: struct sock_fprog, a length and an aligned address.
    described = struct.pack("@HP", len(program) // INSTRUCTION_BYTES, ctypes.addressof(memory))
    options.set(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


def attached(fd: int) -> bytes:
    """The program of a socket; empty for none. Raises PermissionError for an eBPF program, which the kernel does not show."""
    return SocketOptions(fd).get_items(socket.SOL_SOCKET, SO_GET_FILTER, INSTRUCTION_BYTES)
