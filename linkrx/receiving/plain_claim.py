"""The claim of a dispatcher in plain Python: one call at a time is inside. In C: `_core/types/receiver.c`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from linkrx.packets.plain import Batch, Packet
from linkrx.receiving.callbacks import Callbacks

Result = TypeVar("Result")


class Claiming(Callbacks):
    """The part of a receiver that lets one call inside."""

    _claims: dict[str, list[int]]  # "thread": the identifier of the thread that has the claim
    _exchange: Callable[[], None]
    _closed = _leaving = _ended = _quiet = _polled = _readable = False
    _undelivered = _undelivered_bytes = 0

    @property
    def _has_something(self) -> bool:
        raise NotImplementedError

    def _inside(self, step: Callable[[], Result]) -> Result:
        """Run a step with the dispatcher claimed. The claim is one atomic operation, with and without the GIL.

        If a signal handler raises after the step, the packets that it returned count as undelivered.
        """
        claim = [threading.get_ident()]
        given: list[Result] = []
        try:
            try:
                if self._closed or self._claims.setdefault("thread", claim) is not claim:
                    self._refuse(self._thread == claim[0])
                self._exchange()
                given = [step()]
            finally:
                # Nothing is called before the claim is compared, because a signal handler could raise in a call.
                if "thread" in self._claims and self._claims["thread"] is claim:
                    try:
                        if self._polled and self._ended:
                            if not self._quiet:
                                self._disarm()
                        elif self._polled and self._has_something != self._readable:
                            self._set_readable()
                    finally:
                        self._claims.clear()
                        if self._leaving or self._closed:
                            self._last_left()
        except BaseException:
            for taken in given:
                if isinstance(taken, Packet | Batch):
                    self._count_undelivered([taken] if isinstance(taken, Packet) else list(taken))
            raise
        return given[0]

    def _count_undelivered(self, packets: Sequence[Packet]) -> None:
        size = sum(map(len, packets))
        self._undelivered += len(packets)
        self._undelivered_bytes += size

    @property
    def _thread(self) -> int | None:
        claim = self._claims.get("thread")
        return None if claim is None else claim[0]

    def _close_alone(self) -> bool:
        """Release everything unless a call is inside. False: one is."""
        claim = [threading.get_ident()]
        try:
            if self._claims.setdefault("thread", claim) is not claim:
                return False
            self._closed = True
            self._release_all()
            return True
        finally:
            if "thread" in self._claims and self._claims["thread"] is claim:
                del self._claims["thread"]
