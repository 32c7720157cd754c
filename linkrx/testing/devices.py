"""Changes of a network device: down and up, another name, another namespace, deletion.

Needs CAP_NET_ADMIN and a private network namespace: call `namespace.enter_private_network` first.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Any

from linkrx.kernel.namespace import bring_up

# Seconds to wait for a carrier. The kernel handles changes of carrier once a second: net/core/link_watch.c.
CARRIER_PATIENCE = 30.0


def injector_on(name: str) -> socket.socket:
    """A non-blocking socket that sends on the interface. It receives nothing (protocol 0)."""
    injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    injector.bind((name, 0))
    return injector


class Device:
    """A network device. With `peer`, the other end of a veth pair. For use in one thread."""

    def __init__(self, name: str, peer: str | None = None) -> None:
        self.index = socket.if_nametoindex(name)
        self._peer = socket.if_nametoindex(peer) if peer else None

    @property
    def name(self) -> str:
        """The current name."""
        return socket.if_indextoname(self.index)

    def set(self, **settings: Any) -> None:
        """Change settings, named as for `ip link set`."""
        with _route() as route:
            route.link("set", index=self.index, **settings)

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU of the device and of its peer, in bytes."""
        with _route() as route:
            for index in filter(None, (self.index, self._peer)):
                route.link("set", index=index, mtu=mtu)

    def set_down(self) -> None:
        """Set the device down. The peer stays up and loses its carrier."""
        self.set(state="down")

    def set_up(self) -> None:
        """Set the device up, and wait until the kernel sends on it and on its peer."""
        self.set(state="up")
        self.wait_for_carrier()

    def wait_for_carrier(self) -> None:
        """Wait until the kernel sends on the device and on its peer.

        A peer that was up gets its carrier when the device comes up, and its queueing discipline up to a second later from
        link_watch. Until then the kernel silently drops frames that are sent on it.
        """
        deadline = time.monotonic() + CARRIER_PATIENCE
        with _route() as route:
            for index in filter(None, (self.index, self._peer)):
                while route.get_links(index)[0].get("operstate") not in ("UP", "UNKNOWN"):
                    assert time.monotonic() < deadline, "the link did not come up"
                    os.sched_yield()

    def rename(self, name: str) -> None:
        """Rename the device. Before Linux 6.2 it must be down for that."""
        self.set_down()
        self.set(ifname=name)
        self.set_up()

    def move(self, namespace: int) -> None:
        """Move the device to the network namespace of a descriptor. It is down there."""
        self.set(net_ns_fd=namespace)

    def delete(self) -> None:
        """Delete the device, and with it its peer."""
        with _route() as route:
            route.link("del", index=self.index)


def delete_if_there(name: str) -> None:
    """Delete a device if it still exists. The kernel may delete it at the same time, with its namespace."""
    from pyroute2.netlink.exceptions import NetlinkError

    with _route() as route:
        for index in route.link_lookup(ifname=name):
            try:
                route.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise


def raised_injector(name: str) -> socket.socket:
    """Set an interface up, and make a socket that sends on it. For use inside another namespace."""
    injector = injector_on(name)
    bring_up(name, injector)
    # The socket was bound while the interface was down, which left ENETDOWN in SO_ERROR. Clear it.
    injector.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return injector


def _route() -> Any:
    from pyroute2 import IPRoute  # imported here: it takes half a second, and receiving does not need it

    return IPRoute()
