"""Interface names: alternative names, names that are not UTF-8, and names that change."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from pyroute2 import IPRoute
from support.run import that_take

import linkrx
from linkrx.kernel.uapi import ALTIFNAMSIZ, ETH_P_ALL
from linkrx.sources import source
from linkrx.testing import rigs
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

pytestmark = pytest.mark.usefixtures("devices")
backends = pytest.mark.parametrize("backend", that_take("packet"))
FRAME = LOCAL + REMOTE + b"\x88\xb5 named"
NO_TEXT = b"l\xff\xe9x0"  # Latin-1


def receives(name: str, far: str, backend: str) -> linkrx.Capabilities:
    """Assert that a dispatcher on this name receives a frame."""
    with linkrx.open(name, backend=backend) as rx, injector_on(far) as injector:
        injector.send(FRAME)
        assert bytes(rx.recv(10)) == FRAME
        return rx.capabilities


@contextmanager
def named(near: str, far: str, name: bytes) -> Iterator[None]:
    """An alternative name of one end of a pair."""
    device = Device(near, far)

    def rename(before: bytes, after: bytes) -> None:
        for change in ([b"down"], [b"name", after]):
            subprocess.run([b"ip", b"link", b"set", before, *change], check=True)
        subprocess.run([b"ip", b"link", b"set", after, b"up"], check=True)

    rename(near.encode(), name)
    device.wait_for_carrier()
    try:
        yield
    finally:
        rename(name, near.encode())


@backends
@pytest.mark.parametrize("size", [3, 15, 16, 17, ALTIFNAMSIZ - 1])
def test_alternative_names(backend: str, size: int) -> None:
    """An interface can be opened by an alternative name of any length that the kernel allows."""
    name = ("alternative-name-" * 8)[:size]
    with veth() as (near, far):
        index = socket.if_nametoindex(near)
        with IPRoute() as route:
            route.link("property_add", index=index, altname=name)
        found = receives(name, far, backend)
        assert (found.interface, found.ifindex) == (name, index)


@backends
def test_a_name_that_is_not_utf8(backend: str) -> None:
    """A name that is not UTF-8 is decoded by os.fsdecode() and encoded by os.fsencode()."""
    with veth() as (near, far), named(near, far, NO_TEXT):
        name = os.fsdecode(NO_TEXT)
        assert receives(name, far, backend).interface == name


@contextmanager
def every_packet(source: str, near: str) -> Iterator[Any]:
    """A source that receives from an interface, and may receive from others."""
    if source in ("any", "by name"):
        yield "any" if source == "any" else near
        return
    kind = socket.SOCK_DGRAM if source.startswith("cooked") else socket.SOCK_RAW
    with socket.socket(socket.AF_PACKET, kind, socket.htons(ETH_P_ALL)) as borrowed:
        if "unbound" not in source:
            borrowed.bind((near, ETH_P_ALL))
        yield borrowed


@backends
@pytest.mark.parametrize("source", ["any", "by name", "unbound", "bound", "cooked unbound", "cooked bound"])
def test_packets_of_an_interface_whose_name_is_not_utf8(backend: str, source: str) -> None:
    """If an interface's name is not UTF-8, also after open, no packet is lost, and each has its interface, sender and protocol."""
    with veth() as (near, far), every_packet(source, near) as given, injector_on(far) as injector:
        index = socket.if_nametoindex(near)
        with linkrx.open(given, backend=backend) as rx, named(near, far, NO_TEXT):
            got: list[linkrx.Packet] = []
            for _ in range(3):
                injector.send(FRAME)
            while len(got) < 3:
                got += [packet for packet in [rx.recv(10)] if packet.protocol == 0x88B5]
            metadata = {
                (packet.interface, packet.protocol, packet.remote, bytes(packet.data)) for packet in got
            }
            assert metadata == {(index, 0x88B5, FRAME[6:12], FRAME[14:])}
            assert rx.interface_name(index) == os.fsdecode(NO_TEXT)
            assert (rx.end, rx.stats().undelivered) == (None, 0)


def test_a_name_that_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another interface has the name at bind(2), the dispatcher still receives from the interface that was probed."""
    with veth() as (near, far), veth() as (other, _):
        bind = source._bind

        def swap(*arguments: object) -> None:
            for change in ((near, "swap0"), (other, near)):
                subprocess.run(["ip", "link", "set", change[0], "name", change[1]], check=True)
            bind(*arguments)  # type: ignore[arg-type]

        index = socket.if_nametoindex(near)
        monkeypatch.setattr(source, "_bind", swap)
        try:
            with linkrx.open(near) as rx, injector_on(far) as injector:
                injector.send(FRAME)
                packet = rx.recv(10)
                assert (bytes(packet), packet.interface) == (FRAME, index)
        finally:
            for change in ((near, other), ("swap0", near)):
                subprocess.run(["ip", "link", "set", change[0], "name", change[1]], check=False)


def test_no_such_name() -> None:
    """A name that no interface has is refused with ENODEV, and a name longer than any alternative name as invalid."""
    for name in ("nowhere0", "n" * 16, "n" * 127):
        with pytest.raises(linkrx.UnsupportedSource, match="No such device"):
            linkrx.open(name)
    for name in (
        "n" * 128,
        "n" * 300,
        "n" * 5000,
        "a\0b",
        "",
    ):  # the kernel refuses paths of more than 4,095 bytes, too
        with pytest.raises(linkrx.UnsupportedSource, match="cannot be the name of an interface"):
            linkrx.open(name)


@pytest.mark.parametrize(
    ("rig", "backend"),
    [
        pytest.param(rig, backend, id=f"{rig.__name__}-{backend}")
        for rig, kind in (
            (rigs.tap, "tap"),
            (rigs.tun, "tun"),
            (rigs.packet, "packet"),
            (rigs.interface, "packet"),
        )
        for backend in that_take(kind)
    ],
)
def test_a_renamed_interface_has_its_new_name(
    rig: Callable[[], AbstractContextManager[rigs.Rig]], backend: str
) -> None:
    """After a rename, repr, interface_name and errors have the new name. After the deletion they have the name at open."""
    with rig() as made, made.open(backend) as rx:
        device = made.device
        assert device is not None
        before, after = device.name, "renamed0"
        assert f" on {before}, open>" in repr(rx)
        device.rename(after)
        assert f" on {after}, open>" in repr(rx)
        assert [rx.interface_name(index) for index in (0, device.index)] == [after, after]
        device.set_down()
        with pytest.raises(OSError, match=rf" on {after}: the link is down; `ip link set {after} up`"):
            rx.send(made.frame(60))
        assert rx.capabilities.interface == before
        device.delete()
        assert f" on {before}, " in repr(rx)
        assert rx.interface_name(device.index) == before
