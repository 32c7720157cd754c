"""The log reports drops, once per interval."""

from __future__ import annotations

import pytest
from support.run import that_take

from linkrx.receiving import drops as dropwatch
from linkrx.testing import rigs


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_drops_are_logged(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While drops increase, each interval has one warning, with the numbers and the remedy. Otherwise there is none."""
    monkeypatch.setattr(dropwatch, "INTERVAL", 0.0)
    with rigs.interface() as rig, rig.open(backend, receive_buffer=2304) as rx:
        for _ in range(2):
            for _ in range(3000):
                rig.send(rig.frame(1000))
            for _ in rx.batches(0.05):
                pass
            assert caplog.messages
            drops = rx.stats().kernel_drops
            assert (
                f" dropped {drops} packets" in caplog.messages[0]
                or f" {drops} since open" in caplog.messages[-1]
            )
            assert caplog.messages[-1].endswith("receive_buffer= makes the queue longer")
            logged = len(caplog.messages)
            rig.send(rig.frame(1000))
            for _ in rx.batches(0.05):
                pass
            assert len(caplog.messages) == logged


@pytest.mark.usefixtures("devices")
def test_drops_are_not_logged_within_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    """Within an interval no further warning is logged."""
    with rigs.interface() as rig, rig.open("auto", receive_buffer=2304) as rx:
        for _ in range(3000):
            rig.send(rig.frame(1000))
        for _ in rx.batches(0.05):
            pass
        assert rx.stats().kernel_drops
    assert caplog.messages == []
