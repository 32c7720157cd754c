"""The types that receive and wait: those of the C core if it was built, else those in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linkrx import _core

if TYPE_CHECKING:
    from linkrx._core._types import AsyncPackets, Receiver, Waiter
elif _core.types is None:
    from linkrx.receiving.plain_async import AsyncPackets, Waiter
    from linkrx.receiving.plain_receiver import Receiver
else:
    AsyncPackets, Receiver, Waiter = _core.types.AsyncPackets, _core.types.Receiver, _core.types.Waiter

__all__ = ["AsyncPackets", "Receiver", "Waiter"]
