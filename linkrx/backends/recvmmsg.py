"""C: many packets per system call, with their true lengths and metadata."""

from __future__ import annotations

import os

from linkrx import _core
from linkrx.backend import Capabilities, CoreBackend, Descriptors, Layout, ReceiveConfig

# Packets per system call. More gain nothing, and so many are still in the cache when they are handled.
MESSAGES = 64

# Of address space, where packets may be larger than any kernel makes them.
ROOM_MOST = 64 * 1024 * 1024


class Recvmmsg(CoreBackend):
    """The recommended choice for sockets."""

    name = "recvmmsg"
    rank = 30
    honours = frozenset({"buffer_sizes", "snaplen", "outgoing", "timestamps"})
    tells_metadata = True
    batch_size = MESSAGES

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Sources that are no sockets: the kernel answers ENOTSOCK."""
        if capabilities.socket:
            return None
        return f"recvmmsg reads sockets only, and the source is {capabilities.a_title}"

    @classmethod
    def room(cls, layout: Layout) -> int:
        """Both places of each packet of a system call."""
        stride = int(_core.lib.lrx_recvmmsg_stride(layout.capacity))
        return max(super().room(layout), min(MESSAGES, ROOM_MOST // stride) * stride)

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        layout = receive.layout
        self._use("lrx_recvmmsg_fill", descriptors)
        messages = min(descriptors.rows, MESSAGES)
        self._state = _core.lib.lrx_recvmmsg_open(
            receive.fd,
            messages,
            layout.capacity,
            receive.capabilities.kind in ("packet", "packet_cooked"),
            bool(receive.framing.per_packet),
        )
        if not self._state:
            code = _core.last_error()
            raise OSError(code, f"memory for {messages} packets: {os.strerror(code)}")

    def close(self) -> None:
        """Free the memory."""
        state, self._state = self._state, None
        if state is not None:
            _core.lib.lrx_recvmmsg_close(state)
