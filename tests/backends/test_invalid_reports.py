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
    """Reports one packet, with one invalid number, or a full table of packets that all lie in the same bytes."""

    name = "invalid"
    rank = 1
    batch_size = 1 << 16
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
        if wrong == "overlap":  # together more than 4 GiB
            report.count = report.receives = self._descriptors.rows
            report.end = 1 << 17
            for row in range(report.count):
                columns.starts[row], columns.lengths[row] = 0, report.end
            return int(report.count)
        columns.starts[0] = 0xFFFFFF00 if wrong == "start" else 0
        columns.lengths[0] = {"length": 0xFFFFFF00, "beyond": 72}.get(wrong, 60)
        report.receives = 1
        report.end = {"end": 1 << 31, "alignment": 62}.get(wrong, 64)
        report.count = {"count": self._descriptors.rows + 1, "negative": 0xFFFFFFFF}.get(wrong, 1)
        return int(report.count)


@pytest.mark.skipif(len(BACKENDS) < 3, reason="the C core was not built: plain Python has no memory to guard")
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize(
    "wrong", ["start", "length", "beyond", "end", "alignment", "count", "negative", "overlap"]
)
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


@pytest.mark.skipif(len(BACKENDS) < 3, reason="the C core was not built: plain Python has no memory to guard")
@pytest.mark.parametrize("answer", [2, -1, 1 << 20, 1 << 40, 1 << 70, "2", None])
def test_an_invalid_answer_about_a_hang_up_is_refused(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a subclass reports more packets than were received, or no number, the receive raises. close() still works."""
    monkeypatch.setattr(linkrx.Dispatcher, "_without_hangup", lambda *_: answer)
    with pair(socket.SOCK_SEQPACKET) as (receiver, sender):
        sender.send(b"")
        rx = linkrx.open(receiver, lambda *_: None)
        for _ in range(3):
            with pytest.raises((ValueError, OverflowError, TypeError)):
                rx.dispatch(0)
        rx.stop()
        rx.close()
        assert rx._released
