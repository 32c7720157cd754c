"""The receiver refuses invalid reports of a backend."""

from __future__ import annotations

import socket

import pytest
from support.pairs import BACKENDS, pair

import linkrx
from linkrx import registry
from linkrx.backend import Backend, ReceiveConfig
from linkrx.memory.columns import Descriptors
from linkrx.packets import Owner
from linkrx.sources.capabilities import Capabilities


class Invalid(Backend):
    """Reports one packet, with one invalid number."""

    name = "invalid"
    rank = 1
    wrong = ""

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Accept every source."""
        return None

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        self._descriptors = descriptors

    def fill(self, arena: Owner, room: int) -> int:
        """Report the packet."""
        report, columns, wrong = self._descriptors.report, self._descriptors.columns, self.wrong
        columns.starts[0] = 0xFFFFFF00 if wrong == "start" else 0
        columns.lengths[0] = {"length": 0xFFFFFF00, "beyond": 72}.get(wrong, 60)
        report.receives = 1
        report.end = {"end": 1 << 31, "alignment": 62}.get(wrong, 64)
        report.count = {"count": self._descriptors.rows + 1, "negative": 0xFFFFFFFF}.get(wrong, 1)
        return int(report.count)


@pytest.mark.skipif(len(BACKENDS) < 3, reason="the C core was not built: plain Python has no memory to guard")
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("wrong", ["start", "length", "beyond", "end", "alignment", "count", "negative"])
def test_invalid_reports_are_refused_each_time(
    wrong: str, kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each report of numbers outside the memory raises ValueError or OverflowError, and stop() and close() still work."""
    classes = (*registry.classes(), Invalid)
    monkeypatch.setattr(registry, "classes", lambda: classes)
    monkeypatch.setattr(Invalid, "wrong", wrong)
    with pair(kind) as (receiver, _):
        rx = linkrx.open(receiver, lambda *_: None, backend="invalid")
        for _ in range(3):
            with pytest.raises((ValueError, OverflowError)):
                rx.dispatch(0)
        rx.stop()
        rx.close()
        assert rx._released
