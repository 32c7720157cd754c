"""aiodhcpwatcher on linkrx through scapy's sockets. The watcher of docs/ports/ finds the same requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiodhcpwatcher
import pytest
from scapy.config import conf
from scapy.layers.l2 import Ether
from support.dhcp import frame, request
from support.ports import port
from support.sniffing import scapy_uses_linkrx

import linkrx
from linkrx.adapters.scapy import L2ListenSocket
from linkrx.testing import rigs
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import PATIENCE

__all__ = ["scapy_uses_linkrx"]

pytestmark = pytest.mark.usefixtures("devices", "scapy_uses_linkrx")

WATCHER = port("dhcp_watcher")

SENT = {
    "request": request(),
    "renewal": request(wanted=None, source="10.0.0.8"),
    "discover": request(kind=1),
    "without a name": request(hostname=None),
    "international name": request(hostname="gerät".encode("idna")),
    "name in UTF-8": request(hostname="gerät".encode()),
    "name that is none": request(hostname=b"\xff\xfe"),
    "no DHCP": frame(67, 68, bytes(300)),
}


@pytest.mark.parametrize("name", SENT)
def test_the_same_requests(name: str) -> None:
    """Both watchers make the same request of each frame, or none."""
    theirs: list[Any] = []
    aiodhcpwatcher.make_packet_handler(theirs.append)(Ether(SENT[name]))
    with rigs.interface() as rig, linkrx.open(rig.source, filter=WATCHER.FILTER) as rx:
        rig.send(SENT[name])
        ours = WATCHER.parse(rx.recv(PATIENCE))
    fields = ("ip_address", "hostname", "mac_address")
    requests = [tuple(getattr(one, field) for field in fields) for one in [*theirs, ours] if one is not None]
    assert len(requests) in (0, 2)
    assert len(set(requests)) <= 1
    assert bool(requests) == (name not in ("discover", "no DHCP"))


def test_on_linkrx(monkeypatch: pytest.MonkeyPatch) -> None:
    """With conf.L2listen set, and no other change, aiodhcpwatcher finds every request, also after the link was down."""
    monkeypatch.setattr(conf, "sniff_promisc", conf.sniff_promisc)  # it sets this
    seen: list[str] = []

    async def soon(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0)

    async def watch(rig: Rig) -> None:
        assert rig.device is not None
        assert conf.L2listen is L2ListenSocket
        await aiodhcpwatcher.async_init()
        stop = await aiodhcpwatcher.async_start(
            lambda found: seen.append(found.ip_address), [rig.device.index]
        )
        for number in range(20):
            rig.send(request(wanted=f"10.0.0.{number}"))
        await soon(lambda: len(seen) == 20)
        await asyncio.to_thread(rig.device.set_down)
        await asyncio.to_thread(rig.device.set_up)
        for number in range(20):
            rig.send(request(wanted=f"10.0.1.{number}"))
        await soon(lambda: len(seen) == 40)
        stop()

    with rigs.interface() as rig:
        conf.ifaces.reload()  # the watcher asks scapy for the interface by its index
        asyncio.run(watch(rig))
    assert seen == [f"10.0.{times}.{number}" for times in (0, 1) for number in range(20)]
