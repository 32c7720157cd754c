"""Runs one program that receives, with its own receive path or on linkrx. bench/programs.py starts it.

    python bench/ported.py PROGRAM HOW INTERFACE

It prints "ready" when it receives. For each line on standard input it prints how many packets it has received, its processor time in
seconds, and whether it still receives.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.ports import port

seen: list[None] = []
over = threading.Event()


def count(_: object = None) -> None:
    """Count a packet."""
    seen.append(None)


def serve(packets: Callable[[], int], receives: Callable[[], bool]) -> None:
    """Answer each line until standard input ends."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(packets(), time.process_time(), int(receives()), flush=True)
    over.set()


async def serve_beside(receives: Callable[[], bool]) -> None:
    """Answer in a thread, while the event loop runs."""
    threading.Thread(target=serve, args=[seen.__len__, receives], daemon=True).start()
    await asyncio.get_running_loop().run_in_executor(None, over.wait)


def run_scapy(how: str, name: str) -> None:
    """scapy's sniff, with a filter and without storing packets."""
    import scapy.all
    from scapy.config import conf

    if how == "linkrx":
        from linkrx.adapters.scapy import L2ListenSocket

        conf.L2listen = L2ListenSocket
    started = threading.Event()
    sniffer = scapy.all.AsyncSniffer(
        iface=name, filter="udp", store=False, prn=count, started_callback=started.set
    )
    sniffer.start()
    started.wait()
    serve(seen.__len__, lambda: sniffer.running)


def run_ptf(how: str, name: str) -> None:
    """ptf's data plane, with one port and a queue that is long enough."""
    from ptf.dataplane import DataPlane

    config: dict[str, Any] = {"platform": "eth", "qlen": 10**6}
    if how == "linkrx":
        config["dataplane"] = {"portclass": port("ptf_linkrx").LinkrxPort}
    plane = DataPlane(config)
    plane.port_add(name, 0, 0)
    serve(lambda: plane.rx_counters[(0, 0)], plane.is_alive)


def run_pytcp(how: str, name: str) -> None:
    """PyTCP as a host that answers pings."""
    from pytcp import TcpIpStack, config
    from pytcp.lib import stack

    config.LOG_CHANEL = set()
    if how == "linkrx":
        port("pytcp_rings").use_linkrx()
    mac = "02:00:00:00:00:01"
    TcpIpStack(interface=name, mac_address=mac, ip4_address="10.9.0.2/24", ip6_address="fe80::7/64").start()
    statistics = stack.packet_handler.packet_stats_rx
    serve(lambda: statistics.icmp4__echo_request__respond_echo_reply, lambda: True)


def run_aiodhcpwatcher(how: str, name: str) -> None:
    """aiodhcpwatcher with scapy's socket or linkrx's, or the watcher of docs/ports."""

    async def watch() -> None:
        indexes = [socket.if_nametoindex(name)]
        if how == "linkrx, without scapy":
            await port("dhcp_watcher").async_start(count, indexes)
        else:
            import aiodhcpwatcher
            from scapy.config import conf

            await aiodhcpwatcher.async_init()
            if how == "linkrx":
                from linkrx.adapters.scapy import L2ListenSocket

                conf.L2listen = L2ListenSocket
            await aiodhcpwatcher.async_start(count, indexes)
        await serve_beside(lambda: True)

    asyncio.run(watch())


class Delivered(asyncio.Protocol):
    """The protocol that receives the packets of a transport."""

    lost = False

    def data_received(self, data: bytes) -> None:
        """Count a packet."""
        count()

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the device was deleted."""
        self.lost = True


def run_asyncssh(how: str, name: str) -> None:
    """asyncssh's transport of a TUN device."""
    from asyncssh import tuntap

    if how == "linkrx":
        vars(tuntap)["SSHLinuxTunTapTransport"] = port("asyncio_tunnels").TunTapTransport

    async def read() -> None:
        delivered = Delivered()
        tuntap.create_tuntap(lambda: delivered, 1, int(name.removeprefix("tun")))
        await serve_beside(lambda: not delivered.lost)

    asyncio.run(read())


def run_pymobiledevice3(how: str, name: str) -> None:
    """pymobiledevice3's loop that reads a TUN device."""
    import linkrx

    if how == "linkrx":
        loop = port("asyncio_tunnels").read_loop
    else:
        from pymobiledevice3.remote.tunnel_service import RemotePairingTunnel

        loop = RemotePairingTunnel._tun_read_loop_via_reader

    async def send(packet: bytes) -> None:
        count()

    async def read() -> None:
        with linkrx.TunTap(name, "tun") as tun:
            tunnel = SimpleNamespace(tun=tun, send_packet_to_device=send)
            task = asyncio.create_task(loop(tunnel, 1504))
            await asyncio.sleep(0)
            await serve_beside(lambda: not task.done())
            task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await task

    asyncio.run(read())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    program, way, interface = sys.argv[1:]
    globals()[f"run_{program}"](way, interface)
    os._exit(0)  # PyTCP's and ptf's threads never end
