"""ptf's ports on linkrx: a platform for `ptf --platform-dir docs/ports --platform ptf_linkrx -i 0@veth0 -i 1@veth2 ...`.

Your own platform uses the port class with one line: `config["dataplane"] = {"portclass": LinkrxPort}`.
"""

from __future__ import annotations

import time
from typing import Any

from pyroute2 import IPRoute

import linkrx


class LinkrxPort:
    """One interface, with the methods of ptf's DataPlanePortIface and DataPlanePacketSourceIface."""

    def __init__(
        self,
        interface_name: str,
        device_number: int,
        port_number: int,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.interface_name = interface_name
        self.device_number = device_number
        self.port_number = port_number
        self.rx = linkrx.open(interface_name, backend="recvmmsg", promiscuous=True, timestamps=True)
        self._index = self.rx.capabilities.ifindex

    def __del__(self) -> None:
        if hasattr(self, "rx"):
            self.rx.close()

    def fileno(self) -> int:
        """The descriptor that ptf polls. It is not readable after the device was deleted, so ptf's loop waits for the other ports."""
        return self.rx.fileno()

    def get_packet_source(self) -> LinkrxPort:
        """The object that receives for this port: the port itself."""
        return self

    def recv(self) -> tuple[int, int, bytes, float] | None:
        """Device, port, the frame as it was on the wire, and its time. None if no frame is queued, or reception is over."""
        try:
            packet = self.rx.recv(0)
        except (TimeoutError, EOFError):
            return None
        when = packet.timestamp_ns / 1e9 if packet.timestamp_ns else time.time()
        return self.device_number, self.port_number, packet.tagged(), when

    def send(self, packet: bytes) -> int:
        """Send a frame. Returns its length in bytes. Raises OSError with the kernel's errno."""
        self.rx.send(packet)
        return len(packet)

    def down(self) -> None:
        """Take the link down."""
        self._set("down")

    def up(self) -> None:
        """Bring the link up."""
        self._set("up")

    def _set(self, state: str) -> None:
        with IPRoute() as route:
            route.link("set", index=self._index, state=state)

    def mac(self) -> str:
        """The address of the interface."""
        return next(one.address.hex(":") for one in linkrx.interfaces() if one.index == self._index)


def platform_config_update(config: dict[str, Any]) -> None:
    """Set the interfaces of the command line, and the port class above. ptf calls this function."""
    config["port_map"] = {(device, port): interface for device, port, interface in config["interfaces"]}
    config["dataplane"] = {"portclass": LinkrxPort}
