"""The interfaces of this network namespace."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from linkrx.kernel.rtnetlink import RouteSocket


@dataclass(frozen=True)
class Interface:
    """A network interface, as it was when `interfaces()` asked.

    `name` and each of `alternative_names` can be given to `linkrx.open`. `index` is `Packet.interface` of its packets. `up`:
    somebody has set it up; `state` is how it does, as `ip link` shows it ("up", "down", "lowerlayerdown", "dormant", ...;
    "unknown" of devices that do not tell, such as `lo` and TAPs). `mtu` in bytes, without link header; `address` is the link address,
    empty where there is none; `link_type` is ARPHRD_* of linux/if_arp.h, 1 for Ethernet.
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
    """All interfaces of this thread's network namespace, by index. Needs no privilege. Raises OSError."""
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
