"""The program that the kernel runs for a socket: socket(7), SO_ATTACH_FILTER."""

from __future__ import annotations

import ctypes
import socket
import struct
from contextlib import suppress

from linkrx.kernel.libc import SocketOptions
from linkrx.kernel.uapi import SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_GET_FILTER

INSTRUCTION_BYTES = 8  # linux/filter.h: struct sock_filter


def attach(fd: int, program: bytes) -> None:
    """Let the kernel run a program of struct sock_filter from now on; what is queued stays. Empty: none. Raises OSError."""
    options = SocketOptions(fd)
    if not program:
        with suppress(FileNotFoundError):  # there was none
            options.set(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        return
    memory = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a length, and the address aligned behind it.
    described = struct.pack("@HP", len(program) // INSTRUCTION_BYTES, ctypes.addressof(memory))
    options.set(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


def attached(fd: int) -> bytes:
    """The program that a socket has; empty for none. Raises PermissionError for one of eBPF, which the kernel does not show."""
    return SocketOptions(fd).get_items(socket.SOL_SOCKET, SO_GET_FILTER, INSTRUCTION_BYTES)
