"""Batches over memory that is lent: blocks of a ring that the kernel fills again once they are given back."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType

from linkrx.batch import Batch
from linkrx.errors import LinkrxError


class Lease:
    """The right to a block: `memory` is its bytes, and `hold` has what gives it back when nothing refers to it any more."""

    __slots__ = ("address", "hold", "memory")

    def __init__(self, memory: memoryview, address: int) -> None:
        self.memory = memory
        self.address = address
        self.hold: list[object] = []


class LentBatch(Batch):
    """A batch whose frames lie where the kernel wrote them. A context manager: behind it, or collected, it is over.

    Then the kernel may write there again, once no other batch has the same block. `memory` is released, and raises
    ValueError; so do frames of its packets. Columns stay, and so does what `copy()` made. A slice or an array that was
    made of `memory` before stays readable for as long as it is held, but shows whatever the kernel writes there.
    """

    __slots__ = ("_lease",)

    _lease: Lease | None

    def __enter__(self) -> LentBatch:
        if self._lease is None:
            raise LinkrxError(
                "this batch was given back already; what is to be kept longer is made with copy()"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """What leaving the context does. Idempotent."""
        view = self.memory if self._lease else None
        # A view of nothing, released too, takes its place: what is asked of it raises ValueError.
        self.memory = self._buffer = released = memoryview(b"")
        released.release()
        self._lease = None
        if view is not None:
            with suppress(BufferError):  # an array looks at it
                view.release()
