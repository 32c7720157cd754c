"""Measures the targets of linkrx: `python bench/targets.py [--json FILE]`, in four to five minutes.

It prints Markdown: every target with its measured value, and the tables with the details. A target is met when the median of nine
interleaved rounds is within 3 % of it. --json writes every round, in the format of pytest-benchmark, which `report.py` reads too.
--from FILE measures nothing, and shows the results in such a file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from results import Facts, Lines, Results, figure, ns_of, quotient, table, why_not
from world import RATES, SAID, WORK_SIZES, kept_table, lone_table, paced_table, work_table

TOLERANCE = 1.03
HERE = Path(__file__).parent
FILES = (
    "test_lone.py",
    "test_paced.py",
    "test_work.py",
    "test_kept.py",
    "test_peers.py",
    "test_super_packets.py",
    "test_sending.py",
    "test_capture_files.py",
)
LEFT_OUT = ("--deselect", str(HERE / "test_peers.py::test_unix"))  # it has no target
RING_WORK = {  # how many times as fast as pcapy-ng's dispatch
    "nothing": 1.8,
    "len": 1.6,
    "one byte": 1.5,
    "bytes": 0.9,
    "tobytes": 1.1,
    "headers, data": 1.0,
    "headers, index": 1.3,
    "keep": 1.0,
}
GVISOR = {
    "tap": {"gVisor, readv": "linkrx readv, deliver"},
    "packet": {"gVisor, recvmmsg": "linkrx recvmmsg, deliver"},
    "interface": {
        "gVisor, mmap": "linkrx packet_mmap, deliver",
    },
}


@dataclass
class Target:
    """One target: a bound, and the measured value, or two values at 64 and at 1514 bytes."""

    what: str
    wanted: float
    least: bool = False  # whether the bound is a minimum; else it is a maximum
    reached: list[float | None] = field(default_factory=list)
    why: str = "not measured"  # the reason if there is no value

    def met(self) -> str:
        """Whether all measured values meet the bound."""
        found = [value for value in self.reached if value is not None]
        if not found:
            return ""
        held = [
            value * TOLERANCE >= self.wanted if self.least else value <= self.wanted * TOLERANCE
            for value in found
        ]
        return "yes" if all(held) and len(found) == len(self.reached) else "no"

    def row(self) -> list[str]:
        """The row of the table."""
        bound = f"at {'least' if self.least else 'most'} {self.wanted:g}"
        found = [figure(value) or "-" for value in self.reached if self.met()]
        return [self.what, bound, "; ".join(found) or self.why, self.met() or "-"]


def lone(results: Results) -> Iterator[Target]:
    """Targets for a packet that comes alone."""
    facts = results.one("test_lone", source="tap")
    for backend, most in (("readv", 0.8), ("os_readv", 4)):
        for way in ("dispatch", "recv", "next"):
            ratio = quotient(facts, f"{way}, {backend}", "os.read")
            yield Target(f"lone packet on TAP, `{backend}`: `{way}` / by hand", most, reached=[ratio])


def paced(results: Results) -> Iterator[Target]:
    """Targets for paced streams."""
    streams = {rate: results.one("test_paced", rate=rate) for rate in RATES}
    for rate, facts in streams.items():
        ratio = quotient(facts, "run, readv", "poll, os.read")
        yield Target(f"TAP, {rate:,} packets/s, CPU: `run` / `poll`, `os.read`", 0.9, reached=[ratio])
    held = streams[50_000]
    ratio = quotient(held, "run, latency=0.0005", "poll, os.read")
    yield Target(
        "the same at 50,000, `latency=0.0005`",
        0.35,
        reached=[ratio],
        why=why_not(held, "run, latency=0.0005"),
    )
    for rate in (5_000, 50_000):
        for way in ("add_reader, drain", "async for"):
            ratio = quotient(streams[rate], way, "add_reader, os.read")
            what = f"asyncio, {rate:,} packets/s, CPU: {way} / `add_reader`, `os.read`"
            yield Target(what, 1.05, reached=[ratio])


def work(results: Results) -> Iterator[Target]:
    """Targets for work in `deliver`."""
    for source, peer, title in (
        ("ring", "pcapy-ng dispatch", "ring: times as fast as pcapy-ng, 64 and 1514 B"),
        ("tap", "os.read", "TAP: linkrx / `os.read`, 64 and 1514 B"),
    ):
        for name, least in RING_WORK.items():
            cells = [results.one("test_work", source=source, work=name, size=size) for size in WORK_SIZES]
            pair = ("linkrx", peer) if source == "tap" else (peer, "linkrx")
            yield Target(
                f"{title}: {SAID[name]}",
                1.0 if source == "tap" else least,
                least=source == "ring",
                reached=[quotient(facts, *pair) for facts in cells],
                why=why_not(cells[0], "linkrx"),
            )


def full_queues(results: Results) -> Iterator[Target]:
    """Targets for full queues."""
    tap = [results.one("test_tap", size=size) for size in WORK_SIZES]
    packet = [results.one("test_packet", size=size) for size in WORK_SIZES]
    interface = [results.one("test_interface", size=size) for size in WORK_SIZES]

    def both(cells: list[Facts | None], name: str, other: str) -> list[float | None]:
        return [quotient(facts, name, other) for facts in cells]

    sizes = "64 and 1514 B"
    columns, byte = "linkrx packet_mmap, columns", "linkrx packet_mmap, columns and a byte of each"
    yield Target(
        f"TAP, `readv`, `batches()` / C loop, {sizes}",
        1.03,
        reached=both(tap, "linkrx readv, columns", "C floor"),
    )
    yield Target(
        f"TAP, `readv`, `deliver` / C loop, {sizes}",
        1.25,
        reached=both(tap, "linkrx readv, deliver", "C floor"),
    )
    yield Target(
        f"packet socket, `recvmmsg`, `batches()` / C loop, {sizes}",
        1.05,
        reached=both(packet, "linkrx recvmmsg, columns", "C floor"),
    )
    ours, walk = ns_of(interface[0], columns), ns_of(interface[0], "C floor")
    yield Target("ring, columns less C walk, ns, 64 B", 30, reached=[ours - walk if ours and walk else None])
    yield Target(
        "pcapy-ng `next_batch` / ring, columns, 1514 B",
        5,
        least=True,
        reached=[quotient(interface[1], "pcapy-ng next_batch", columns)],
        why=why_not(interface[1], "pcapy-ng next_batch"),
    )
    yield Target(
        f"the same, and a byte of each, {sizes}",
        1,
        least=True,
        reached=both(interface, "pcapy-ng next_batch and a byte of each", byte),
        why=why_not(interface[0], "pcapy-ng next_batch and a byte of each"),
    )
    for cells, pairs in ((tap, GVISOR["tap"]), (packet, GVISOR["packet"]), (interface, GVISOR["interface"])):
        for go, deliver in pairs.items():
            yield Target(
                f"{go} / {deliver}, {sizes}",
                1,
                least=True,
                reached=both(cells, go, deliver),
                why=why_not(cells[0], go),
            )


def super_packets(results: Results) -> Iterator[Target]:
    """Targets for super-packets."""
    for what, least, kernel, segment in (
        ("super-packets: by the kernel / `segment=True`", 5, "kernel", "segment"),
        ("the same, both with `deliver`", 2.5, "kernel, deliver", "segment, deliver"),
    ):
        for facts in results.of("test_super_packets"):
            ratio = quotient(facts, kernel, segment)
            yield Target(f"{what}, {facts['transport']}", least, least=True, reached=[ratio])


def kept(results: Results) -> Iterator[Target]:
    """Targets for memory."""
    tap = {size: results.one("test_kept", source="tap", size=size) for size in WORK_SIZES}
    for size, facts in tap.items():
        found = facts["kept"] if facts else {}
        ratio = found["all"] / found["bytes"] if found else None
        yield Target(f"memory of kept packets / of their `bytes`, {size} B", 2.2, reached=[ratio])
    for size, facts in tap.items():
        found = facts["kept"] if facts else {}
        yield Target(
            f"memory of one kept packet of many, bytes, {size} B",
            size + 256,
            reached=[found["one in 512"] if found else None],
        )


def sending(results: Results) -> Iterator[Target]:
    """Targets for sending."""
    for source, by_hand, title in (
        ("packet", "socket.send", "packet socket"),
        ("tap", "os.write", "TAP"),
    ):
        cells = [results.one("test_sending", source=source, size=size) for size in WORK_SIZES]
        yield Target(
            f"{title}: `send` / `{by_hand}`, 64 and 1514 B",
            1.0,
            reached=[quotient(facts, "send", by_hand) for facts in cells],
        )
    cells = [results.one("test_sending", source="packet", size=size) for size in WORK_SIZES]
    for other, most in (("socket.send", 0.6), ("C floor", 1.15)):
        what = "C loop of sendmmsg()" if other == "C floor" else f"`{other}`"
        yield Target(
            f"packet socket: `send_batch` / {what}, 64 and 1514 B",
            most,
            reached=[quotient(facts, "send_batch", other) for facts in cells],
        )


def capture_files(results: Results) -> Iterator[Target]:
    """Targets for capture files."""
    reads = [results.one("test_read", size=size) for size in WORK_SIZES]
    writes = [results.one("test_write", size=size) for size in WORK_SIZES]
    for what, least, ours, theirs in (
        ("columns", 3, "linkrx, columns", "pcapy-ng, nothing"),
        ("`deliver`, a byte of each", 1.3, "linkrx, byte", "pcapy-ng, byte"),
    ):
        yield Target(
            f"capture file, {what}: times as fast as pcapy-ng, 64 and 1514 B",
            least,
            least=True,
            reached=[quotient(facts, theirs, ours) for facts in reads],
            why=why_not(reads[0], theirs),
        )
    yield Target(
        "writing pcapng from batches / `tcpdump -w`, CPU, 64 and 1514 B",
        1.2,
        reached=[quotient(facts, "linkrx, PcapWriter", "tcpdump -w") for facts in writes],
        why=why_not(writes[0], "tcpdump -w"),
    )


def elsewhere(results: Results) -> Iterator[Target]:
    """Targets that are measured elsewhere, because they take longer."""
    yield Target("memory after ten million packets / before", 1, why="`bench/soak.py` asserts it")
    yield Target("the README's test command, minutes", 3, why="run it")


GROUPS = (lone, paced, work, full_queues, super_packets, kept, sending, capture_files, elsewhere)


def targets_table(results: Results) -> Lines:
    """Every target, its measured value, and whether it is met."""
    rows = [target.row() for group in GROUPS for target in group(results)]
    return table(["target", "", "reached", "met"], rows)


def measure(file: Path) -> None:
    """Run the benchmarks of the targets."""
    names = [str(HERE / name) for name in FILES]
    # Their output goes to standard error, because standard output is the table.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *names, *LEFT_OUT, f"--benchmark-json={file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=HERE.parent,
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise SystemExit("a benchmark failed, see above: nothing is shown")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every round to this file")
    parser.add_argument("--from", type=Path, dest="measured", help="show this file; measure nothing")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = asked.measured or (asked.json and asked.json.absolute()) or Path(folder, "measured.json")
        if not asked.measured:
            measure(file)
        results = Results([file])
    print(*(f"{machine}." for machine in results.machines), sep="\n")
    tables = [targets_table, lone_table, paced_table, kept_table]
    for lines in (
        *(make(results) for make in tables),
        *(work_table(results, source) for source in ("ring", "tap", "packet")),
    ):
        print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
