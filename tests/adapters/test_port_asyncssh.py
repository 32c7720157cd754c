"""asyncssh's TUN and TAP forwarding with the transport of docs/ports/."""

from __future__ import annotations

import asyncio
import socket

import asyncssh
import pytest
from support.ports import port

import linkrx
from linkrx.kernel.namespace import bring_up
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("devices")

TUNNELS = port("asyncio_tunnels")
PACKETS = 200


class Server(asyncssh.SSHServer):  # type: ignore[misc, unused-ignore]
    """A server that accepts every user, and forwards to its own device."""

    def begin_auth(self, username: str) -> bool:
        """Require no authentication."""
        return False

    def tun_requested(self, unit: int | None) -> bool:
        """Accept a TUN tunnel."""
        return True

    def tap_requested(self, unit: int | None) -> bool:
        """Accept a TAP tunnel."""
        return True


@pytest.mark.parametrize("kind", ["tun", "tap"])
def test_forwarding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets pass through the SSH connection, each once and in order, in both directions, also after a link was down."""
    monkeypatch.setattr(asyncssh.tuntap, "SSHLinuxTunTapTransport", TUNNELS.TunTapTransport)
    head = b"\x45" if kind == "tun" else LOCAL + REMOTE + b"\x88\xb5"
    frames = [head + number.to_bytes(4, "big") + bytes(100) for number in range(PACKETS)]

    async def through(sender: str, receiver: str) -> None:
        """Assert that packets sent on one device arrive on the other."""
        with injector_on(sender) as injector, linkrx.open(receiver, backend="recvmmsg") as rx:
            for frame in frames:
                injector.send(frame)
            seen: list[bytes] = []
            async with asyncio.timeout(PATIENCE):
                async for packet in rx:
                    if packet[: len(head)] == head:
                        seen.append(bytes(packet))
                    if len(seen) == PACKETS:
                        break
            assert seen == frames

    async def work() -> None:
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.listen("127.0.0.1", 0, server_factory=Server, server_host_keys=[key])
        client = await asyncssh.connect("127.0.0.1", server.get_port(), known_hosts=None, config=None)
        forward = client.forward_tun if kind == "tun" else client.forward_tap
        async with server, client, await forward(61, 62):
            async with asyncio.timeout(PATIENCE):
                while {f"{kind}61", f"{kind}62"} > {one.name for one in linkrx.interfaces()}:
                    await asyncio.sleep(0)
            devices = [Device(f"{kind}{unit}") for unit in (61, 62)]
            for device in devices:
                await asyncio.to_thread(device.set_up)
            await through(f"{kind}61", f"{kind}62")
            await through(f"{kind}62", f"{kind}61")
            await asyncio.to_thread(devices[0].set_down)
            await asyncio.to_thread(devices[0].set_up)
            await through(f"{kind}61", f"{kind}62")

    with socket.socket() as used:
        bring_up("lo", used)
    asyncio.run(work())
