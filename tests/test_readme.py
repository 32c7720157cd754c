"""The programs in the README and docs/ run unchanged, and their links have targets."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from support.documents import DOCUMENTS, README, programs
from support.paths import ROOT, TESTS
from support.super_packets import Super

import linkrx
from linkrx import _core, errors, packets
from linkrx.cli.responder import ECHO_REQUEST, Echo
from linkrx.kernel.namespace import bring_up
from linkrx.kernel.uapi import PACKET_VNET_HDR, SOL_PACKET
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import patiently

# Programs with a title have their own test: below, or in testing/test_plugin.py for docs/testing.md.
TITLES = {"A DHCP watcher", "A host", "A recorder", "A tunnel", "Ctrl-C", "Fanout", "Super-packets"}
TITLES |= {"A first test", "A network", "Conformance", "Rigs"}
TITLES |= {"Record the ARP packets", "Record and read"}


def test_the_readme_is_short() -> None:
    """The README has 900 words at most, its code and tables included."""
    assert len(README.read_text().split()) <= 900


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, which is killed at the end, because a failing test would otherwise wait for it for ever."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def runs(process: subprocess.Popen[str]) -> bool:
    """Whether the process runs. Waits up to 2 ms for its end, and leaves the processor to it meanwhile."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.002)
    return process.returncode is None


def interrupted(process: subprocess.Popen[str], send: Callable[[], object]) -> int:
    """Press Ctrl-C, and return the exit status. `send` wakes the process.

    Python runs no handler of a signal that comes just before the system call that waits, until the call returns.
    """
    process.send_signal(signal.SIGINT)
    for _ in patiently(lambda: process.poll() is not None):
        with suppress(OSError):  # its device is gone
            send()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    return process.wait()


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links(document: Path) -> None:
    """Each relative link leads to an existing file, and to an existing heading."""
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_failure_matrix_names_existing_tests() -> None:
    """Each test in tests/README.md is in the file of its link."""
    named = re.findall(r"\[`(test_\w+)`\]\(([\w./]+\.py)\)", (TESTS / "README.md").read_text())
    assert len(named) > 80
    for name, file in named:
        assert f"def {name}(" in (TESTS / file).read_text(), (name, file)


def test_every_document_is_found() -> None:
    """Each file of docs/ can be reached from the README."""
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", README.read_text()))
    assert linked == {f"docs/{document.name}" for document in DOCUMENTS if document != README}


def names_of(kind: type) -> set[str]:
    """The public attributes of a class."""
    return {name for name in dir(kind) if name[0] != "_"}


COMPLETE = {
    "packets.md": names_of(packets.Packet) | names_of(packets.Batch),
    "receiving.md": {field.name for field in dataclasses.fields(linkrx.Stats)}
    | {f"End.{end.name}" for end in linkrx.End}
    | {name for name, kind in vars(errors).items() if inspect.isclass(kind)},
    "sources.md": {*linkrx.OpenOptions.__annotations__, "backend"},
    "": names_of(linkrx.Dispatcher),
}


@pytest.mark.skipif(_core.types is None, reason="the packet in plain Python has all attributes of bytes")
@pytest.mark.parametrize("document", COMPLETE)
def test_tables_are_complete(document: str) -> None:
    """Every attribute of a packet and a batch, counter, end, error, option and method of a dispatcher is in its document, as code."""
    text = "\n".join(path.read_text() for path in DOCUMENTS if document in path.name)
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    missing = {name for name in COMPLETE[document] if not re.search(rf"\b{re.escape(name)}\b", code)}
    assert not missing


def test_every_program_is_run() -> None:
    """Each program has a title that is tested here, or has no title and is run by test_the_other_programs."""
    titles = [re.match(r'"""(.*)\."""\n', program) for program in programs()]
    assert sorted(found[1] for found in titles if found) == sorted(TITLES)


@pytest.mark.usefixtures("devices")
def test_the_ten_line_program() -> None:
    """The program of the README has ten lines, receives ten packets from an interface, and ends."""
    (program,) = programs(README)
    assert len(program.splitlines()) == 10
    with veth() as (near, far), injector_on(far) as injector:
        assert program.count('"eth0"') == 1
        with started(
            [sys.executable, "-u", "-c", program.replace('"eth0"', repr(near))],
            env={**os.environ, "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
        ) as process:
            assert process.stdout is not None
            # It prints the choice after open, so frames are sent only then.
            explained = [process.stdout.readline() for _ in linkrx.backends()]
            for number in range(10):
                injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50 + number))
            rest = process.stdout.read().splitlines()
            assert process.wait(30) == 0
    assert any(" chosen " in line for line in explained)
    assert rest[:10] == [
        f"0x0800 02:00:00:00:00:02 > 02:00:00:00:00:01 {64 + number} bytes" for number in range(10)
    ]
    assert rest[10].startswith("End.STOPPED; dropped by the kernel: 0")


@pytest.mark.usefixtures("devices")
def test_the_other_programs() -> None:
    """Every other program runs to its end on an interface that receives frames."""
    others = [program for program in programs(*DOCUMENTS[1:]) if not program.startswith('"""')]
    assert others
    with veth() as (near, far), injector_on(far) as injector:
        for program in others:
            assert '"eth0"' in program
            with started(
                [sys.executable, "-c", program.replace('"eth0"', repr(near))],
                stderr=subprocess.STDOUT,
            ) as process:
                while runs(process):
                    injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50))
                assert process.stdout is not None
                assert process.returncode == 0, process.stdout.read()


def example(title: str, near: str) -> list[str]:
    """The command that runs the program of that title on an interface."""
    (program,) = [program for program in programs() if program.startswith(f'"""{title}."""')]
    assert program.count('"eth0"') == 1
    return [sys.executable, "-c", program.replace('"eth0"', repr(near))]


@pytest.mark.usefixtures("devices")
@pytest.mark.skipif(_core.reason is not None, reason=f"capture files take the C core: {_core.reason}")
def test_recording(tmp_path: Path) -> None:
    """The first program of capture-files.md records ten packets and reads them, and the second records the ARP packets of them."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        started(example("Record and read", near), cwd=tmp_path) as process,
    ):
        while runs(process):
            injector.send(LOCAL + REMOTE + b"\x08\x06" + bytes(46))
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        assert process.returncode == 0
    assert len(lines) == 11
    assert all(f" {near} <Packet 0x0806 " in line for line in lines[:-1])
    assert lines[-1] == "End.EOF"
    (program,) = [one for one in programs() if one.startswith('"""Record the ARP packets."""')]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    with linkrx.open(tmp_path / "arp.pcap") as rx:
        assert len(list(rx)) == 10


@pytest.mark.usefixtures("devices")
@pytest.mark.skipif(_core.reason is not None, reason=f"capture files take the C core: {_core.reason}")
def test_the_recorder(tmp_path: Path) -> None:
    """The recorder records the packets that its filter accepts, and says how many when Ctrl-C ends it."""
    file = tmp_path / "dns.pcapng"
    wanted = udp_packet(4321, 53, b"question")

    def send() -> None:
        injector.send(udp_packet(4321, 54, b"other"))
        injector.send(wanted)

    with (
        veth() as (near, far),
        injector_on(far) as injector,
        started(example("A recorder", near), cwd=tmp_path) as process,
    ):
        for _ in patiently(lambda: file.exists() and file.stat().st_size > 1000):
            assert process.poll() is None
            send()
        assert interrupted(process, send) == 0
        assert process.stdout is not None
        said = process.stdout.read()
    with linkrx.open(file) as rx:
        got = [bytes(packet) for packet in rx]
    assert set(got) == {wanted}
    assert said == f"{len(got)} packets, 0 dropped by the kernel\n"


def udp_packet(source: int, destination: int, body: bytes) -> bytes:
    """A frame with a UDP packet over IPv4, without checksums."""
    udp = struct.pack("!HHHH", source, destination, 8 + len(body), 0) + body
    addresses = socket.inet_aton("10.0.0.1") + socket.inet_aton("10.0.0.2")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    return LOCAL + REMOTE + b"\x08\x00" + ip + udp


def dhcp(op: int, address: str) -> bytes:
    """A DHCP message of a client (op 1) or of a server (op 2): RFC 2131."""
    head = struct.pack("!4B3I", op, 1, 6, 0, 1, 0, 0) + socket.inet_aton(address)
    return (head.ljust(28, b"\0") + REMOTE).ljust(300, b"\0")


@pytest.mark.usefixtures("devices")
def test_the_dhcp_watcher() -> None:
    """The DHCP watcher prints requests and assigned addresses, and nothing for other packets."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        started(example("A DHCP watcher", near)) as process,
    ):
        assert process.stdout is not None
        asks = udp_packet(68, 67, dhcp(1, "0.0.0.0"))
        reader, lines = process.stdout, []
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while not selector.select(0.01):  # until the program receives
                assert process.poll() is None
                injector.send(asks)
        injector.send(udp_packet(53, 53, bytes(300)))
        injector.send(udp_packet(67, 68, b"short"))
        injector.send(udp_packet(67, 68, dhcp(2, "10.0.0.9")))
        for line in reader:
            lines.append(line)
            if "gets" in line:
                break
        process.terminate()
    assert set(lines[:-1]) == {"02:00:00:00:00:02 asks\n"}
    assert lines[-1] == "02:00:00:00:00:02 gets 10.0.0.9\n"


@pytest.mark.usefixtures("devices")
def test_fanout() -> None:
    """In the fanout program each packet goes to one of the two processes, and both get some."""
    command = example("Fanout", "NEAR")
    assert command[-1].count("timeout=2") == 1  # one may be late by that, and then the other has ended
    command[-1] = command[-1].replace("timeout=2", "timeout=6")
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        started(
            [*command[:-1], command[-1].replace("NEAR", near)],
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # else lines of the two processes mix
        ) as process,
    ):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        for port in range(1000, 1200):
            injector.send(udp_packet(port, port, bytes(20)))
        output = [line.split() for line in process.stdout]
        assert process.wait(30) == 0
    assert len({pid for pid, *_ in output}) == 2, output
    received = [int(packets) for _, _, packets in output]
    assert sum(received) == 200
    assert all(received)


@pytest.mark.usefixtures("devices")
def test_fanout_ends_on_a_busy_network() -> None:
    """Both processes of the fanout program end under load, although the idle time never passes."""
    with veth() as (near, far), injector_on(far) as injector:
        command = example("Fanout", near)
        assert command[-1].count("time.monotonic() + 10") == 1
        command[-1] = command[-1].replace("time.monotonic() + 10", "time.monotonic() + 0.2")
        with started(command) as process:
            while process.poll() is None:
                for port in range(1000, 1100):
                    injector.send(udp_packet(port, port, bytes(20)))
            assert process.stdout is not None
            output = process.stdout.read()
        assert process.returncode == 0
    assert output.count("received") == 2


@pytest.mark.usefixtures("devices")
def test_super_packets() -> None:
    """The super-packets program prints the accepted offloads, and the frames of a super-packet."""
    (program,) = [program for program in programs() if program.startswith('"""Super-packets."""')]
    case = Super(payload=4000, size=1448)
    assert program.count("timeout=3") == 1
    with started([sys.executable, "-c", program.replace("timeout=3", "timeout=6")]) as process:
        assert process.stdout is not None
        assert "TSO4" in process.stdout.readline()
        Device("lrx0").set_up()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            sender.bind(("lrx0", 0))
            sender.send(case.vnet() + case.frame())
        lines = process.stdout.read().splitlines()
        assert process.wait(30) == 0
    # The kernel may send shorter packets, for neighbour discovery.
    words = [line.split() for line in lines]
    assert sum(int(line[0]) for line in words) >= 3
    assert max(int(line[3]) for line in words) == len(case.frames()[0]) == 1502


@pytest.mark.usefixtures("devices")
def test_ctrl_c() -> None:
    """With a handler that calls stop(), Ctrl-C ends the program without a traceback."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        started(example("Ctrl-C", near), stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.01):  # until the program receives
                assert process.poll() is None
                injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50))
        assert interrupted(process, lambda: injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50))) == 0
        *packets, end = process.stdout.read().splitlines()
    assert set(packets) == {"<Packet 0x0800 02:00:00:00:00:02 > 02:00:00:00:00:01 64 bytes>"}
    assert end == "End.STOPPED"


@pytest.mark.usefixtures("devices")
def test_the_host() -> None:
    """The host has at most thirty lines, answers ARP and ping, and prints the answered packets."""
    (program,) = [program for program in programs() if program.startswith('"""A host."""')]
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 30
    with (
        started([sys.executable, "-c", program]) as process,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger,
        IPRoute() as route,
    ):
        assert process.stdout is not None
        for _ in patiently(lambda: route.link_lookup(ifname="lrx0")):
            assert process.poll() is None
        route.addr("add", index=socket.if_nametoindex("lrx0"), address="10.9.0.1", prefixlen=24)
        Device("lrx0").set_up()
        pinger.connect(("10.9.0.2", 0))
        pinger.settimeout(30)
        pings = [
            Echo(
                IPv4Address("10.9.0.1"), IPv4Address("10.9.0.2"), ECHO_REQUEST, 7, number, bytes(number * 99)
            )
            for number in range(5)
        ]
        for ping in pings:
            pinger.send(ping.message())
            assert Echo.parse(pinger.recv(2000)) == ping.reply()
        lines = [process.stdout.readline()]
        answered: list[str] = []
        while len(answered) < len(pings):
            line = process.stdout.readline()
            answered += [line] if line.startswith("answered <Packet 0x0800 ") else []
    assert lines[0].startswith("answered <Packet 0x0806 ")
    assert [line.split()[-2] for line in answered] == [str(42 + number * 99) for number in range(5)]


@pytest.mark.usefixtures("devices")
def test_the_tunnel() -> None:
    """The tunnel sends packets of the device to the peer, and the peer's packets to the device, and Ctrl-C ends it."""
    (program,) = [program for program in programs() if program.startswith('"""A tunnel."""')]
    packet = udp_packet(1, 2, b"through the tunnel")[14:]
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as device,
    ):
        bring_up("lo", peer)
        peer.bind(("127.0.0.2", 4444))
        peer.settimeout(30)
        with started([sys.executable, "-c", program, "127.0.0.1", "127.0.0.2"]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            bring_up("lrx0", peer)
            device.bind(("lrx0", 0))
            with linkrx.open("lrx0") as seen:
                device.send(packet)
                # The kernel may send packets of its own.
                assert packet in iter(lambda: peer.recv(2000), None)
                peer.sendto(packet[:-1] + b"L", ("127.0.0.1", 4444))
                assert packet[:-1] + b"L" in (bytes(one) for one in iter(lambda: seen.recv(30), None))
            assert interrupted(process, lambda: device.send(packet)) == -signal.SIGINT
