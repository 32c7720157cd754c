"""`linkrx dump -i`: live packets of interfaces, recordings, summaries, and missing privileges."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import captures
from support.command_line import PATIENCE, Capture, linkrx_command, run
from support.protocols import GOOD, ethernet, vlan

import linkrx
from linkrx import _core
from linkrx.cli.dump import ending_on_signals
from linkrx.testing import rigs
from linkrx.testing.devices import injector_on

needs_core = pytest.mark.skipif(_core.reason is not None, reason=f"takes the C core: {_core.reason}")
pytestmark = pytest.mark.usefixtures("devices")

UDP_LINE = "IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5"
SUMMARY = re.compile(
    r"(\d+) packets? captured\n(\d+) packets? received by filter\n(\d+) packets? dropped by kernel\n"
)

# linux/udp.h
UDP_SEGMENT = 103


@contextmanager
def pair() -> Iterator[tuple[str, socket.socket, socket.socket]]:
    """The near end of a veth pair, a socket whose frames come in on it, and a socket whose frames go out of it."""
    with rigs.veth() as (near, far), injector_on(far) as incoming, injector_on(near) as outgoing:
        yield near, incoming, outgoing


def summary(errors: str) -> tuple[int, int, int]:
    """The summary: captured, received by filter, dropped by kernel."""
    found = SUMMARY.search(errors)
    assert found, errors
    captured, received, dropped = map(int, found.groups())
    return captured, received, dropped


def test_lines_come_at_once_and_ctrl_c_ends_with_a_summary() -> None:
    """Each packet's line is written at once. Ctrl-C ends with tcpdump's summary and exit code 0."""
    with pair() as (near, incoming, _), Capture("-i", near, "-t", "ip and udp") as capture:
        for title in ("udp", "dns query"):
            incoming.send(GOOD[title])
            line = capture.line()
            assert line.startswith("IP 10.0.0.1.1")
        incoming.send(GOOD["arp request"])  # the filter rejects it
        code, output, errors = capture.end(signal.SIGINT)
    assert (code, output) == (0, "")
    assert summary(errors) == (2, 2, 0)
    assert capture.messages == [
        f"linkrx: listening on {near}, whole frames, backend {backend_of(near)}; Ctrl-C ends it\n"
    ]


def backend_of(name: str) -> str:
    """The backend that "auto" chooses, probed on `lo`, because the pair is deleted."""
    return linkrx.choose("lo", timestamps=True, outgoing=True, promiscuous=True).backend


@pytest.mark.parametrize("option", ["-t", "--json"])
def test_an_interface_whose_name_is_not_utf8(option: str) -> None:
    """Lines have a name that is not valid text as its bytes. JSON escapes it as Python decodes it."""
    name = b"l\xff\xe9x7"
    subprocess.run([b"ip", b"link", b"add", b"name", name, b"up", b"type", b"bridge"], check=True)
    try:
        with (
            linkrx.open(os.fsdecode(name)) as outgoing,
            Capture("-i", "any", option, "udp port 2000", PYTHONIOENCODING="utf-8:strict") as capture,
        ):
            outgoing.send(GOOD["udp"])
            assert capture.process.stdout is not None
            line = capture.process.stdout.readline()
    finally:
        subprocess.run([b"ip", b"link", b"del", name], check=True)
    if option == "--json":
        assert json.loads(line)["interface"] == os.fsdecode(name)
    else:
        assert line == name + b" Out " + UDP_LINE.encode() + b"\n"


def test_sigterm() -> None:
    """SIGTERM ends dump as Ctrl-C does."""
    with pair() as (near, incoming, _), Capture("-i", near, "udp") as capture:
        incoming.send(GOOD["udp"])
        assert UDP_LINE in capture.line()
        code, _, errors = capture.end(signal.SIGTERM)
    assert code == 0
    assert summary(errors) == (1, 1, 0)


def test_a_second_signal_ends_at_once() -> None:
    """The first Ctrl-C ends reception and lets dump finish, a second one interrupts it. The signal handlers are restored."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, linkrx.open(ours) as rx, ending_on_signals(rx, live=True) as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        assert list(rx) == []
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@needs_core
def test_directions() -> None:
    """-Q in and -Q out print incoming packets and packets that this host sent. The default is both, and JSON has the direction."""
    with pair() as (near, incoming, outgoing):
        for option, expected in ((("-Q", "in"), ["in"]), (("-Q", "out"), ["out"]), ((), ["in", "out"])):
            with Capture(
                "-i", near, "--json", "-c", str(len(expected)), *option, "ether proto 0x88b5"
            ) as capture:
                incoming.send(GOOD["unknown ethertype"])
                outgoing.send(GOOD["unknown ethertype"])
                code, output, errors = capture.end()
            assert code == 0
            assert sorted(json.loads(line)["direction"] for line in output.splitlines()) == expected
            assert summary(errors)[0] == len(expected)


@needs_core
def test_vlan_tags_and_super_packets() -> None:
    """A tag that the kernel took out is printed, and a frame that is longer than the MTU allows is marked."""
    with pair() as (near, incoming, _):
        with Capture("-i", near, "-t", "-c", "1", "vlan 9") as capture:
            incoming.send(vlan(GOOD["udp"], 9))
            assert capture.line() == f"vlan 9, p 0, {UDP_LINE}"
        configure(near)
        with (
            Capture("-i", near, "-t", "-c", "1", "udp port 2000") as capture,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
            sender.sendto(bytes(5000), ("10.9.0.2", 2000))
            assert capture.line().endswith("> 10.9.0.2.2000: UDP, length 5000 [super-packet]")


def configure(near: str) -> None:
    """Configure an address, the MTU of Ethernet, and a permanent neighbor."""
    from pyroute2 import IPRoute

    index = socket.if_nametoindex(near)
    with IPRoute() as route:
        route.link("set", index=index, mtu=1500)
        route.addr("add", index=index, address="10.9.0.1", prefixlen=24)
        route.neigh("add", dst="10.9.0.2", lladdr="02:00:00:00:00:02", ifindex=index, state=128)


@needs_core
def test_every_interface() -> None:
    """On `any` each line has the interface and the direction."""
    with pair() as (near, incoming, _), Capture("-i", "any", "-t", "-c", "2", "udp and port 2000") as capture:
        incoming.send(GOOD["udp"])
        code, output, errors = capture.end()
        assert code == 0
        assert near in output
    lines = sorted(output.splitlines())
    assert [re.sub(r"^lrx[nf]\d+ ", "", line) for line in lines] == [f"Out {UDP_LINE}", f"In  {UDP_LINE}"]
    assert summary(errors)[0] == 2


@needs_core
def test_snaplen() -> None:
    """-s keeps that many bytes of a frame. The line shows what these contain, and the true length."""
    with (
        pair() as (near, incoming, _),
        Capture("-i", near, "-s", "36", "--json", "-c", "1", "udp") as capture,
    ):
        assert "36 bytes of each frame" in capture.messages[0]
        incoming.send(GOOD["udp"])
        found = json.loads(capture.line())
    assert (found["length"], found["captured"], found["cut"]) == (47, 36, "udp")
    assert "source_port" not in found.get("udp", {})


@pytest.mark.parametrize("backend", ["packet_mmap", "recvmmsg", "readv", "os_readv"])
def test_every_backend(backend: str) -> None:
    """--backend uses that backend, and reports if it cannot give timestamps and outgoing frames."""
    info = next(one for one in linkrx.backends() if one.name == backend)
    if not info.supported:
        pytest.skip(f"{backend} is not available here: {info.reason}")
    with (
        pair() as (near, incoming, _),
        Capture("-i", near, "--backend", backend, "-c", "1", "udp") as capture,
    ):
        incoming.send(GOOD["udp"])
        code, output, errors = capture.end()
    assert f"backend {backend};" in capture.messages[0]
    assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{6}} {re.escape(UDP_LINE)}\n", output)
    assert code == 0
    assert ("has no kernel timestamps" in "".join(capture.messages) + errors) == (
        "timestamps" not in info.honours
    )
    done = linkrx_command("dump", "-i", "lo", "--backend", backend, "-Q", "out", "--duration", "0.01")
    assert done.returncode == (0 if "outgoing" in info.honours else 2), done.stderr


def test_duration() -> None:
    """--duration ends dump after that many seconds, with exit code 0 and the summary."""
    done = linkrx_command("dump", "-i", "lo", "--duration", "0.1")
    assert (done.returncode, done.stdout) == (0, "")
    assert summary(done.stderr) == (0, 0, 0)


@needs_core
def test_packets_after_the_last_one_are_counted() -> None:
    """-c ends after that many packets. Packets that waited at the end, more than a batch, count as received by filter, and not as captured."""
    with (
        pair() as (near, incoming, _),
        Capture("-i", near, "-t", "-c", "1", "--backend", "recvmmsg", "udp") as capture,
    ):
        capture.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, capture.process.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(200):
            incoming.send(GOOD["udp"])
        capture.process.send_signal(signal.SIGCONT)
        code, output, errors = capture.end()
    assert (code, output) == (0, UDP_LINE + "\n")
    assert summary(errors) == (1, 200, 0)


def test_not_promiscuous() -> None:
    """-p does not set promiscuous mode. Without it the interface is promiscuous while dump receives."""

    def promiscuity(name: str) -> int:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            return int(route.get_links(socket.if_nametoindex(name))[0].get("promiscuity"))

    with pair() as (near, _, _):
        for option, expected in (((), 1), (("-p",), 0)):
            with Capture("-i", near, *option) as capture:
                assert promiscuity(near) == expected
                assert capture.end(signal.SIGINT)[0] == 0
            assert promiscuity(near) == 0


def test_a_deleted_interface() -> None:
    """If the interface is deleted, dump says so after its summary, and exits with 1."""
    from pyroute2 import IPRoute

    with pair() as (near, _, _), Capture("-i", near) as capture:
        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(near))
        code, output, errors = capture.end()
    assert (code, output) == (1, "")
    assert errors.endswith(f"dropped by kernel\nlinkrx: {near} was deleted\n")


@needs_core
def test_recording(tmp_path: Path) -> None:
    """-w records packets with times and directions, which linkrx reads back, and the summary has their number."""
    path = tmp_path / "some.pcapng"
    with (
        pair() as (near, incoming, outgoing),
        Capture("-i", near, "-w", str(path), "-c", "2", "udp") as capture,
    ):
        incoming.send(GOOD["udp"])
        outgoing.send(GOOD["udp"])
        code, output, errors = capture.end()
    assert (code, output) == (0, "")
    assert summary(errors)[0] == 2
    found = captures.read(path)
    assert [one.data for one in found] == [GOOD["udp"]] * 2
    assert sorted(one.outgoing for one in found) == [False, True]


@needs_core
def test_recording_in_a_terminal(tmp_path: Path) -> None:
    """During a recording, a terminal shows one line with the current packets, bytes and drops."""
    path = tmp_path / "some.pcapng"
    ours, theirs = pty.openpty()
    with pair() as (near, incoming, _):
        process = subprocess.Popen(
            [sys.executable, "-m", "linkrx", "dump", "-i", near, "-w", str(path), "udp"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        try:
            shown = until(ours, "Ctrl-C ends it")
            for number in range(1, 4):
                incoming.send(GOOD["udp"])
                shown = until(ours, f"\r{number} packet", shown)
            until(ours, f"\r3 packets, {3 * 47} bytes, 0 dropped", shown)
            process.send_signal(signal.SIGINT)
            shown = until(ours, "dropped by kernel\r\n")
            assert summary(shown.replace("\r\n", "\n")) == (3, 3, 0)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def until(descriptor: int, wanted: str, shown: str = "") -> str:
    """Read a terminal until it shows a text."""
    deadline = time.monotonic() + PATIENCE
    while wanted not in shown:
        assert select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0], shown
        shown += os.read(descriptor, 65536).decode()
    return shown


def test_a_reader_that_goes_away() -> None:
    """If the reader closes the pipe, dump ends without an error and with exit code 0, even if no more packet comes."""
    with pair() as (near, incoming, _), Capture("-i", near, "udp") as capture:
        incoming.send(GOOD["udp"])
        assert UDP_LINE in capture.line()
        assert capture.process.stdout is not None
        capture.process.stdout.close()
        assert capture.process.stderr is not None
        assert capture.process.stderr.read() == b""
        assert capture.process.wait(PATIENCE) == 0


@needs_core
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("backend", ["packet_mmap", "recvmmsg"])
def test_a_slow_reader_loses_nothing_uncounted(backend: str, unbuffered: str) -> None:
    """While the output is not read, packets wait in the kernel or are dropped, and the summary counts each sent packet."""
    sent = 30_000
    frames = [ethernet(0x88B5, number.to_bytes(4, "big") + bytes(500)) for number in range(sent)]
    with (
        pair() as (near, incoming, _),
        Capture(
            "-i", near, "-x", "--backend", backend, "ether proto 0x88b5", PYTHONUNBUFFERED=unbuffered
        ) as capture,
    ):
        for frame in frames:
            try:
                incoming.send(frame)
            except (BlockingIOError, OSError):
                wait_for_room(incoming)
                incoming.send(frame)
        code, output, errors = capture.end(signal.SIGINT)
    assert code == 0
    captured, received, dropped = summary(errors)
    assert output.count("ethertype") == captured
    assert 0 < captured < sent
    assert received == sent
    assert dropped < sent


def wait_for_room(sender: socket.socket) -> None:
    """Wait until the socket accepts a frame again."""
    select.select([], [sender], [], PATIENCE)


@pytest.mark.parametrize("words", [(), ("udp", "port", "53"), ("-w", "some.pcap")])
def test_the_list_of_interfaces(words: tuple[str, ...]) -> None:
    """Without -i and -r, dump lists the interfaces and says what to type. An expression without them is wrong usage."""
    with rigs.veth() as (near, far):
        done = linkrx_command("dump", *words)
    assert done.returncode == (2 if words else 0)
    for name in ("lo", near, far):
        assert re.search(rf"^{name} +\S+", done.stdout, re.MULTILINE)
    assert "linkrx dump -i INTERFACE" in done.stdout
    assert ("give -i INTERFACE or -r FILE" in done.stderr) == bool(words)


UNPRIVILEGED = """
import ctypes, struct, sys
header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
assert ctypes.CDLL(None).capset(header, none) == 0
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_privilege() -> None:
    """Without CAP_NET_RAW the error names it and the narrowest way to get it, with exit code 1. The list needs no privilege."""
    done = run("-c", UNPRIVILEGED, "dump", "-i", "lo")
    assert (done.returncode, done.stdout) == (1, "")
    assert "CAP_NET_RAW" in done.stderr
    assert "setpriv" in done.stderr
    assert done.stderr.count("\n") == 1
    assert run("-c", UNPRIVILEGED, "dump").returncode == 0


def test_without_the_core() -> None:
    """Without the C core dump prints packets too."""
    program = """
import sys
sys.modules["linkrx._core._native"] = None
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    with (
        pair() as (near, incoming, _),
        Capture("-i", near, "-t", "-c", "1", "udp", program=("-c", program)) as capture,
    ):
        incoming.send(GOOD["udp"])
        assert capture.line() == UDP_LINE
        assert capture.end()[0] == 0
