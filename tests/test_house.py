"""The house: rooms stand on floors, imports point down, no file imports itself in a circle, and only C and the core say cffi."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import linkrx

PACKAGE = Path(linkrx.__file__).parent

# Floor by floor, lowest first. A room is a folder of linkrx/ or a file beside these.
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

# Names that say nothing about what a file holds.
VAGUE = {"utils", "util", "common", "helpers", "base", "types", "misc"}

Module = tuple[str, ...]  # ("linkrx", "memory", "columns")


def named(path: Path) -> Module:
    """The name of a module, part by part."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {named(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, *, when_loaded: bool = False) -> set[Module]:
    """The modules of linkrx that a file imports; those inside functions and for type checkers unless only `when_loaded`."""
    found: set[Module] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                tuple(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "linkrx"
            }
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "linkrx":
            module = tuple(node.module.split("."))
            members = {(*module, alias.name) for alias in node.names}
            found |= {member if member in MODULES else module for member in members}
    return found & set(MODULES)


def room(module: Module) -> str:
    """The folder of linkrx/, or the file beside these."""
    return module[1]


def test_every_room_has_a_floor() -> None:
    """Each folder and file of linkrx/ is on one floor, and no file has a name that says nothing."""
    assert {room(module) for module in MODULES if len(module) > 1} <= set(FLOOR_OF)
    assert not {path.stem for path in MODULES.values()} & VAGUE


def test_imports_point_down() -> None:
    """No module imports from a floor above its own."""
    wrong = {
        (".".join(module), ".".join(target))
        for module, path in MODULES.items()
        if len(module) > 1
        for target in imported(path)
        if len(target) > 1 and FLOOR_OF[room(target)] > FLOOR_OF[room(module)]
    }
    assert wrong == set()


def test_no_circles() -> None:
    """No module imports, by whatever way, itself: what is imported when a module is loaded is a tree."""
    loads = {module: imported(path, when_loaded=True) for module, path in MODULES.items()}
    reached = dict(loads)
    for _ in MODULES:
        reached = {
            module: set().union(found, *(loads[one] for one in found)) for module, found in reached.items()
        }
    assert {".".join(module) for module, found in reached.items() if module in found} == set()


def test_backends_know_nothing_of_each_other() -> None:
    """A backend imports no other backend, and nothing of the receiver, the stages and whatever chooses."""
    for module, path in MODULES.items():
        if module[1:2] == ("backends",):
            above = {room(target) for target in imported(path) if len(target) > 1}
            assert not above & {"backends", "stages", "receiving", "registry", "factory", "choice"}, path


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
    """What tests share is in tests/support/."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("test_", "conftest"))], path


def test_one_core_for_all_versions_of_python() -> None:
    """No format with a "#": what the headers of CPython 3.13 compile of that, 3.11 refuses. And None is referred to, see types.h."""
    sources = {path.name: path.read_text() for path in (PACKAGE / "_core" / "types").glob("*.[ch]")}
    assert [name for name, text in sources.items() if re.search(r'"[^"\n]*[ysz]#[^"\n]*"', text)] == []
    redefined = set(
        re.findall(r"^#define (Py_RETURN_\w+) return Py_NewRef\(", sources["types.h"], re.MULTILINE)
    )
    assert redefined >= set(re.findall(r"\bPy_RETURN_\w+", " ".join(sources.values())))
