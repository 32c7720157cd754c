"""Measures the cost of a filter, and the processor time that it saves: `python bench/filters.py`.

First it measures linkrx's own filter, in classification, on frames in the cache: `udp port 53` on frames that it accepts and on two
kinds that it rejects. Then it measures the processor time of a DHCP watcher on a veth with 20,000 other packets per second, which
reports twenty requests per second: linkrx with the filter and without, and aiodhcpwatcher if it is installed.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
import time
from typing import Any

from linkrx import _core
from linkrx.kernel.namespace import enter_private_network
from linkrx.memory.columns import ROW_BYTES, Descriptors
from linkrx.memory.counters import new_counters
from linkrx.packets import Owner
from linkrx.sources import filters
from linkrx.sources.capabilities import Capabilities
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

ROUNDS = 9
ROWS = 512
REPEATS = 200
TAP = Capabilities("tap", socket=False, largest_frame=65_664, ethernet=True)

WATCHED_SECONDS = 4.0
WATCH_ROUNDS = 3
TICK = 0.001  # seconds between bursts of the sender
BURST = 20
REQUEST_EVERY = 50  # ticks

WATCHERS = {
    "linkrx, filtered": """
async def watch():
    with linkrx.open(NAME, filter="udp and (port 67 or 68)") as rx:
        ready()
        async for packet in rx:
            udp = 14 + (packet[14] & 15) * 4
            dhcp = packet[udp + 8 :]
            if len(dhcp) >= 240 and dhcp[0] == 1:
                seen.append(dhcp[28:34].hex(":"))
""",
    "linkrx, all packets": """
async def watch():
    with linkrx.open(NAME) as rx:
        ready()
        async for packet in rx:
            if packet.protocol != 0x0800 or len(packet) < 34 or packet[23] != 17:
                continue
            udp = 14 + (packet[14] & 15) * 4
            if packet.u16(udp + 2) not in (67, 68):
                continue
            dhcp = packet[udp + 8 :]
            if len(dhcp) >= 240 and dhcp[0] == 1:
                seen.append(dhcp[28:34].hex(":"))
""",
    "aiodhcpwatcher": """
async def watch():
    import aiodhcpwatcher, socket
    await aiodhcpwatcher.async_init()
    stop = await aiodhcpwatcher.async_start(
        lambda request: seen.append(request.mac_address), [socket.if_nametoindex(NAME)]
    )
    ready()
    await asyncio.sleep(SECONDS)
    stop()
""",
}

AROUND = """
import asyncio, sys, time
NAME, SECONDS = sys.argv[1], float(sys.argv[2])
seen, began = [], []
def ready():
    began.append(time.process_time())
    print("ready", flush=True)
{imports}
{watch}
async def main():
    try:
        await asyncio.wait_for(watch(), SECONDS + {spare})
    except (TimeoutError, asyncio.TimeoutError):
        pass
asyncio.run(main())
print(time.process_time() - began[0], len(seen), flush=True)
"""


def udp(source: int, target: int, body: bytes) -> bytes:
    """An Ethernet frame from one UDP port to another."""
    size = 28 + len(body)
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, size, 1, 0, 64, 17, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    )
    return LOCAL + REMOTE + b"\x08\x00" + ip + struct.pack("!HHHH", source, target, 8 + len(body), 0) + body


def request() -> bytes:
    """A DHCP request of a client: RFC 2131."""
    head = struct.pack("!4B3I", 1, 1, 6, 0, 1, 0, 0).ljust(28, b"\0") + REMOTE
    options = b"\x63\x82\x53\x63\x35\x01\x03\x32\x04\x0a\x00\x00\x09\xff"
    return udp(68, 67, head.ljust(236, b"\0") + options + bytes(60))


def classification(frame: bytes, program: bytes) -> Any:
    """A function that classifies frames like this one, and returns nanoseconds per frame."""
    descriptors, arena, counters = (
        Descriptors(ROWS),
        Owner(ROWS * (len(frame) + ROW_BYTES) + 4096),
        new_counters(),
    )
    described = _core.new(
        "struct lrx_classifier *",
        descriptors=descriptors.address(),
        rows=ROWS,
        link_header=14,
        link_type=1,
        counters=_core.address(counters),
    )
    code = bytearray(program)
    if code:
        described.filter.program = _core.at("struct lrx_instruction *", _core.address(code))
    arena.view[arena.cursor : arena.cursor + len(frame)] = frame
    for row in range(ROWS):
        descriptors.columns.lengths[row] = len(frame)
    region, end = arena.address + arena.cursor, (len(frame) + 7) & ~7

    def measure() -> float:
        begin = time.perf_counter_ns()
        for _ in range(REPEATS):
            _core.lib.lrx_classify(described, region, ROWS, region + end)
        took = time.perf_counter_ns() - begin
        # The arrays are kept alive until here.
        assert (len(code), descriptors.rows, len(counters) > 0, arena.held) == (
            len(program),
            ROWS,
            True,
            False,
        )
        return took / REPEATS / ROWS

    return measure


def own_filter() -> None:
    """Nanoseconds that the filter adds to classification."""
    program = filters.compiled("udp port 53", TAP, ethernet=True).code
    frames = {
        "taken": udp(1000, 53, bytes(18)),
        "another port": udp(1000, 54, bytes(18)),
        "TCP": udp(1, 2, bytes(18))[:23] + b"\x06" + udp(1, 2, bytes(18))[24:],
    }
    print(
        "linkrx's own filter, `udp port 53`, ns per frame beyond classification (median of nine rounds, least, most):"
    )
    for name, frame in frames.items():
        bare, judged = classification(frame, b""), classification(frame, program)
        added = sorted(judged() - bare() for _ in range(ROUNDS))
        print(f"  {name:<14}{statistics.median(added):6.1f}{added[0]:7.1f}{added[-1]:7.1f}")


def watched(name: str, near: str, far: str) -> tuple[float, int, int]:
    """Seconds of processor time, requests reported, packets sent."""
    script = AROUND.format(
        imports="import linkrx" if name.startswith("linkrx") else "",
        watch=WATCHERS[name],
        spare=0 if name.startswith("linkrx") else 5,
    )
    other, asks, sent = udp(9, 9, bytes(470)), request(), 0
    command = [sys.executable, "-c", script, near, str(WATCHED_SECONDS)]
    with (
        injector_on(far) as injector,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        tick = 0
        while time.monotonic() < begin + WATCHED_SECONDS - 0.2:
            for _ in range(BURST):
                injector.send(other)
            sent += BURST
            tick += 1
            if tick % REQUEST_EVERY == 0:
                injector.send(asks)
            time.sleep(max(0.0, begin + tick * TICK - time.monotonic()))
        took, seen = process.stdout.readline().split()
    return float(took), int(seen), sent


def main() -> None:
    """Print both measurements."""
    own_filter()
    enter_private_network()
    try:
        import aiodhcpwatcher  # noqa: F401
    except ImportError:
        del WATCHERS["aiodhcpwatcher"]
        print("aiodhcpwatcher is not installed: left out")
    print(
        f"a DHCP watcher, processor time of {WATCHED_SECONDS:.0f} s, ms (rounds; requests reported; other packets per second):"
    )
    with veth() as (near, far):
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in WATCHERS}
        for _ in range(WATCH_ROUNDS):
            for name, rounds in found.items():
                rounds.append(watched(name, near, far))
    for name, rounds in found.items():
        times = [took * 1000 for took, _, _ in rounds]
        seen, rate = [seen for _, seen, _ in rounds], rounds[0][2] / WATCHED_SECONDS
        print(
            f"  {name:<22}{statistics.median(times):8.0f}  ({', '.join(f'{one:.0f}' for one in times)}; {seen}; {rate:.0f})"
        )


if __name__ == "__main__":
    main()
