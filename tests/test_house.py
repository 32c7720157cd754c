"""The structure of the package: imports point down from floor to floor and have no circles, and only the core uses cffi."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from support import house, way
from support.house import room
from support.paths import ROOT

import linkrx

PACKAGE = Path(linkrx.__file__).parent

# The floors, lowest first. A room is a folder of linkrx/, or a file at its top.
FLOORS = (
    {"errors", "kernel", "_core"},
    {"memory", "packets", "sources"},
    {"backend", "choice"},
    {"stages"},
    {"receiving"},
    {"backends"},
    {"registry", "factory"},
    {"__main__", "capture", "cli", "testing", "adapters"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# File names without a subject.
VAGUE = {"utils", "util", "common", "helpers", "base", "types", "misc"}

MODULES = house.modules(PACKAGE)
ARROWS = house.imports(MODULES)


def test_every_room_has_a_floor() -> None:
    """Each folder and file of linkrx/ is on one floor, and no file has a name without a subject."""
    assert {room(module) for module in MODULES if len(module) > 1} <= set(FLOOR_OF)
    assert not {path.stem for path in MODULES.values()} & VAGUE


def test_imports_point_down() -> None:
    """No module imports from a floor above its own."""
    wrong = {
        (".".join(module), ".".join(target))
        for module, targets in ARROWS.items()
        if len(module) > 1
        for target in targets
        if len(target) > 1 and FLOOR_OF[room(target)] > FLOOR_OF[room(module)]
    }
    assert wrong == set()


def test_no_circles() -> None:
    """No module imports itself, directly or through others, when it is loaded."""
    far = house.reached(house.imports(MODULES, when_loaded=True))
    assert {".".join(module) for module, targets in far.items() if module in targets} == set()


def test_backends_know_nothing_of_each_other() -> None:
    """A backend imports no other backend, no stage, and nothing of the receiver, the registry and the choice."""
    for module, targets in ARROWS.items():
        if room(module) == "backends":
            above = {"backends", "stages", "receiving", "registry", "factory", "choice"}
            assert not above & set(map(room, targets)), module


def test_the_way_of_a_packet_crosses_the_rooms_that_are_written_down() -> None:
    """From `dispatch` to `deliver` a packet crosses the rooms that CONTRIBUTING.md names, in that order."""
    crossed = subprocess.run([sys.executable, way.__file__], capture_output=True, text=True, check=True)
    rooms = dict.fromkeys(name.partition("/")[0] for name in crossed.stdout.split())
    written = re.search(
        r"They cross \w+ rooms: (.*)\.$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert written
    assert re.findall(r"`(\w+)`", written[1]) == list(rooms)


def test_only_the_core_says_ffi() -> None:
    """cffi and its ffi object appear in linkrx/_core only."""
    for path in MODULES.values():
        if path.parent.name != "_core":
            tree = ast.parse(path.read_text())
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            names |= {
                alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
            }
            assert not {"ffi", "cffi"} & names, path


def test_files_are_short_enough_to_read_in_one_sitting() -> None:
    """No file of the package, C included, is longer than 450 lines."""
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")]:
        if path.name != "_native.c":
            assert len(path.read_text().splitlines()) <= 450, path


def test_the_package_shows_its_public_names() -> None:
    """dir(linkrx) has what linkrx exports, and no rooms."""
    assert {name for name in dir(linkrx) if not name.startswith("_")} == set(linkrx.__all__)


def test_no_test_imports_another() -> None:
    """No test imports from another test, only from tests/support/."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("test_", "conftest"))], path


def test_one_core_for_all_versions_of_python() -> None:
    """The C types use no "#" in formats, which CPython 3.11 refuses if compiled with headers of 3.13, and redefine each Py_RETURN_* macro that they use (types.h)."""
    sources = {path.name: path.read_text() for path in (PACKAGE / "_core" / "types").glob("*.[ch]")}
    assert [name for name, text in sources.items() if re.search(r'"[^"\n]*[ysz]#[^"\n]*"', text)] == []
    redefined = set(
        re.findall(r"^#define (Py_RETURN_\w+) return Py_NewRef\(", sources["types.h"], re.MULTILINE)
    )
    assert redefined >= set(re.findall(r"\bPy_RETURN_\w+", " ".join(sources.values())))
