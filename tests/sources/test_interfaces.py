"""linkrx.interfaces() lists the interfaces."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess

import pytest

import linkrx
from linkrx.kernel.rtnetlink import RouteSocket
from linkrx.testing.devices import Device
from linkrx.testing.rigs import veth
from linkrx.testing.waiting import until

pytestmark = pytest.mark.usefixtures("devices")
MANY = 300  # more than fit into one netlink message


def of(name: str) -> linkrx.Interface:
    """The interface of that name."""
    (found,) = [one for one in linkrx.interfaces() if one.name == name]
    return found


def test_every_interface_is_listed() -> None:
    """Names, indices, states, MTUs, addresses and link types are correct, in order of the index."""
    with veth() as (near, far), linkrx.TunTap(mode="tun") as tun:
        Device(far).set_down()
        until(lambda: of(near).state != "up")  # which a worker of the kernel changes: net/core/link_watch.c
        found = linkrx.interfaces()
        assert [(one.index, one.name) for one in found] == sorted(socket.if_nameindex())
        by_name = {one.name: one for one in found}
        assert by_name["lo"].link_type == 772
        assert by_name["lo"].address == bytes(6)
        one = by_name[near]
        assert (one.mtu, one.link_type, one.up, one.state) == (65_535, 1, True, "lowerlayerdown")
        assert len(one.address) == 6
        assert not by_name[far].up
        assert by_name[far].state == "down"
        assert by_name[tun.name].link_type == 0xFFFE
        assert by_name[tun.name].address == b""
        with linkrx.open(near) as rx:
            assert rx.capabilities.ifindex == one.index


def test_alternative_names() -> None:
    """Every alternative name is listed, also long ones and names that are not UTF-8."""
    from pyroute2 import IPRoute

    with veth() as (near, _), IPRoute() as route:
        assert of(near).alternative_names == ()
        for name in ("short", "x" * 127):
            route.link("property_add", index=of(near).index, altname=name)
        assert set(of(near).alternative_names) == {"short", "x" * 127}


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip, of iproute2")
def test_the_same_as_ip_link() -> None:
    """State, MTU and address are the same as in `ip -j link`."""
    with veth():
        shown = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
        found = {one.name: one for one in linkrx.interfaces()}
        assert {line["ifname"] for line in shown} == set(found)
        for line in shown:
            one = found[line["ifname"]]
            assert (one.state.upper(), one.mtu, one.up) == (
                line["operstate"],
                line["mtu"],
                "UP" in line["flags"],
            )
            assert one.address.hex(":") == line.get("address", "")


def test_more_than_one_answer_holds() -> None:
    """Hundreds of interfaces are listed, each once."""
    taps = [linkrx.TunTap() for _ in range(MANY)]
    try:
        names = [one.name for one in linkrx.interfaces()]
        assert len(names) == len(set(names))
        assert {tap.name for tap in taps} <= set(names)
    finally:
        for tap in taps:
            tap.close()


def test_a_late_answer_is_not_taken_for_this_one() -> None:
    """The answer to an earlier request whose caller has gone is skipped."""
    route = RouteSocket()
    try:
        route._ask(bytes(16))  # the answer is not read
        assert {link.name for link in route.links()} == {one.name for one in linkrx.interfaces()}
    finally:
        route.close()
