"""What can happen to the network device behind a rig: down and up, another name, another namespace, deletion.

Needs CAP_NET_ADMIN and a network namespace of one's own: `namespace.enter_private_network`.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Any

from linkrx.kernel.namespace import bring_up

# The kernel looks at changes of carrier once a second: net/core/link_watch.c.
CARRIER_PATIENCE = 30.0


def injector_on(name: str) -> socket.socket:
    """A socket that sends on the interface, never blocks, and receives nothing (protocol 0)."""
    injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    injector.bind((name, 0))
    return injector


class Device:
    """A network device, and the other end when it is one of a veth pair. To be used in one thread."""

    def __init__(self, name: str, peer: str | None = None) -> None:
        self.index = socket.if_nametoindex(name)
        self._peer = socket.if_nametoindex(peer) if peer else None

    @property
    def name(self) -> str:
        """What it is called now."""
        return socket.if_indextoname(self.index)

    def set(self, **settings: Any) -> None:
        """Change settings as `ip link set` names them."""
        with _route() as route:
            route.link("set", index=self.index, **settings)

    def set_mtu(self, mtu: int) -> None:
        """Of both ends."""
        with _route() as route:
            for index in filter(None, (self.index, self._peer)):
                route.link("set", index=index, mtu=mtu)

    def set_down(self) -> None:
        """Take it down; the other end stays up, and loses its carrier."""
        self.set(state="down")

    def set_up(self) -> None:
        """Bring it up, and wait until the kernel sends on it and on the other end."""
        self.set(state="up")
        self.wait_for_carrier()

    def wait_for_carrier(self) -> None:
        """Wait until the kernel sends on it and on the other end.

        The end of a pair that was up already gets its carrier with the one that comes up, and its queue from
        link_watch: it may take a second. Until then the kernel drops what is sent on it, and says nothing.
        """
        deadline = time.monotonic() + CARRIER_PATIENCE
        with _route() as route:
            for index in filter(None, (self.index, self._peer)):
                while route.get_links(index)[0].get("operstate") not in ("UP", "UNKNOWN"):
                    assert time.monotonic() < deadline, "the link did not come up"
                    os.sched_yield()

    def rename(self, name: str) -> None:
        """Give it another name. Only what is down can be renamed on older kernels."""
        self.set_down()
        self.set(ifname=name)
        self.set_up()

    def move(self, namespace: int) -> None:
        """Into the network namespace that a descriptor refers to, where it is down."""
        self.set(net_ns_fd=namespace)

    def delete(self) -> None:
        """It and the other end."""
        with _route() as route:
            route.link("del", index=self.index)


def delete_if_there(name: str) -> None:
    """Delete a device, unless there is none of that name any more: with a namespace its devices go, a little later."""
    from pyroute2.netlink.exceptions import NetlinkError

    with _route() as route:
        for index in route.link_lookup(ifname=name):
            try:
                route.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise


def raised_injector(name: str) -> socket.socket:
    """Bring an interface up, and make a socket that sends on it; for work inside another namespace."""
    injector = injector_on(name)
    bring_up(name, injector)
    # Binding to what was down has left an ENETDOWN behind.
    injector.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return injector


def _route() -> Any:
    from pyroute2 import IPRoute  # half a second to import, and of no use to those who only receive

    return IPRoute()
