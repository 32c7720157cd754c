"""A dispatcher that lends: the batches of `batches()` lie in memory that the kernel wants back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from linkrx.dispatcher import Dispatcher
from linkrx.errors import UnsupportedOption
from linkrx.packet import Packet
from linkrx.stats import End


class LendingDispatcher(Dispatcher):
    """What `zero_copy=True` gives: each batch of `batches()` is a `LentBatch`, to be used `with` it.

    A single packet could not say when it is done with, so all other ways to receive raise UnsupportedOption.
    """

    def dispatch(self, timeout: float | None = None) -> bool:
        """Raises UnsupportedOption."""
        raise _batches_only()

    def drain(self) -> int:
        """Raises UnsupportedOption."""
        raise _batches_only()

    def run(self) -> End:
        """Raises UnsupportedOption."""
        raise _batches_only()

    def recv(self, timeout: float | None = None) -> Packet:
        """Raises UnsupportedOption."""
        raise _batches_only()

    def __iter__(self) -> Iterator[Packet]:
        raise _batches_only()

    def __aiter__(self) -> AsyncIterator[Packet]:
        raise _batches_only()


def _batches_only() -> UnsupportedOption:
    return UnsupportedOption(
        "zero_copy=True lends whole batches: use `for batch in rx.batches():` and `with batch:`, or leave the option out"
    )
