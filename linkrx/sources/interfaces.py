"""The interfaces of this network namespace."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from linkrx.kernel.rtnetlink import RouteSocket


@dataclass(frozen=True)
class Interface:
    """A network interface, as it was when `interfaces()` was called.

    * `linkrx.open` takes `name` and each of `alternative_names`.
    * `index` is the `Packet.interface` of its packets.
    * `up`: the interface is set up (IFF_UP). `state` is its operational state as `ip link` shows it: "up", "down",
      "lowerlayerdown", "dormant" and so on, or "unknown" for devices that report none, such as `lo` and some TAP devices.
    * `mtu` is in bytes, without the link header.
    * `address` is the link address. It is empty if there is none.
    * `link_type` is ARPHRD_* of linux/if_arp.h, 1 for Ethernet.
    """

    name: str
    alternative_names: tuple[str, ...]
    index: int
    up: bool
    state: str
    mtu: int | None
    address: bytes
    link_type: int


def interfaces() -> tuple[Interface, ...]:
    """All interfaces of this thread's network namespace, ordered by index. Needs no privilege. Raises the kernel's OSError."""
    with closing(RouteSocket()) as route:
        links = route.links()
    return tuple(
        Interface(
            name=link.name,
            alternative_names=link.alternative_names,
            index=link.index,
            up=link.up,
            state=link.state,
            mtu=link.mtu,
            address=link.address,
            link_type=link.hardware_type,
        )
        for link in sorted(links, key=lambda link: link.index)
    )
