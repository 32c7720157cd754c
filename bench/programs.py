"""Measures programs with their own receive path and on linkrx: `python bench/programs.py [--write docs/ports.md] [PROGRAM...]`.

It needs `pip install linkrx[ports]`, and pymobiledevice3 for its row. Missing programs are left out. Each program runs in a process
of its own, on a device of its own. It gets a stream of 2,000 packets per second for two seconds, 4,000 packets while the process is
stopped, twenty packets after its link was down and up, and the deletion of its device. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from report import write
from results import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.dhcp import frame, request
from support.ports import port

from linkrx.kernel.namespace import enter_private_network
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import veth

ROUNDS = 3
RATE, SECONDS = 2_000, 2.0
BURST = 4_000
AFTER_FLAP = 20
QUIET = 0.7  # seconds without a packet, after which no more are expected
TICK = 0.005
AFTER_DELETION = 1.0
HERE = Path(__file__).parent
TUN = "tun71"


@dataclass
class Program:
    """A program, the variants to run, the packets that it is sent, and the source code that the ports replace."""

    title: str
    module: str
    ways: dict[str, Callable[[], str]]
    sent: bytes
    source: str = "veth"


def source_of(*names: str) -> Callable[[], str]:
    """The Python source of these members, each given as `module:name`."""

    def read() -> str:
        parts = []
        for name in names:
            module, _, member = name.partition(":")
            found: Any = import_module(module)
            for part in filter(None, member.split(".")):
                found = getattr(found, part)
            parts.append(textwrap.dedent(inspect.getsource(found)))
        return "\n".join(parts)

    return read


def text_of(name: str, *members: str) -> Callable[[], str]:
    """The source of docs/ports/NAME.py, or of members in it."""
    return lambda: "\n".join(
        inspect.getsource(getattr(port(name), one) if one else port(name)) for one in members
    )


def lines_of(read: Callable[[], str]) -> str:
    """The number of lines as `ast.unparse` writes them, without comments and docstrings."""
    try:
        tree = ast.parse(read())
    except ImportError:
        return "-"
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1 and isinstance(body[0], ast.Expr):
            del body[0]  # a docstring
    return str(sum(bool(line.strip()) for line in ast.unparse(tree).splitlines()))


def ping() -> bytes:
    """An ICMP echo request to PyTCP."""
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + bytes(256)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0) + bytes(
        [10, 9, 0, 1, 10, 9, 0, 2]
    )
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return bytes.fromhex("020000000001") + bytes.fromhex("020000000009") + b"\x08\x00" + head + body


UDP = frame(1000, 53, bytes(256), "10.0.0.1")
PROGRAMS = {
    "scapy": Program(
        "scapy `sniff`",
        "scapy",
        {
            "own": source_of("scapy.arch.linux:L2Socket", "scapy.supersocket:SuperSocket._recv_raw"),
            "linkrx": source_of("linkrx.adapters.scapy:L2Socket", "linkrx.adapters.scapy:_layer"),
        },
        UDP,
    ),
    "ptf": Program(
        "ptf, a port",
        "ptf",
        {
            "own": source_of("ptf.dataplane:DataPlanePortLinux", "ptf.afpacket"),
            "linkrx": text_of("ptf_linkrx", "LinkrxPort"),
        },
        UDP,
    ),
    "pytcp": Program(
        "PyTCP, pings",
        "pytcp",
        {
            "own": source_of("pytcp.subsystems.rx_ring", "pytcp.subsystems.tx_ring"),
            "linkrx": text_of("pytcp_rings", ""),
        },
        ping(),
        "tap",
    ),
    "aiodhcpwatcher": Program(
        "aiodhcpwatcher",
        "aiodhcpwatcher",
        {
            "own": source_of("aiodhcpwatcher"),
            "linkrx": lambda: "conf.L2listen = L2ListenSocket",
            "linkrx, without scapy": text_of("dhcp_watcher", ""),
        },
        request(),
    ),
    "asyncssh": Program(
        "asyncssh, TUN",
        "asyncssh",
        {
            "own": source_of("asyncssh.tuntap:SSHLinuxTunTapTransport"),
            "linkrx": text_of("asyncio_tunnels", "TunTapTransport"),
        },
        UDP[14:],
        "tun",
    ),
    "pymobiledevice3": Program(
        "pymobiledevice3, TUN",
        "pymobiledevice3",
        {
            "own": source_of(
                "pymobiledevice3.remote.tunnel_service:RemotePairingTunnel._tun_read_loop_via_reader"
            ),
            "linkrx": text_of("asyncio_tunnels", "read_loop"),
        },
        UDP[14:],
        "tun",
    ),
}


@dataclass
class Round:
    """The measurements of one process."""

    stream: float  # fraction of the stream that was received
    cpu: float  # microseconds of processor time per packet received
    burst: int
    flap: int
    busy: float  # fraction of a processor, in the second after the device was deleted
    receives: bool  # whether it still receives after that


@contextmanager
def device_for(program: Program) -> Iterator[tuple[str, str | None]]:
    """Make a device. Yields its name and that of its other end."""
    if program.source == "veth":
        with veth() as (near, far):
            yield near, far
        return
    if program.source == "tun":
        yield TUN, None
        return
    with IPRoute() as route:
        route.link("add", ifname="tap71", kind="tuntap", mode="tap")
        index = route.link_lookup(ifname="tap71")[0]
        route.link("set", index=index, address="02:00:00:00:00:09", state="up")
        route.addr("add", index=index, address="10.9.0.1", prefixlen=24)
    yield "tap71", None


def measured(name: str, how: str) -> Round:
    """Measure one process on one device."""
    program = PROGRAMS[name]
    with device_for(program) as (near, far):
        command = [sys.executable, str(HERE / "ported.py"), name, how, near]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                while process.stdout.readline() not in ("ready\n", ""):
                    pass
                return of_process(program, process, near, far)
            finally:
                process.kill()


def of_process(program: Program, process: Any, near: str, far: str | None) -> Round:
    """Run all steps on a process."""

    def ask() -> tuple[int, float, bool]:
        process.stdin.write("\n")
        process.stdin.flush()
        packets, cpu, receives = process.stdout.readline().split()
        return int(packets), float(cpu), receives == "1"

    def settled(due: int) -> tuple[int, float, bool]:
        """Wait until `due` packets have come, or no more come."""
        found, since = ask(), time.monotonic()
        while found[0] < due and time.monotonic() < since + QUIET:
            time.sleep(0.05)
            now = ask()
            if now[0] != found[0]:
                since = time.monotonic()
            found = now
        return found

    device = Device(near, far)
    device.set_up()
    with injector_on(far or near) as injector:
        injector.setblocking(True)
        injector.send(program.sent)
        settled(1)
        before = ask()
        begin, sent = time.monotonic(), 0
        while sent < RATE * SECONDS:
            for _ in range(int(RATE * TICK)):
                injector.send(program.sent)
                sent += 1
            time.sleep(max(0.0, begin + sent / RATE - time.monotonic()))
        after = settled(before[0] + sent)
        received = after[0] - before[0]
        process.send_signal(signal.SIGSTOP)
        for _ in range(BURST):
            injector.send(program.sent)
        process.send_signal(signal.SIGCONT)
        burst = settled(after[0] + BURST)
        device.set_down()
        device.set_up()
        flapped = settled(burst[0] + 1) if burst[0] < after[0] + BURST else burst
        for _ in range(AFTER_FLAP):
            injector.send(program.sent)
        back = settled(flapped[0] + AFTER_FLAP)
        device.delete()
        time.sleep(0.1)
        gone, since = ask(), time.monotonic()
        time.sleep(AFTER_DELETION)
        end = ask()
        busy = (end[1] - gone[1]) / (time.monotonic() - since)
    cpu = (after[1] - before[1]) / max(received, 1) * 1e6
    return Round(received / sent, cpu, burst[0] - after[0], back[0] - flapped[0], busy, end[2])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}; all without"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", type=Path, help="write the table into this file")
    arguments = parser.parse_args()
    enter_private_network()
    wanted = [name for name in PROGRAMS if name in arguments.programs or not arguments.programs]
    left_out = [name for name in wanted if find_spec(PROGRAMS[name].module) is None]
    found: dict[tuple[str, str], list[Round]] = {
        (name, how): [] for name in wanted if name not in left_out for how in PROGRAMS[name].ways
    }
    for _ in range(arguments.rounds):
        for (name, how), rounds in found.items():
            rounds.append(measured(name, how))
            print(name, how, rounds[-1], file=sys.stderr)
    rows = []
    for (name, how), rounds in found.items():
        ended = {one.receives for one in rounds} == {False}
        rows.append(
            [
                PROGRAMS[name].title if how == "own" else "",
                how,
                lines_of(PROGRAMS[name].ways[how]),
                f"{statistics.median(one.stream for one in rounds):.1%}",
                f"{statistics.median(one.cpu for one in rounds):.0f}",
                f"{statistics.median(one.burst for one in rounds):,.0f}",
                f"{statistics.median(one.flap for one in rounds):.0f}",
                f"{'over' if ended else 'waits'}, {statistics.median(one.busy for one in rounds):.0%}",
            ]
        )
    head = [
        "program",
        "on",
        "lines",
        f"{RATE:,}/s: received",
        "CPU, us per packet",
        f"{BURST:,} at once: received",
    ]
    lines = table([*head, f"after a flap, of {AFTER_FLAP}", "after deletion, CPU"], rows)
    lines += [f"\nNot installed: {', '.join(left_out)}."] if left_out else []
    print("\n".join(lines))
    if arguments.write:
        write(arguments.write, {"programs": lines})


if __name__ == "__main__":
    main()
