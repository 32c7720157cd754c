"""Measures the lines per second that `linkrx dump -r FILE` writes into a file: `python bench/dump.py`.

The packets are of mixed kinds, most of them TCP: of 19, eleven of TCP (one over IPv6), four of UDP (one over IPv6, one with a
VLAN tag), a DNS query and its answer, ARP and ICMP. The file is in the page cache. The benchmark measures the time from the start of
the program to its end, and its processor time, user and system. `tcpdump -n` does the same in turn.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.captures import NANOSECONDS, Recorded, pcap
from support.protocols import GOOD

PACKETS = 500_000
ROUNDS = 5
KINDS = (
    *("tcp data",) * 5,
    *("tcp ack",) * 4,
    "tcp syn",
    "tcp over ipv6",
    *("udp",) * 2,
    "udp over ipv6",
    "vlan",
    "dns query",
    "dns answer",
    "arp request",
    "icmp echo request",
)


def main() -> None:
    """Print the medians."""
    linkrx = [sys.executable, "-m", "linkrx", "dump"]
    programs = {
        "linkrx dump": linkrx,
        "linkrx dump -e -v": [*linkrx, "-e", "-v"],
        "linkrx dump --json": [*linkrx, "--json"],
    }
    if shutil.which("tcpdump"):
        programs["tcpdump -n"] = ["tcpdump", "-n"]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        capture, out = Path(folder, "mixed.pcap"), Path(folder, "out")
        capture.write_bytes(pcap(mixed(), magic=NANOSECONDS))
        for _ in range(ROUNDS):
            for name, command in programs.items():
                took[name].append(timed([*command, "-r", str(capture)], out))
                with out.open("rb") as lines:
                    assert sum(1 for _ in lines) == PACKETS
    print(f"{PACKETS:,} packets, medians of {ROUNDS} rounds; load average {os.getloadavg()[0]:.1f}")
    print(f"{'':<20}  {'lines/s':>10}  {'lines/s of processor time':>26}")
    for name, rounds in took.items():
        wall, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:<20}  {PACKETS / wall:>10,.0f}  {PACKETS / busy:>26,.0f}")


def mixed() -> list[Recorded]:
    """The packets, in random order, some microseconds apart."""
    chosen = random.Random(1)
    frames = [GOOD[kind] for kind in chosen.choices(KINDS, k=PACKETS)]
    moment = 1_700_000_000_000_000_000
    packets = []
    for frame in frames:
        moment += chosen.randrange(20_000)
        packets.append(Recorded(frame, len(frame), moment))
    return packets


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds from start to end, and seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with out.open("wb") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
