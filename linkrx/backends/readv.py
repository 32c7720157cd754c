"""C: one packet per system call, a whole batch per crossing from Python."""

from __future__ import annotations

from linkrx import _core
from linkrx.arena import Arena
from linkrx.backend import Backend, Receive
from linkrx.capabilities import Capabilities
from linkrx.columns import Descriptors


class Readv(Backend):
    """Works on every source; the recommended choice for TAP and TUN, where the kernel has nothing faster."""

    name = "readv"
    rank = 20
    honours = frozenset({"buffer_sizes"})
    batch_size = 512  # half of what a TAP queue holds

    @classmethod
    def missing(cls) -> str | None:
        """The core may not have been built."""
        return _core.reason

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Nothing that has packet boundaries."""
        return None

    def __init__(self, receive: Receive, descriptors: Descriptors) -> None:
        lib, found = _core.lib, receive.capabilities
        sizes = receive.layout.sizes or ()
        if found.socket:
            method = lib.LRX_RECV
        elif found.nonblocking:
            method = lib.LRX_READ
        else:
            method = lib.LRX_NOWAIT
        self._state = _core.new(
            "struct lrx_readv *",
            fd=receive.fd,
            method=method,
            capacity=receive.layout.capacity,
            sizes_count=len(sizes),
            sizes=list(sizes),
        )
        self._descriptors = descriptors.address()
        self._rows = descriptors.rows
        self._fill = lib.lrx_readv_fill
        self.native = _core.pointer(_core.function("lrx_readv_fill")), _core.pointer(self._state)

    def fill(self, arena: Arena, room: int) -> int:
        """One crossing: until nothing is there, the descriptors are full, or a further packet might not fit."""
        count: int = self._fill(
            self._state, self._descriptors, self._rows, arena.address + arena.cursor, room
        )
        return max(count, 0)  # the header has the errno
