"""Tables and a plot of what `pytest bench --benchmark-json=FILE` has measured.

    python bench/report.py FILE... [--svg bench/speed.svg] [--write README.md bench/README.md]

Prints Markdown. With --write, what stands in those files between `<!-- report: NAME -->` and `<!-- end -->` is replaced by
the table of that name. Of a benchmark that is in several FILEs the last counts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plot import Bar, Panel, number, svg

Facts = dict[str, Any]
Lines = list[str]

SIZES = (64, 576, 1514, 9014, 65535)
WAYS = {
    "columns": "`batches()`",
    "batch": "`for packet in batch`",
    "each": "`for packet in rx`",
    "deliver": "`deliver`",
}
SOURCES = {
    "tap": "TAP",
    "packet": "packet socket",
    "ring": "interface, ring",
    "unix": "AF_UNIX",
    "interface": "interface",
}


class Results:
    """What was measured, by the name of the test and what it was measured for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.machines: list[str] = []
        self.facts: dict[str, Facts] = {}
        for file in files:
            report = json.loads(file.read_text())
            commit = report.get("commit_info", {})
            tree = f"{commit.get('id', '?')[:7]}{' and changes' if commit.get('dirty') else ''}"
            for one in report["benchmarks"]:
                facts = {**one["extra_info"], "test": one["name"].partition("[")[0]}
                self.facts[one["fullname"]] = facts
                machine = (
                    f"Linux {facts['kernel']}, {facts['cpu']}, CPython {facts['python']}, "
                    f"{'with' if facts['core'] else 'without'} the C core; commit {tree}, {report['datetime'][:10]}"
                )
                if machine not in self.machines:
                    self.machines.append(machine)

    def of(self, test: str, **wanted: object) -> list[Facts]:
        """All of a test for which these facts hold."""
        return [
            facts
            for facts in self.facts.values()
            if facts["test"] == test and all(facts.get(name) == value for name, value in wanted.items())
        ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Lines:
    """In Markdown; nothing where there are no rows."""
    head, body = list(head), [list(row) for row in rows]
    if not body:
        return []
    return [row_of(head), row_of("---" if not n else "---:" for n, _ in enumerate(head)), *map(row_of, body)]


def row_of(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def figure(value: float | None) -> str:
    """Nothing for what was not measured."""
    return "" if value is None else number(value)


def race_table(results: Results, source: str) -> Lines:
    """Every reader of a source: ns per packet, and the ratio to the floor."""
    races = {facts["size"]: facts for facts in results.of(f"test_{source}") if "readers" in facts}
    names = dict.fromkeys(name for facts in races.values() for name in facts["readers"])
    head = [SOURCES[source], *(cell for size in races for cell in (f"{size} B, ns", "ratio"))]
    rows = []
    for name in names:
        cells = [name]
        for facts in races.values():
            figures = facts["readers"].get(name, {})
            cells += [figure(figures.get("ns")), figure(figures.get("ratio"))]
        rows.append(cells)
    missing = {name: why for facts in races.values() for name, why in facts["left_out"].items()}
    return table(head, rows) + [f"\nNot measured: {name}: {why}" for name, why in missing.items()]


def ratios_table(results: Results, head: str, by: str, columns: dict[Any, str], **fixed: object) -> Lines:
    """The ratio to the floor, of every backend, by one fact where the others are fixed."""
    measured = results.of("test_receive", **fixed)
    cells = {(one["source"], one["backend"], one[by]): one.get("ratio") for one in measured}
    lines = dict.fromkeys((one["source"], one["backend"]) for one in measured)
    rows = [
        [f"{SOURCES[source]}, `{backend}`", *(figure(cells.get((source, backend, key))) for key in columns)]
        for source, backend in lines
    ]
    return table([f"{head}, ratio to the floor", *columns.values()], rows)


def ways_table(results: Results, size: int) -> Lines:
    """By ways to receive."""
    return ratios_table(results, f"{size} B", "way", WAYS, size=size)


def sizes_table(results: Results, way: str) -> Lines:
    """By sizes."""
    return ratios_table(results, WAYS[way], "size", {size: f"{size} B" for size in SIZES}, way=way)


def floors_table(results: Results) -> Lines:
    """The floors themselves, the medians over all benchmarks they were part of."""
    found: dict[tuple[str, int], list[float]] = {}
    for one in results.of("test_receive"):
        if "floor_ns" in one:
            found.setdefault((one["source"], one["size"]), []).append(one["floor_ns"])
    rows = [
        [
            SOURCES[source],
            *(
                number(statistics.median(found[source, size])) if (source, size) in found else ""
                for size in SIZES
            ),
        ]
        for source in dict.fromkeys(source for source, _ in found)
    ]
    return table(["floor, ns per packet", *(f"{size} B" for size in SIZES)], rows)


def batch_table(results: Results) -> Lines:
    """The ratio to the floor, of batch sizes."""
    measured = results.of("test_batch_size")
    sizes = sorted({one["batch_size"] for one in measured})
    lines = dict.fromkeys((one["source"], one["backend"], one["way"]) for one in measured)
    cells = {
        (one["source"], one["backend"], one["way"], one["batch_size"]): one.get("ratio") for one in measured
    }
    rows = [
        [
            f"{SOURCES[line[0]]}, `{line[1]}`, {WAYS[line[2]]}",
            *(figure(cells.get((*line, size))) for size in sizes),
        ]
        for line in lines
    ]
    return table(["64 B, ratio to the floor, `batch_size=`", *map(str, sizes)], rows)


def flood_table(results: Results, size: int) -> Lines:
    """Live floods."""
    rows = []
    for one in results.of("test_flood", size=size):
        flood = one["flood"]
        rows.append(
            [
                f"{SOURCES[one['source']]}: {one['reader']}",
                number(flood["delivered_pps"] / 1000),
                number(flood["dropped_pps"] / 1000),
                number(flood["receiver_ns"]),
                number(flood["sender_ns"]),
            ]
        )
    head = [f"{size} B, flood", "received, k/s", "dropped, k/s", "receiver, CPU ns", "sender, CPU ns"]
    return table(head, rows)


def cost_table(results: Results, test: str, head: Lines) -> Lines:
    """Opening and closing, or waking up: microseconds."""
    rows = []
    for one in results.of(test):
        took = one["cost_us"]
        ours = number(took["linkrx"])
        floor = [number(took["C floor"])] if "C floor" in took else []
        rows.append([f"{SOURCES[one['source']]}, `{one['backend']}`", ours, *floor])
    return table(head, rows)


SPLITTING = {
    "C floor": "C: read and split",
    "segment": "linkrx, `segment=True`, `batches()`",
    "kernel": "linkrx, split by the kernel, `batches()`",
    "segment, deliver": "linkrx, `segment=True`, `deliver`",
    "kernel, deliver": "linkrx, split by the kernel, `deliver`",
    "C, whole": "C: read, and no more",
    "whole": "linkrx, whole, `batches()`",
}


def split_table(results: Results) -> Lines:
    """Nanoseconds per frame of super-packets, and the ratios that there are aims for."""
    races = {one["transport"]: one for one in results.of("test_super_packets") if "readers" in one}
    rows = [
        [title, *(number(one["readers"][name]["ns"]) for one in races.values())]
        for name, title in SPLITTING.items()
    ]
    aims = dict.fromkeys(aim for one in races.values() for aim in one["targets"])
    rows += [[aim, *(figure(one["targets"].get(aim)) for one in races.values())] for aim in aims]
    return table(["super-packets of a TAP, ns per frame", *races], rows) if races else []


def stream_table(results: Results) -> Lines:
    """A TCP connection of the kernel's: speed, and processor time per megabyte."""
    rows = [
        [f"{one['transport']}: {mode}", *(number(value) for value in cost.values())]
        for one in results.of("test_stream")
        for mode, cost in one.get("streams", {}).items()
    ]
    head = ["a TCP stream", "MB/s", "receiver, user us/MB", "receiver, kernel us/MB", "both ends, us/MB"]
    return table(head, rows)


def targets_table(results: Results) -> Lines:
    """What was aimed at, and what this run has."""
    rows: list[Lines] = []

    def aim(what: str, wanted: float, most: bool, found: float | None) -> None:
        if found is not None:
            met = found <= wanted if most else found >= wanted
            bound = f"at {'most' if most else 'least'} {wanted:g}"
            rows.append([what, bound, figure(found), "yes" if met else "no"])

    def ratio(size: int, **wanted: object) -> float | None:
        return next((one.get("ratio") for one in results.of("test_receive", size=size, **wanted)), None)

    def ns(source: str, size: int, *names: str) -> float | None:
        """Of the fastest of these readers."""
        readers = next(iter(results.of(f"test_{source}", size=size)), {}).get("readers", {})
        return min((one["ns"] for name, one in readers.items() if name in names), default=None)

    def quotient(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    each = ("pcapy-ng next_batch, bytes each", "pcapy-ng dispatch")
    all_of_pcapy = ("pcapy-ng loop_to_buffer", "pcapy-ng next_batch", *each)
    for size in (64, 1514):
        columns, walk = ns("interface", size, "linkrx packet_mmap, columns"), ns("interface", size, "C floor")
        bare, batch = ns("interface", size, *each), ns("interface", size, "linkrx packet_mmap, batch")
        fastest = ns("interface", size, *all_of_pcapy)
        deliver = ns("interface", size, "linkrx packet_mmap, deliver")
        tap = ratio(size, source="tap", backend="readv", way="columns")
        packet = ratio(size, source="packet", backend="recvmmsg", way="columns")
        aim(f"TAP, `readv`, `batches()` / C loop, {size} B", 1.03, True, tap)
        if size == 64:
            one = ratio(size, source="tap", backend="readv", way="deliver")
            aim("TAP, `readv`, `deliver` / C loop, 64 B", 1.40, True, one)
        hand = quotient(ns("tap", size, "linkrx os_readv, deliver"), ns("tap", size, "os.read, unpack, call"))
        aim(f"TAP, `os_readv`, `deliver` / loop by hand, {size} B", 1.35, True, hand)
        aim(f"packet socket, `recvmmsg`, `batches()` / C loop, {size} B", 1.05, True, packet)
        if size == 64 and columns and walk:
            aim("ring, columns - C walk, ns, 64 B", 30, True, columns - walk)
        aim(f"pcapy-ng's fastest / ring, columns, {size} B", 2, False, quotient(fastest, columns))
        aim(
            f"the same with one `bytes` each / ring, `for packet in batch`, {size} B",
            1.2 if size == 64 else 2,
            False,
            quotient(bare, batch),
        )
        aim(
            f"the same / ring, `deliver`, {size} B",
            1 if size == 64 else 1.5,
            False,
            quotient(bare, deliver),
        )
        go = quotient(ns("tap", size, "gVisor, readv"), ns("tap", size, "linkrx readv, deliver"))
        aim(f"TAP, gVisor / `readv`, `deliver`, {size} B", 1, False, go)
    for facts in results.of("test_super_packets"):
        for what, found in facts.get("targets", {}).items():
            if ", at " in what:
                name, bound = what.split(", at ")
                most, wanted = bound.split()
                aim(f"{facts['transport']}: {name}", float(wanted), most == "most", found)
    return table(["target", "", "this run", "met"], rows)


def import_table(results: Results) -> Lines:
    """Milliseconds of a process that imports a library and ends."""
    rows = [
        [name, number(took / 1000)]
        for one in results.of("test_import")
        for name, took in one["cost_us"].items()
    ]
    return table(["a process that imports", "ms"], rows)


TABLES: dict[str, Callable[[Results], Lines]] = {
    "machine": lambda results: [f"{machine}." for machine in results.machines],
    "interface": lambda results: race_table(results, "interface"),
    "tap": lambda results: race_table(results, "tap"),
    "unix": lambda results: race_table(results, "unix"),
    "floors": floors_table,
    "ways 64": lambda results: ways_table(results, 64),
    "ways 1514": lambda results: ways_table(results, 1514),
    "sizes columns": lambda results: sizes_table(results, "columns"),
    "sizes deliver": lambda results: sizes_table(results, "deliver"),
    "batch sizes": batch_table,
    "flood 64": lambda results: flood_table(results, 64),
    "flood 1514": lambda results: flood_table(results, 1514),
    "open and close": lambda results: cost_table(
        results, "test_open_and_close", ["open and close, microseconds", "linkrx"]
    ),
    "wake-up": lambda results: cost_table(
        results, "test_wake_up", ["wake-up, microseconds", "linkrx", "`poll` and `read` in C"]
    ),
    "import": import_table,
    "super-packets": split_table,
    "targets": targets_table,
    "streams": stream_table,
}


def picture(results: Results) -> str:
    """Every reader of TAP and interface at 64 and 1514 bytes."""
    panels = []
    for source in ("tap", "interface"):
        for facts in results.of(f"test_{source}"):
            if "readers" not in facts:
                continue
            bars = [
                Bar(name, one["ns"], one["ratio"], kind_of(name)) for name, one in facts["readers"].items()
            ]
            panels.append(
                Panel(f"{SOURCES[source]}, frames of {facts['size']} bytes", sorted(bars, key=lambda b: b.ns))
            )
    return svg("Nanoseconds per packet, and the ratio to the bare C loop", panels)


def kind_of(name: str) -> str:
    """Whose it is."""
    return "floor" if name.startswith("C ") else "linkrx" if name.startswith("linkrx") else "peer"


def write(file: Path, tables: dict[str, Lines]) -> None:
    """Put the tables between their marks. Those that were not measured stay as they are."""

    def replaced(match: re.Match[str]) -> str:
        lines = tables.get(match[1])
        if lines is None:
            raise SystemExit(f"{file}: there is no table {match[1]!r}; there are: {', '.join(tables)}")
        if not lines:
            return match[0]
        return f"<!-- report: {match[1]} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    text = file.read_text()
    file.write_text(re.sub(r"<!-- report: (.+?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path, help="write the plot there")
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="Markdown files with marks in them")
    asked = parser.parse_args()
    results = Results(asked.json)
    tables = {name: make(results) for name, make in TABLES.items()}
    for name, lines in tables.items():
        if lines:
            print(f"<!-- report: {name} -->", *lines, "<!-- end -->\n", sep="\n")
    if asked.svg:
        asked.svg.write_text(picture(results))
    for file in asked.write:
        write(file, tables)


if __name__ == "__main__":
    main()
