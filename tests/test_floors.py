"""The architecture: imports point down, only the core says ffi, and only C and the core know about cffi."""

from __future__ import annotations

import ast
from pathlib import Path

import linkrx

PACKAGE = Path(linkrx.__file__).parent

# Floor by floor, lowest first. A module may import from lower floors and from its own.
FLOORS = (
    {"errnos", "errors", "ethtool", "libc", "remedies", "headers", "_core"},
    {
        "buffers",
        "capabilities",
        "choice",
        "columns",
        "deadline",
        "dropwatch",
        "fanout",
        "framing",
        "namespace",
        "options",
        "plain",
        "rtnetlink",
        "source",
        "stats",
        "tuntap",
        "wakeup",
    },
    {
        "aio",
        "backend",
        "classify",
        "dispatcher",
        "packets",
        "plain_receiver",
        "reception",
        "segment",
        "segmenting",
    },
    {"backends"},
    {"factory"},
    {"__main__", "cli", "demo", "device", "doctor", "responder", "rigs", "terminal", "testing"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Names that say nothing about what a file holds.
VAGUE = {"utils", "util", "common", "helpers", "base", "types", "misc"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below linkrx, the package itself left out."""
    return {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") + ":" + str(path.relative_to(PACKAGE)): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


def imported(path: Path) -> set[str]:
    """What of linkrx a file imports, type-checking imports and those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("linkrx.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts == ["linkrx"]:
                found |= {alias.name for alias in node.names}
            elif parts[0] == "linkrx":
                found.add(parts[1])
    return found


def test_every_module_has_a_floor() -> None:
    """No module stands outside the floors, and none has a name that says nothing."""
    names = {key.split(":")[0] for key in modules()}
    assert names == set(FLOOR_OF)
    assert not {path.stem for path in modules().values()} & VAGUE


def test_imports_point_down() -> None:
    """No module imports from a floor above its own."""
    wrong = {
        (str(path.relative_to(PACKAGE)), name)
        for key, path in modules().items()
        for name in imported(path)
        if FLOOR_OF.get(name, -1) > FLOOR_OF[key.split(":")[0]]
    }
    assert wrong == set()


def test_backends_know_nothing_of_each_other() -> None:
    """A backend imports no other backend, no dispatcher and nothing above."""
    for path in (PACKAGE / "backends").glob("*.py"):
        assert not imported(path) & {"backends", "dispatcher", "reception", "classify", "factory"}, path


def test_only_the_core_says_ffi() -> None:
    """cffi and its ffi object appear in linkrx/_core only."""
    for path in modules().values():
        if path.parent.name != "_core":
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            attributes = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert not {"ffi", "cffi"} & (names | attributes | imported(path)), path


def test_files_are_short_enough_to_read_in_one_sitting() -> None:
    """No file of the package, C included, is longer than 450 lines."""
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")]:
        if path.name != "_native.c":
            assert len(path.read_text().splitlines()) <= 450, path
