"""The receiver: the type of the C core where it was built, else that of `linkrx.receiving.plain_receiver`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linkrx import _core

if TYPE_CHECKING:
    from linkrx._core._types import Receiver
elif _core.types is None:
    from linkrx.receiving.plain_receiver import Receiver
else:
    Receiver = _core.types.Receiver

__all__ = ["Receiver"]
