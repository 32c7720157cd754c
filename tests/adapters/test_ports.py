"""The ports of docs/ports/ that need no other program: the DHCP watcher, the asyncio tunnels, and ptf's port class."""

from __future__ import annotations

import asyncio
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dhcp import frame, request
from support.paths import ROOT
from support.ports import port

import linkrx
from linkrx.testing import rigs
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, Rig
from linkrx.testing.waiting import PATIENCE, until

pytestmark = pytest.mark.usefixtures("devices")

WATCHER = port("dhcp_watcher")
TUNNELS = port("asyncio_tunnels")
PTF = port("ptf_linkrx")


async def soon(condition: Callable[[], object]) -> None:
    """Let the event loop run until a condition is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


# The DHCP watcher.


def packet_of(sent: bytes) -> linkrx.Packet:
    """The packet that linkrx receives for a frame."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, linkrx.open(near) as rx:
        far.send(sent)
        return rx.recv(PATIENCE)


def test_the_watcher_reads_requests() -> None:
    """A request has the requested address, or the client's address for a renewal, the host name and the link address."""
    wanted = WATCHER.DHCPRequest
    assert WATCHER.parse(packet_of(request())) == wanted("10.0.0.9", "phone", REMOTE.hex(":"))
    renewal = request(wanted=None, source="10.0.0.8", hostname="gerät".encode("idna"))
    assert WATCHER.parse(packet_of(renewal)) == wanted("10.0.0.8", "gerät", REMOTE.hex(":"))
    assert WATCHER.parse(packet_of(request(hostname=b"\xc3\xa4\xff"))).hostname == "ä\ufffd"
    assert WATCHER.parse(packet_of(request(kind=1))) is None
    assert WATCHER.parse(packet_of(request().replace(b"\x63\x82\x53\x63", b"\x63\x82\x53\x64"))) is None


@given(st.integers(14, 400), st.binary(max_size=100))
def test_the_watcher_survives_malformed_frames(cut: int, behind: bytes) -> None:
    """parse() raises no exception for frames that are cut or have bytes appended."""
    WATCHER.parse(packet_of(request()[:cut] + behind))


@pytest.mark.parametrize("named", [True, False], ids=["by index", "all interfaces"])
def test_the_watcher_watches(named: bool) -> None:
    """The watcher reports requests on two interfaces, also after each was down, and none after it was stopped."""
    seen: list[Any] = []

    async def watch(ends: list[Rig]) -> None:
        indexes = [rig.device.index for rig in ends if rig.device] if named else None
        stop = await WATCHER.async_start(seen.append, indexes)
        for number, rig in enumerate(ends):
            rig.send(frame(9, 9, bytes(300)))
            rig.send(request(wanted=f"10.0.0.{number}"))
        await soon(lambda: {"10.0.0.0", "10.0.0.1"} <= addresses())
        for number, rig in enumerate(ends):
            assert rig.device is not None
            await asyncio.to_thread(rig.device.set_down)  # pyroute2 runs its own event loop
            await asyncio.to_thread(rig.device.set_up)
            rig.send(request(wanted=f"10.0.1.{number}"))
        await soon(lambda: {"10.0.1.0", "10.0.1.1"} <= addresses())
        stop()
        before = len(seen)
        ends[0].send(request(wanted="10.0.2.0"))
        await asyncio.sleep(0)
        assert len(seen) == before

    def addresses() -> set[str]:
        return {one.ip_address for one in seen}

    with rigs.interface() as one, rigs.interface() as other:
        asyncio.run(watch([one, other]))


def test_the_watcher_as_a_program() -> None:
    """As a program, the watcher prints requests."""
    program = ROOT / "docs" / "ports" / "dhcp_watcher.py"
    with (
        rigs.interface() as rig,
        subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            while not select.select([process.stdout], [], [], 0.01)[0]:  # until it receives
                assert process.poll() is None
                rig.send(request())
            line = process.stdout.readline()
        finally:
            process.kill()
    assert line == f"DHCPRequest(ip_address='10.0.0.9', hostname='phone', mac_address='{REMOTE.hex(':')}')\n"


# The asyncio tunnels.


class Received(asyncio.Protocol):
    """A protocol that keeps the packets of a transport."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.lost: list[Exception | None] = []

    def data_received(self, data: bytes) -> None:
        """Keep a packet."""
        self.packets.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the device was deleted."""
        self.lost.append(exc)


@pytest.mark.parametrize("mode", [1, 2], ids=["tun", "tap"])
def test_the_transport(mode: int) -> None:
    """The transport receives each packet once and in order, writes packets, loses none in a pause, and reports the end once."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        transport = TUNNELS.TunTapTransport(loop, mode, 60 + mode)
        name = transport.get_extra_info("interface")
        assert name == {1: "tun61", 2: "tap62"}[mode]
        received = Received()
        transport.set_protocol(received)
        transport.resume_reading()
        assert transport.is_reading()
        head = LOCAL + REMOTE + b"\x88\xb5" if mode == 2 else b"\x45"
        with injector_on(name) as injector:
            device = Device(name)
            await asyncio.to_thread(device.set_up)
            frames = [head + number.to_bytes(4, "big") + bytes(60) for number in range(200)]

            def ours() -> list[bytes]:
                return [packet for packet in received.packets if packet.startswith(head)]

            for one in frames[:100]:
                injector.send(one)
            await soon(lambda: len(ours()) >= 100)
            transport.pause_reading()
            assert not transport.is_reading()
            for one in frames[100:]:
                injector.send(one)
            await asyncio.sleep(0)
            assert len(ours()) == 100
            transport.resume_reading()
            await soon(lambda: len(ours()) >= 200)
            assert ours() == frames
            with linkrx.open(name) as seen:
                transport.write(frames[0])
                assert frames[0] in (bytes(packet) for packet in iter(lambda: seen.recv(PATIENCE), None))
            await asyncio.to_thread(device.set_down)
            transport.write(frames[0])  # this packet is lost
            await asyncio.to_thread(device.set_up)
            injector.send(frames[0])
            await soon(lambda: len(ours()) == 201)
            await asyncio.to_thread(device.delete)
        await soon(lambda: received.lost)
        assert received.lost == [None]
        assert not transport.is_reading()
        transport.close()
        transport.close()
        assert transport.is_closing()

    asyncio.run(work())


def test_the_read_loop() -> None:
    """The read loop forwards each packet of a TUN device once and in order, without packet information, and ends with the device."""

    async def work(rig: Rig) -> None:
        sent: list[bytes] = []

        async def send(packet: bytes) -> None:
            sent.append(packet)
            await asyncio.sleep(0)

        tunnel: Any = SimpleNamespace(tun=rig.source, send_packet_to_device=send)
        task = asyncio.create_task(TUNNELS.read_loop(tunnel, 1500))
        frames = [rig.frame(60, number) for number in range(100)]
        for one in frames:
            rig.send(one)
        await soon(lambda: len(sent) >= 100)
        assert [one for one in sent if one in frames] == frames
        assert rig.device is not None
        await asyncio.to_thread(rig.device.delete)
        await asyncio.wait_for(task, PATIENCE)

    with rigs.tun() as rig:
        asyncio.run(work(rig))


# ptf's port class.


def test_the_port_class() -> None:
    """A port sends and receives frames of any size with their tags, also after down and up, and is not readable after deletion."""
    with rigs.interface() as rig, ExitStack() as stack:
        name = str(rig.source)
        ours, far = (
            PTF.LinkrxPort(one, 0, number) for number, one in ((3, name), (4, name.replace("n", "f")))
        )
        for one in (ours, far):
            stack.callback(one.rx.close)
        assert ours.mac() == next(i.address.hex(":") for i in linkrx.interfaces() if i.name == name)
        tagged = LOCAL + REMOTE + bytes.fromhex("810000050800") + bytes(60)
        for sent in (rig.frame(60), rig.frame(9000), tagged):
            assert far.send(sent) == len(sent)
            device, number, got, when = until_ready(ours)
            assert (device, number, got) == (0, 3, sent)
            assert when > 1.7e9
            assert ours.send(sent) == len(sent)
            assert until_ready(far)[2] == sent
        ours.down()
        with pytest.raises(OSError, match="down"):
            ours.send(rig.frame(60))
        ours.up()
        assert rig.device is not None
        rig.device.wait_for_carrier()
        far.send(rig.frame(60, 9))
        assert until_ready(ours)[2] == rig.frame(60, 9)
        rig.device.delete()
        until(lambda: ours.rx.end is not None or (select.select([ours], [], [], 0)[0] and ours.recv()))
        assert ours.recv() is None
        assert not select.select([ours], [], [], 0)[0]


def until_ready(one: Any) -> Any:
    """The next frame that a port receives, as ptf gets it."""
    while True:
        assert select.select([one], [], [], PATIENCE)[0]
        got = one.recv()
        if got is not None:
            return got


def test_the_platform() -> None:
    """The platform gives ptf the interfaces of the command line, and the port class."""
    config: dict[str, Any] = {"interfaces": [(0, 1, "veth0"), (0, 2, "veth2")]}
    PTF.platform_config_update(config)
    assert config["port_map"] == {(0, 1): "veth0", (0, 2): "veth2"}
    assert config["dataplane"] == {"portclass": PTF.LinkrxPort}


def test_every_port_is_in_the_document() -> None:
    """docs/ports.md links to each program of docs/ports/."""
    text = (ROOT / "docs" / "ports.md").read_text()
    for path in (ROOT / "docs" / "ports").glob("*.py"):
        assert f"(ports/{path.name})" in text
