"""The types that are used once per packet: those of the C core if it was built, else those of `linkrx.packets.plain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from linkrx import _core
from linkrx.packets import plain

if TYPE_CHECKING:
    from linkrx._core._types import Batch, Owner, Packet
    from linkrx._core._types import restore_packet as _restore
elif _core.types is None:
    from linkrx.packets.plain import Batch, Owner, Packet
    from linkrx.packets.plain import restore as _restore

    Packet.__module__ = Batch.__module__ = "linkrx"
else:
    Batch, Owner, Packet = _core.types.Batch, _core.types.Owner, _core.types.Packet
    _restore = _core.types.restore_packet

__all__ = ["ARENA_BYTES", "ARENA_START", "Batch", "Deliver", "Owner", "Packet", "restore_packet"]

# Bytes of an arena for frames: 172 full Ethernet frames. A larger batch pushes its first frames out of the caches before they are
# processed. After these bytes is address space for one more frame, which is used for large frames only.
ARENA_BYTES = 256 * 1024

# The offset of the first frame: see _core/types/memory.c.
ARENA_START = 64

PICKLE_VERSION = 1

# remote and local link address, protocol, packet
Deliver = Callable[["bytes | None", "bytes | None", int, Packet], object]


def restore_packet(version: int, *state: Any) -> Packet:
    """Make a packet from a pickle, with or without the C core. Raises ValueError for another version of the format."""
    if version != PICKLE_VERSION:
        raise ValueError(
            f"a packet pickled in format {version}, and this linkrx reads format {PICKLE_VERSION}: "
            "pickle and read it with the same version"
        )
    return _restore(*state)


plain.Packet._restored_by = restore_packet  # the types in C import it
