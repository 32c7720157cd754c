"""Prints tables and a plot of the results in FILEs of `pytest bench --benchmark-json=FILE`.

    python bench/report.py FILE... [--svg bench/speed.svg] [--write README.md docs/super-packets.md bench/README.md]

It prints Markdown. With --write, it replaces the text in those files between `<!-- report: NAME -->` and `<!-- end -->` with the
table of that name. If a benchmark is in several FILEs, the last one counts.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plot import number, svg
from results import SIZES, SOURCES, Lines, Results, figure, table
from targets import targets_table
from world import kept_table, lone_table, paced_table, panels, speed_table, work_table, world_table

WAYS = {
    "columns": "`batches()`",
    "batch": "`for packet in batch`",
    "each": "`for packet in rx`",
    "deliver": "`deliver`",
}


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
    """The ratio to the floor of every backend, by one fact, with the others fixed."""
    measured = results.of("test_receive", **fixed)
    cells = {(one["source"], one["backend"], one[by]): one.get("ratio") for one in measured}
    lines = dict.fromkeys((one["source"], one["backend"]) for one in measured)
    rows = [
        [f"{SOURCES[source]}, `{backend}`", *(figure(cells.get((source, backend, key))) for key in columns)]
        for source, backend in lines
    ]
    return table([f"{head}, ratio to the floor", *columns.values()], rows)


def ways_table(results: Results, size: int) -> Lines:
    """Ratios by call."""
    return ratios_table(results, f"{size} B", "way", WAYS, size=size)


def sizes_table(results: Results, way: str) -> Lines:
    """Ratios by size."""
    return ratios_table(results, WAYS[way], "size", {size: f"{size} B" for size in SIZES}, way=way)


def floors_table(results: Results) -> Lines:
    """The floors: medians over all benchmarks that measured them."""
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
    """The ratio to the floor by batch size."""
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
    """The table of live floods."""
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
    """Nanoseconds per frame of super-packets, and the ratios that have targets."""
    races = {one["transport"]: one for one in results.of("test_super_packets") if "readers" in one}
    rows = [
        [title, *(number(one["readers"][name]["ns"]) for one in races.values())]
        for name, title in SPLITTING.items()
    ]
    aims = dict.fromkeys(aim for one in races.values() for aim in one["targets"])
    rows += [[aim, *(figure(one["targets"].get(aim)) for one in races.values())] for aim in aims]
    return table(["super-packets of a TAP, ns per frame", *races], rows) if races else []


def stream_table(results: Results) -> Lines:
    """TCP connections from the kernel: speed, and processor time per megabyte."""
    rows = [
        [f"{one['transport']}: {mode}", *(number(value) for value in cost.values())]
        for one in results.of("test_stream")
        for mode, cost in one.get("streams", {}).items()
    ]
    head = ["a TCP stream", "MB/s", "receiver, user us/MB", "receiver, kernel us/MB", "both ends, us/MB"]
    return table(head, rows)


def import_table(results: Results) -> Lines:
    """The milliseconds of a process that imports a library and ends."""
    rows = [
        [name, number(took / 1000)]
        for one in results.of("test_import")
        for name, took in one["cost_us"].items()
    ]
    return table(["a process that imports", "ms"], rows)


TABLES: dict[str, Callable[[Results], Lines]] = {
    "world": world_table,
    "speed": speed_table,
    "targets": targets_table,
    "lone": lone_table,
    "paced": paced_table,
    "work ring": lambda results: work_table(results, "ring"),
    "work tap": lambda results: work_table(results, "tap"),
    "work packet": lambda results: work_table(results, "packet"),
    "kept": kept_table,
    "machine": lambda results: [f"{machine}." for machine in results.machines],
    "interface": lambda results: race_table(results, "interface"),
    "packet": lambda results: race_table(results, "packet"),
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
    "streams": stream_table,
}


def write(file: Path, tables: dict[str, Lines]) -> None:
    """Write the tables between their marks. Tables without results stay as they are."""

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
    """Run the command."""
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
        asked.svg.write_text(
            svg("Nanoseconds per packet, and times what the loop by hand or pcapy-ng takes", panels(results))
        )
    for file in asked.write:
        write(file, tables)


if __name__ == "__main__":
    main()
