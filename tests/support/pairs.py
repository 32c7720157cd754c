"""AF_UNIX pairs, and frames that contain their number."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import linkrx
from linkrx.testing.rigs import LOCAL, REMOTE
from support.run import that_take

HEADER = LOCAL + REMOTE + b"\x08\x00"
BACKENDS = that_take("unix_dgram")

Pair = tuple[socket.socket, socket.socket]


@contextmanager
def pair(kind: socket.SocketKind = socket.SOCK_DGRAM) -> Iterator[Pair]:
    """A socket pair: receiver and sender."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, kind)
    with receiver, sender:
        yield receiver, sender


def frame(number: int) -> bytes:
    """A frame that contains its number."""
    return HEADER + number.to_bytes(4, "big")


def number_of(packet: linkrx.Packet) -> int:
    """The number in a frame of `frame`."""
    return int.from_bytes(packet.data, "big")
