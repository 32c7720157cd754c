"""C: many packets per system call, with true lengths and what the kernel tells about each."""

from __future__ import annotations

import os

from linkrx import _core
from linkrx.arena import Arena
from linkrx.backend import Backend, Receive
from linkrx.capabilities import Capabilities
from linkrx.columns import Descriptors

# A slot takes a full Ethernet frame with everything in front of it; larger packets use memory of their own.
SLOT_BYTES = 2048

# That one system call fills: more of them gain nothing there, and what the kernel has written should still be in the
# cache when it moves on into the arena.
SLOTS = 64


class Recvmmsg(Backend):
    """The recommended choice for sockets."""

    name = "recvmmsg"
    rank = 30
    honours = frozenset({"buffer_sizes", "outgoing", "timestamps"})
    batch_size = 512

    @classmethod
    def missing(cls) -> str | None:
        """The core may not have been built."""
        return _core.reason

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """All that is not a socket: the kernel answers ENOTSOCK."""
        if capabilities.socket:
            return None
        return f"recvmmsg reads sockets only, and the source is {capabilities.a_title}"

    def __init__(self, receive: Receive, descriptors: Descriptors) -> None:
        lib, layout = _core.lib, receive.layout
        self._descriptors = descriptors.address()
        self._rows = descriptors.rows
        self._state = lib.lrx_recvmmsg_open(
            receive.fd,
            min(descriptors.rows, SLOTS),
            max(SLOT_BYTES, layout.sizes[0]) if layout.sizes else SLOT_BYTES,
            layout.capacity,
            receive.capabilities.kind in ("packet", "packet_cooked"),
        )
        if not self._state:
            code = _core.last_error()
            raise OSError(code, f"memory for {SLOTS} packets: {os.strerror(code)}")
        self._fill = lib.lrx_recvmmsg_fill
        self.native = _core.pointer(_core.function("lrx_recvmmsg_fill")), _core.pointer(self._state)

    def fill(self, arena: Arena, room: int) -> int:
        """One crossing: until the queue is empty, the descriptors are full, or the next packet does not fit."""
        count: int = self._fill(
            self._state, self._descriptors, self._rows, arena.address + arena.cursor, room
        )
        if count < 0:
            return 0  # the header has the errno
        return count

    @property
    def held(self) -> int:
        """Packets that did not fit into the last arena."""
        waiting: int = _core.lib.lrx_recvmmsg_waiting(self._state) if self._state is not None else 0
        return waiting

    def close(self) -> None:
        """Give the slots back."""
        state, self._state = self._state, None
        if state is not None:
            _core.lib.lrx_recvmmsg_close(state)
