"""C: one packet per system call, and a whole batch per call from Python."""

from __future__ import annotations

from linkrx import _core
from linkrx.backend import Capabilities, CoreBackend, Descriptors, ReceiveConfig


class Readv(CoreBackend):
    """Works on every source; the recommended choice for TAP and TUN, where the kernel has nothing faster."""

    name = "readv"
    rank = 20
    honours = frozenset({"buffer_sizes", "snaplen"})
    tells_metadata = True
    batch_size = 512  # half of what a TAP queue holds

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Capture files, where a read does not give one packet."""
        if capabilities.kind != "capture_file":
            return None
        return "readv reads one packet per system call, and a capture file is a stream of bytes"

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        lib, found = _core.lib, receive.capabilities
        sizes = receive.layout.sizes or ()
        method = lib.LRX_RECV if found.socket else lib.LRX_READ
        if found.kind in ("packet", "packet_cooked"):
            method = lib.LRX_RECVMSG
        self._use("lrx_readv_fill", descriptors)
        self._state = _core.new(
            "struct lrx_readv *",
            fd=receive.fd,
            method=method,
            capacity=receive.layout.capacity,
            sizes_count=len(sizes),
            sizes=list(sizes),
        )
