"""Interfaces by whatever name: alternative ones, ones that are no UTF-8, ones that change."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from pyroute2 import IPRoute
from support.run import that_take

import linkrx
from linkrx.kernel.uapi import ALTIFNAMSIZ
from linkrx.sources import source
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

pytestmark = pytest.mark.usefixtures("devices")
backends = pytest.mark.parametrize("backend", that_take("packet"))
FRAME = LOCAL + REMOTE + b"\x88\xb5 named"


def receives(name: str, far: str, backend: str) -> linkrx.Capabilities:
    """One frame comes through it."""
    with linkrx.open(name, backend=backend) as rx, injector_on(far) as injector:
        injector.send(FRAME)
        assert bytes(rx.recv(10)) == FRAME
        return rx.capabilities


@backends
@pytest.mark.parametrize("size", [3, 15, 16, 17, ALTIFNAMSIZ - 1])
def test_alternative_names(backend: str, size: int) -> None:
    """An interface is opened by an alternative name of any length that the kernel takes."""
    name = ("alternative-name-" * 8)[:size]
    with veth() as (near, far):
        index = socket.if_nametoindex(near)
        with IPRoute() as route:
            route.link("property_add", index=index, altname=name)
        found = receives(name, far, backend)
        assert (found.interface, found.ifindex) == (name, index)


@backends
def test_a_name_that_is_no_text(backend: str) -> None:
    """A name is bytes: one that is no UTF-8 comes as os.fsdecode() makes it, and goes back the same way.

    Python's own sockets cannot read it, so os_readv refuses with that reason.
    """
    with veth() as (near, far):
        device = Device(near, far)
        device.set_down()
        subprocess.run([b"ip", b"link", b"set", near.encode(), b"name", b"l\xff\xe9x0"], check=True)
        name = os.fsdecode(b"l\xff\xe9x0")
        subprocess.run([b"ip", b"link", b"set", b"l\xff\xe9x0", b"up"], check=True)
        device.wait_for_carrier()
        try:
            if backend == "os_readv":
                with pytest.raises(
                    linkrx.UnsupportedSource, match="Python reads the name of the interface as UTF-8"
                ):
                    linkrx.open(name, backend=backend)
            else:
                assert receives(name, far, backend).interface == name
        finally:
            subprocess.run([b"ip", b"link", b"set", b"l\xff\xe9x0", b"name", near.encode()], check=False)


def test_a_name_that_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name is another interface's by the time of bind(2), it is still the one that was probed that is received from."""
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
    """A name that no interface has is refused as such, a longer one than the kernel knows as no name."""
    for name in ("nowhere0", "n" * 16, "n" * 127):
        with pytest.raises(linkrx.UnsupportedSource, match="No such device"):
            linkrx.open(name)
    with pytest.raises(linkrx.UnsupportedSource, match="cannot be the name of an interface"):
        linkrx.open("n" * 128)
