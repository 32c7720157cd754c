"""Reads the results of `pytest bench --benchmark-json=FILE`, and formats them as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plot import number
from race import ratio_of

Facts = dict[str, Any]
Lines = list[str]

SIZES = (64, 576, 1514, 9014, 65535)
SOURCES = {
    "tap": "TAP",
    "packet": "packet socket",
    "ring": "interface, ring",
    "unix": "AF_UNIX",
    "interface": "interface",
}


class Results:
    """Results, by the name of the test and its facts."""

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
        """All results of a test that have these facts."""
        return [
            facts
            for facts in self.facts.values()
            if facts["test"] == test and all(facts.get(name) == value for name, value in wanted.items())
        ]

    def one(self, test: str, **wanted: object) -> Facts | None:
        """The first of these results, or None."""
        return next(iter(self.of(test, **wanted)), None)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Lines:
    """A Markdown table. Without rows, no lines."""
    head, body = list(head), [list(row) for row in rows]
    if not body:
        return []
    return [row_of(head), row_of("---" if not n else "---:" for n, _ in enumerate(head)), *map(row_of, body)]


def row_of(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def figure(value: float | None) -> str:
    """A number as text. Empty without a result."""
    return "" if value is None else number(value)


def ns_of(facts: Facts | None, name: str) -> float | None:
    """The median of a reader, in nanoseconds per packet."""
    one = (facts or {}).get("readers", {}).get(name)
    return one["ns"] if one else None


def quotient(facts: Facts | None, name: str, other: str) -> float | None:
    """The median of the rounds' ratios of a reader's time to that of `other`."""
    readers = (facts or {}).get("readers", {})
    if name not in readers or other not in readers:
        return None
    return ratio_of(readers[name], readers[other])


def why_not(facts: Facts | None, name: str) -> str:
    """The first line of the reason why a reader was not measured."""
    if facts is None or "readers" not in facts:
        return "not measured"
    return str(facts.get("left_out", {}).get(name, "not measured")).partition("\n")[0].rstrip(":")
