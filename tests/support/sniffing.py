"""Runs scapy with linkrx's sockets."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from linkrx.testing.waiting import PATIENCE

pytest.importorskip("scapy", reason="needs scapy, which is not installed (pip install scapy)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other packages' modules warn at import
    import scapy.all  # noqa: F401
    from scapy.config import conf
    from scapy.packet import Packet
    from scapy.sendrecv import AsyncSniffer

    from linkrx.adapters.scapy import L2ListenSocket, L2Socket


@pytest.fixture
def scapy_uses_linkrx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scapy open linkrx's sockets, and print nothing."""
    monkeypatch.setattr(conf, "L2listen", L2ListenSocket)
    monkeypatch.setattr(conf, "L2socket", L2Socket)
    monkeypatch.setattr(conf, "verb", 0)
    monkeypatch.setattr(conf, "warning_threshold", 0)  # warn each time, for tests that check warnings


class Sniffing:
    """A running AsyncSniffer. `packets` holds the packets that it has received so far, in order."""

    def __init__(self, **wanted: Any) -> None:
        self.packets: list[Packet] = []
        started = threading.Event()
        self.sniffer = AsyncSniffer(
            store=False, prn=self.packets.append, started_callback=started.set, **wanted
        )
        self.sniffer.start()
        while not started.wait(0.01):
            assert self.sniffer.exception is None, self.sniffer.exception

    def wait(self) -> list[Packet]:
        """Wait until the sniffer ends by itself. Returns its packets."""
        self.sniffer.join(PATIENCE)
        assert not self.sniffer.running, f"goes on, with {self.packets}"
        return self.packets


@contextmanager
def sniffing(**wanted: Any) -> Iterator[Sniffing]:
    """A running sniffer in its own thread. It is stopped at the end of `with`."""
    found = Sniffing(**wanted)
    try:
        yield found
    finally:
        if found.sniffer.running:
            found.sniffer.stop()
