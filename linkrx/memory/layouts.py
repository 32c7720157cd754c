"""Buffers for one packet: gVisor's iovec buffer, and the layout that backends use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# gVisor's sizes: small ones first, so that headers lie together. All have 65,664 bytes, more than an IP packet of 65,535.
BUFFER_SIZES = (128, 256, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

# _core/readv.h LRX_SIZES_MAX; far fewer than the kernel's IOV_MAX of 1024.
SIZES_MAX = 64

# Thirty times the largest frame of any Linux device.
CAPACITY_MAX = 16 * 1024 * 1024


class IovecBuffer:
    """Buffers for one scatter read. Only used buffers are replaced.

    `next_iovecs()` returns writable memoryviews for `os.readv`. `pull(n)` returns those that hold a packet of n bytes, which
    then belong to the caller. The next `next_iovecs()` replaces them.
    """

    def __init__(self, sizes: Sequence[int] = BUFFER_SIZES, vnet_header_size: int = 0) -> None:
        """Make buffers of `sizes` bytes. The first is for a virtio-net header of `vnet_header_size` bytes, unless that is 0."""
        self._sizes = checked_sizes(sizes)
        if type(vnet_header_size) is not int:
            raise TypeError(f"vnet_header_size={vnet_header_size!r}: give int")
        if vnet_header_size < 0:
            raise ValueError(f"vnet_header_size={vnet_header_size}: a size is 0 or more")
        self._header = [memoryview(bytearray(vnet_header_size))] if vnet_header_size else []
        self._header_size = vnet_header_size
        self._views: list[memoryview | None] = [None] * len(self._sizes)

    @property
    def vnet_header(self) -> memoryview:
        """The virtio-net header of the latest read. The next read overwrites it."""
        return self._header[0].toreadonly() if self._header else memoryview(b"")

    def next_iovecs(self) -> list[memoryview]:
        """The buffers for one read, the virtio-net header's first when there is one."""
        for index, view in enumerate(self._views):
            if view is not None:
                break  # pull() takes from the front, so all after an unused one are unused
            self._views[index] = memoryview(bytearray(self._sizes[index]))
        return self._header + [view for view in self._views if view is not None]

    def pull(self, n: int) -> list[memoryview]:
        """The views that hold a packet for which the read returned `n`. `n` counts the virtio-net header, which is left out.

        The last view is cut to size. Raises ValueError when n exceeds what `next_iovecs()` gave room for.
        """
        if n < 0:
            raise ValueError(f"pull({n}): a length is 0 or more")
        left = n - self._header_size
        pulled: list[memoryview] = []
        if left > sum(self._sizes):
            raise ValueError(f"pull({n}): the buffers hold {self._header_size + sum(self._sizes)} bytes")
        for index, view in enumerate(self._views):
            if left <= 0:
                break
            if view is None:
                raise ValueError(f"pull({n}) before next_iovecs(): there are no buffers")
            pulled.append(view[: min(left, len(view))])
            left -= len(view)
            self._views[index] = None
        return pulled


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple. Raises TypeError and ValueError for wrong ones."""
    ladder = tuple(sizes) if isinstance(sizes, Sequence) else ()
    if not isinstance(sizes, Sequence) or any(type(size) is not int for size in ladder):
        raise TypeError(f"buffer_sizes={sizes!r}: give a sequence of int")
    if not 1 <= len(ladder) <= SIZES_MAX or min(ladder) < 1 or sum(ladder) > CAPACITY_MAX:
        raise ValueError(
            f"buffer_sizes={ladder}: give 1 to {SIZES_MAX} sizes of at least 1 byte, {CAPACITY_MAX} bytes in all at most"
        )
    return ladder


@dataclass(frozen=True)
class Layout:
    """The memory for one packet: `capacity` bytes of it are kept, the headers in front of the frame included.

    `sizes` are those of a buffer for these headers and of the caller's iovec buffers. None: one buffer.
    """

    capacity: int
    sizes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, largest_frame: int, prefix: int, sizes: Sequence[int] | None) -> Layout:
        """Memory for the largest frame, or the caller's iovec buffers."""
        if sizes is None:
            return cls(prefix + largest_frame)
        ladder = ((prefix,) if prefix else ()) + checked_sizes(sizes)
        return cls(sum(ladder), ladder)
