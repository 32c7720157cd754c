"""PyTCP with the rings of docs/ports/."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyroute2 import IPRoute
from support.paths import ROOT

from linkrx.cli.responder import ECHO_REQUEST, Echo
from linkrx.testing.devices import Device
from linkrx.testing.waiting import PATIENCE, patiently

pytestmark = pytest.mark.usefixtures("devices")

NAME, OURS, THEIRS = "lrxp0", "10.9.0.1", "10.9.0.2"

# A host: PyTCP answers ARP and ping, and this program answers UDP and TCP.
HOST = f"""
import sys, threading
sys.path.insert(0, {str(ROOT / "docs" / "ports")!r})
from pytcp import TcpIpStack, config
from pytcp.lib import socket
config.LOG_CHANEL = set()
import pytcp_rings
ring = pytcp_rings.use_linkrx()
stack = TcpIpStack(interface={NAME!r}, ip4_address="{THEIRS}/24", ip6_address="fe80::7/64")
stack.start()

ready = threading.Semaphore(0)

def udp():
    server = socket.socket(socket.AF_INET4, socket.SOCK_DGRAM)
    server.bind(("{THEIRS}", 7))
    ready.release()
    while True:
        message, sender = server.recvfrom()
        server.sendto(message, sender)

def tcp():
    server = socket.socket(socket.AF_INET4, socket.SOCK_STREAM)
    server.bind(("{THEIRS}", 7))
    server.listen()
    ready.release()
    while True:
        connection, _ = server.accept()
        while data := connection.recv():
            connection.send(data)
        connection.close()

for serve in (udp, tcp):
    threading.Thread(target=serve, daemon=True).start()
    ready.acquire()
print("up", flush=True)
sys.stdin.readline()
stats = ring.rx.stats()
stack.stop()
print(stats.packets, stats.sent, flush=True)
"""


@contextmanager
def host() -> Iterator[subprocess.Popen[str]]:
    """Run the program, which is reachable at THEIRS. A line on its standard input ends it."""
    with IPRoute() as route:
        route.link("add", ifname=NAME, kind="tuntap", mode="tap")
        try:
            route.addr("add", index=socket.if_nametoindex(NAME), address=OURS, prefixlen=24)
            Device(NAME).set(state="up")
            command = [sys.executable, "-c", HOST]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process:
                try:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "up\n"
                    yield process
                finally:
                    process.kill()
        finally:
            for index in route.link_lookup(ifname=NAME):
                route.link("del", index=index)


def ping(number: int) -> None:
    """Ping until there is an answer. Packets that are sent before the program sees its carrier are lost."""
    from ipaddress import IPv4Address

    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger:
        pinger.connect((THEIRS, 0))
        pinger.settimeout(1)
        asked = Echo(IPv4Address(OURS), IPv4Address(THEIRS), ECHO_REQUEST, 7, number, bytes(100))

        def answered() -> bool:
            try:
                pinger.send(asked.message())
                return Echo.parse(pinger.recv(2000)) == asked.reply()
            except OSError:
                return False

        for _ in patiently(answered):
            pass


def test_a_host() -> None:
    """The host answers pings, UDP (in fragments too) and TCP, also after the link was down, and ends when it is stopped."""
    with host() as process:
        ping(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((THEIRS, 7))
            udp.settimeout(PATIENCE)
            for size in (1, 1000, 5000):
                message = random.Random(size).randbytes(size)
                udp.send(message)
                assert udp.recv(10_000) == message
        with socket.create_connection((THEIRS, 7), PATIENCE) as tcp:
            sent = random.Random(7).randbytes(20_000)
            tcp.sendall(sent)
            with tcp.makefile("rb") as answers:
                assert answers.read(len(sent)) == sent
        device = Device(NAME)
        device.set_down()
        device.set_up()
        ping(2)
        output, _ = process.communicate("\n", PATIENCE)
        packets, answers_sent = map(int, output.split())
        assert packets > 20
        assert answers_sent > 20
        assert process.returncode == 0


def test_the_device_is_deleted() -> None:
    """After the device was deleted, the host receives no packets, and ends when it is stopped."""
    with host() as process:
        ping(1)
        Device(NAME).delete()
        process.communicate("\n", PATIENCE)
        assert process.returncode == 0
