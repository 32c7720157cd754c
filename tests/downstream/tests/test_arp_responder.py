"""The ARP responder on real TAP devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import arp_responder
import pytest
from arp_responder import ARP, FIXED, MAC, Responder

import linkrx
from linkrx.testing.network import Bridge, Network, Tap

ASKER = bytes.fromhex("02005e000001")


def request(wanted: str) -> bytes:
    """An ARP request of 10.0.0.1."""
    arp = ARP.pack(*FIXED, 1, ASKER, socket.inet_aton("10.0.0.1"), bytes(6), socket.inet_aton(wanted))
    return b"\xff" * 6 + ASKER + b"\x08\x06" + arp


def reply(address: str = "10.0.0.2") -> bytes:
    """The reply to `request`."""
    arp = ARP.pack(*FIXED, 2, MAC, socket.inet_aton(address), ASKER, socket.inet_aton("10.0.0.1"))
    return ASKER + MAC + b"\x08\x06" + arp


@pytest.fixture
def tap(linkrx_tap: Tap) -> Iterator[Tap]:
    """A TAP device whose queue the responder reads."""
    responder = Responder(linkrx_tap.queue, "10.0.0.2")
    thread = threading.Thread(target=responder.run)
    thread.start()
    yield linkrx_tap
    responder.stop()
    thread.join()


def test_it_answers(tap: Tap) -> None:
    """A request for the responder's address gets one reply, with its link address."""
    tap.inject(request("10.0.0.2"))
    tap.expect(reply())
    tap.expect_nothing()


def test_it_is_silent_for_others(tap: Tap) -> None:
    """Requests for other addresses, other protocols and short packets get no reply."""
    tap.inject([request("10.0.0.3"), request("10.0.0.2")[:30], b"\xff" * 12 + b"\x08\x00" + bytes(46)])
    tap.expect_nothing()


def test_it_answers_each(tap: Tap) -> None:
    """A hundred requests get a hundred replies."""
    tap.inject([request("10.0.0.2")] * 100)
    assert tap.collect(100) == [reply()] * 100


def test_it_survives_a_link_that_goes_down(tap: Tap) -> None:
    """The responder answers after its link was down."""
    tap.down()
    tap.up()
    tap.inject(request("10.0.0.2"))
    tap.expect(lambda packet: packet.remote == MAC)


def test_the_kernel_finds_it(tap: Tap) -> None:
    """The kernel learns the responder's link address from it, and then sends to it."""
    tap.add_address("10.0.0.1/24")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", ("10.0.0.2", 9))
    answer = tap.expect(lambda packet: packet.protocol == 0x0806)
    assert answer.remote == MAC
    assert answer.local == tap.mac


def test_as_a_process(linkrx_network: Network, linkrx_tap: Tap) -> None:
    """The responder runs in its own process, which opens the device by name. inject waits until it has opened it."""
    with subprocess.Popen([sys.executable, arp_responder.__file__, linkrx_tap.name, "10.0.0.2"]) as process:
        try:
            linkrx_tap.inject(request("10.0.0.2"), timeout=30)
            linkrx_tap.expect(reply(), timeout=30)
        finally:
            process.terminate()


def test_behind_a_switch(linkrx_bridge: Bridge, tap: Tap) -> None:
    """On a bridge, the port that sent the request gets the reply, and another port only the request."""
    linkrx_bridge.attach(tap)
    one, other = linkrx_bridge.port(), linkrx_bridge.port()
    one.inject(request("10.0.0.2"))
    one.expect(reply())
    other.expect(request("10.0.0.2"))
    other.expect_nothing()


def test_the_network_is_empty(linkrx_network: Network) -> None:
    """A test sees no device of another test."""
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    linkrx.TunTap("tap0").close()


def test_the_user_id() -> None:
    """Tests keep the user ID of the caller."""
    assert str(os.getuid()) == os.environ.get("EXPECTED_UID", str(os.getuid()))
