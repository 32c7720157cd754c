"""Borrowed descriptors: their options are restored, and sockets that cannot be shared are refused with the reason."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest
from support.run import that_take

import linkrx
from linkrx.kernel.uapi import (
    ETH_P_ALL,
    PACKET_VERSION,
    SO_TIMESTAMP,
    SO_TIMESTAMP_NEW,
    SO_TIMESTAMPING_NEW,
    SO_TIMESTAMPNS,
    SO_TIMESTAMPNS_NEW,
    SOL_PACKET,
    UDP_GRO,
)
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

PACKET_RX_RING = 5  # linux/if_packet.h
FORMS = (SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMP_NEW, SO_TIMESTAMPNS_NEW)
packet_backends = pytest.mark.parametrize("backend", that_take("packet"))
udp_backends = pytest.mark.parametrize("backend", that_take("udp"))


def bound(name: str) -> socket.socket:
    """A bound packet socket."""
    borrowed = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    borrowed.bind((name, ETH_P_ALL))
    return borrowed


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize(
    "backend", [name for name in ("recvmmsg", "packet_mmap") if name in that_take("packet")]
)
def test_timestamp_options_come_back(backend: str, form: int | None) -> None:
    """After close the form of the timestamp option that the owner had set is set again, and no other."""
    with veth() as (near, _), bound(near) as borrowed:
        if form is not None:
            borrowed.setsockopt(socket.SOL_SOCKET, form, 1)
        before = [borrowed.getsockopt(socket.SOL_SOCKET, name) for name in FORMS]
        with linkrx.open(borrowed, backend=backend, timestamps=True):
            assert borrowed.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS) == 1
        assert [borrowed.getsockopt(socket.SOL_SOCKET, name) for name in FORMS] == before


@pytest.mark.usefixtures("devices")
def test_other_timestamps_stay_as_they_are() -> None:
    """After close SO_TIMESTAMPING in its newer form is unchanged, although it shares a bit with the other options."""
    with veth() as (near, _), bound(near) as borrowed:
        borrowed.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW, 1 << 4)
        before = borrowed.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW)
        assert before
        linkrx.open(borrowed, timestamps=True).close()
        assert borrowed.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW) == before


@udp_backends
def test_two_dispatchers_on_one_socket(backend: str) -> None:
    """A second dispatcher on one socket is refused with Busy, through any descriptor. After close the socket can be opened again."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as borrowed:
        with linkrx.open(borrowed, backend=backend):
            for other in (borrowed.fileno(), os.dup(borrowed.fileno())):
                with pytest.raises(
                    linkrx.Busy, match="another dispatcher of this process receives from the UDP socket"
                ):
                    linkrx.open(other, backend=backend)
                if other != borrowed.fileno():
                    os.close(other)
        linkrx.open(borrowed, backend=backend).close()


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", ["auto", *that_take("packet")])
def test_a_socket_with_a_ring(backend: str) -> None:
    """Every backend refuses a socket that has a ring, with that reason, and the socket keeps its ring."""
    with veth() as (near, _), bound(near) as borrowed:
        borrowed.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("=4I", 4096, 2, 2048, 4))
        for function in (linkrx.open, linkrx.choose):
            with pytest.raises(linkrx.UnsupportedSource, match="has a ring, such as libpcap makes"):
                function(borrowed, backend=backend)
        with pytest.raises(OSError, match="busy"):
            borrowed.setsockopt(SOL_PACKET, PACKET_VERSION, 0)


@udp_backends
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_datagrams_that_the_kernel_merges(backend: str, family: int) -> None:
    """A UDP socket with UDP_GRO is refused with a remedy, and accepted after the remedy."""
    with socket.socket(family, socket.SOCK_DGRAM) as borrowed:
        borrowed.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        with pytest.raises(linkrx.UnsupportedSource, match=r"setsockopt\(socket.IPPROTO_UDP, 104, 0\)"):
            linkrx.open(borrowed, backend=backend, ethernet=False)
        borrowed.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
        linkrx.open(borrowed, backend=backend, ethernet=False).close()


@pytest.mark.usefixtures("devices")
@packet_backends
@pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
def test_an_interface_that_was_deleted_before_open(backend: str, kind: int) -> None:
    """A dispatcher on a socket whose interface was deleted before open ends at once."""
    with veth() as (near, _), socket.socket(socket.AF_PACKET, kind, 0) as borrowed:
        borrowed.bind((near, ETH_P_ALL))
        Device(near).delete()
        with linkrx.open(borrowed, backend=backend) as rx:
            assert rx.end is linkrx.End.LINK_GONE
            with pytest.raises(linkrx.Ended) as caught:
                rx.recv()
            assert caught.value.errno == errno.ENODEV
            assert rx.capabilities.interface is None


@pytest.mark.usefixtures("devices")
@packet_backends
def test_a_number_that_is_another_sockets(backend: str) -> None:
    """If the owner closes its descriptor and another socket reuses the number, linkrx neither reads nor changes that socket."""
    with veth() as (near, far), injector_on(far) as injector, veth() as (other_near, other_far):
        borrowed = bound(near)
        number = borrowed.fileno()
        with linkrx.open(number, backend=backend) as rx:
            borrowed.close()
            with bound(other_near) as other, injector_on(other_far) as elsewhere:
                assert other.fileno() == number
                elsewhere.send(LOCAL + REMOTE + b"\x08\x00elsewhere")
                injector.send(LOCAL + REMOTE + b"\x08\x00here")
                assert bytes(rx.recv(10).data) == b"here"
                rx.close()
                assert other.recv(100)[14:] == b"elsewhere"
