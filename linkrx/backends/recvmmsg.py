"""C: many packets per system call, with true lengths and what the kernel tells about each."""

from __future__ import annotations

import os

from linkrx import _core
from linkrx.backend import Capabilities, CoreBackend, Descriptors, ReceiveConfig

# A slot takes a full Ethernet frame with everything in front of it; larger packets use memory of their own.
SLOT_BYTES = 2048

# That one system call fills: more of them gain nothing there, and what the kernel has written should still be in the
# cache when it moves on into the arena.
SLOTS = 64


class Recvmmsg(CoreBackend):
    """The recommended choice for sockets."""

    name = "recvmmsg"
    rank = 30
    honours = frozenset({"buffer_sizes", "outgoing", "timestamps"})
    batch_size = 512

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """All that is not a socket: the kernel answers ENOTSOCK."""
        if capabilities.socket:
            return None
        return f"recvmmsg reads sockets only, and the source is {capabilities.a_title}"

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        layout = receive.layout
        self._use("lrx_recvmmsg_fill", descriptors)
        slots = min(descriptors.rows, SLOTS)
        self._state = _core.lib.lrx_recvmmsg_open(
            receive.fd,
            slots,
            max(SLOT_BYTES, layout.sizes[0]) if layout.sizes else SLOT_BYTES,
            layout.capacity,
            receive.capabilities.kind in ("packet", "packet_cooked"),
        )
        if not self._state:
            code = _core.last_error()
            raise OSError(code, f"memory for {slots} packets: {os.strerror(code)}")

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
