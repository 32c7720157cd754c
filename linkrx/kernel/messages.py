"""recvmsg(2) through the C library, with the sender and the control messages of each packet.

Python's socket.recvmsg() decodes the name of a packet's interface after the call. If the name is not UTF-8 it raises, and the
packet is lost.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from itertools import repeat

_libc = ctypes.CDLL(None, use_errno=True)

ADDRESS_BYTES = 128  # sys/socket.h: struct sockaddr_storage
CONTROL_BYTES = 512  # for all control messages that the owner of a borrowed socket may have switched on

_LINK_ADDRESS = struct.Struct("=HHiHBB8s")  # linux/if_packet.h: struct sockaddr_ll
_CONTROL_HEADER = struct.Struct("@Nii")  # sys/socket.h: struct cmsghdr
_WORD = ctypes.sizeof(ctypes.c_size_t)  # CMSG_ALIGN


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("pieces", ctypes.c_void_p),
        ("pieces_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Place:
    """The memory for one message: its bytes, its sender and its control messages."""

    def __init__(self, memory: memoryview, sizes: Sequence[int], *, metadata: bool) -> None:
        """The bytes go into `memory`, in pieces of these sizes. `metadata`: receive sender and control messages too."""
        # References to the memory, because the structures hold addresses only.
        self._memory = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._pieces = (_Iovec * len(sizes))()
        at = ctypes.addressof(self._memory)
        for piece, size in zip(self._pieces, sizes, strict=True):
            piece.base, piece.length = at, size
            at += size
        self._header = _Msghdr(pieces=ctypes.addressof(self._pieces), pieces_count=len(sizes))
        self._metadata = bytearray(ADDRESS_BYTES + CONTROL_BYTES if metadata else 0)
        self.pointer = ctypes.byref(self._header)
        if metadata:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._metadata))
            self._header.name, self._header.control = address, address + ADDRESS_BYTES

    def prepare(self) -> None:
        """Reset the sizes before each message, because the kernel writes the sizes that it has used."""
        if self._metadata:
            self._header.name_length, self._header.control_length = ADDRESS_BYTES, CONTROL_BYTES

    def sender(self) -> tuple[int, int, int, int, bytes]:
        """The sender on a packet socket: interface index, protocol, PACKET_*, ARPHRD_*, and link address."""
        _, protocol, index, link_type, kind, length, address = _LINK_ADDRESS.unpack_from(self._metadata)
        return (
            index,
            int.from_bytes(struct.pack("=H", protocol), "big"),
            kind,
            link_type,
            address[: min(length, 8)],
        )

    def control(self) -> Iterator[tuple[int, int, bytes]]:
        """Level, type and data of each control message."""
        at, end = ADDRESS_BYTES, ADDRESS_BYTES + min(self._header.control_length, CONTROL_BYTES)
        while at + _CONTROL_HEADER.size <= end:
            length, level, kind = _CONTROL_HEADER.unpack_from(self._metadata, at)
            if length < _CONTROL_HEADER.size or at + length > end:
                return
            yield level, kind, bytes(self._metadata[at + _CONTROL_HEADER.size : at + length])
            at += -(-length // _WORD) * _WORD


def receive(fd: int, places: Iterator[object], flags: int) -> Iterator[int]:
    """Receive a message into each place in turn. Gives its length, or -1; last_errno() then has the errno.

    All of it runs in C, so that no signal handler runs between a system call and its result.
    """
    return map(_libc.recvmsg, repeat(fd), places, repeat(flags))


def last_errno() -> int:
    """The errno of the last call of this thread that failed."""
    return ctypes.get_errno()
