"""Warnings in the log while the kernel drops packets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from linkrx.sources.capabilities import Capabilities

logger = logging.getLogger("linkrx")

INTERVAL = 10.0  # seconds between two looks at the counter, which cost a system call or more


class DropWatch:
    """One WARNING per INTERVAL in which the kernel dropped packets of a source."""

    def __init__(self) -> None:
        self._known = 0
        self.due = time.monotonic() + INTERVAL  # the time of the next look

    def look(self, count: Callable[[], int | None], source: Capabilities) -> None:
        """Compare the count of drops of a source with the last one.

        `count` is not stored: a dispatcher that refers to itself would keep its arenas until it is collected.
        """
        self.due = time.monotonic() + INTERVAL
        drops = count() or 0
        if drops > self._known:
            lost, self._known = drops - self._known, drops
            advice = (
                "receive_buffer= makes the queue longer"
                if source.socket
                else f"`ip link set {source.interface or 'DEVICE'} txqueuelen 10000` makes the queue longer"
            )
            logger.warning(
                "the kernel dropped %d packets of the %s, %d since open: they come faster than they are taken. %s",
                lost,
                source.title,
                drops,
                advice,
            )
