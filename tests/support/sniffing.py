"""scapy with linkrx's sockets, for tests."""

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
    warnings.simplefilter("ignore")  # what others' modules warn of as they are compiled
    import scapy.all  # noqa: F401
    from scapy.config import conf
    from scapy.packet import Packet
    from scapy.sendrecv import AsyncSniffer

    from linkrx.adapters.scapy import L2ListenSocket, L2Socket


@pytest.fixture
def scapy_uses_linkrx(monkeypatch: pytest.MonkeyPatch) -> None:
    """scapy opens linkrx's sockets, and prints nothing."""
    monkeypatch.setattr(conf, "L2listen", L2ListenSocket)
    monkeypatch.setattr(conf, "L2socket", L2Socket)
    monkeypatch.setattr(conf, "verb", 0)
    monkeypatch.setattr(conf, "warning_threshold", 0)  # warn each time, for tests that look at warnings


class Sniffing:
    """An AsyncSniffer that receives already. `packets` are what it has seen so far, as they came."""

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
        """Until it ends by itself."""
        self.sniffer.join(PATIENCE)
        assert not self.sniffer.running, f"goes on, with {self.packets}"
        return self.packets


@contextmanager
def sniffing(**wanted: Any) -> Iterator[Sniffing]:
    """A sniffer in a thread of its own, which receives already; stopped at the end."""
    found = Sniffing(**wanted)
    try:
        yield found
    finally:
        if found.sniffer.running:
            found.sniffer.stop()
