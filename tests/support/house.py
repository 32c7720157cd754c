"""The imports of the package. `python tests/support/house.py [FOLDER]` counts files, rooms and imports.

It does not import linkrx, so it can count any version of it. FOLDER is the package's folder.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TypeVar

Module = tuple[str, ...]  # ("linkrx", "memory", "columns")
Node = TypeVar("Node", Module, str)


def modules(package: Path) -> dict[Module, Path]:
    """Every module of a package. The keys are the parts of its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def room(module: Module) -> str:
    """The room of a module: its folder in the package, or the file at the top. The package itself is a room too."""
    return module[1] if len(module) > 1 else module[0]


def imports(found: dict[Module, Path], *, when_loaded: bool = False) -> dict[Module, set[Module]]:
    """The modules of the package that each module imports. With `when_loaded`, without imports in functions and for type checkers."""
    return {module: _imported(path, found, when_loaded=when_loaded) for module, path in found.items()}


def _imported(path: Path, found: dict[Module, Path], *, when_loaded: bool) -> set[Module]:
    targets: set[Module] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = tuple(node.module.split("."))
            members = {(*module, alias.name) for alias in node.names}
            targets |= {member if member in found else module for member in members}
    return targets & set(found)


def reached(arrows: dict[Node, set[Node]]) -> dict[Node, set[Node]]:
    """The modules that each module imports, directly or indirectly."""
    far = dict(arrows)
    for _ in arrows:
        far = {module: set().union(near, *(arrows[one] for one in near)) for module, near in far.items()}
    return far


def longest_chain(arrows: dict[Node, set[Node]]) -> int:
    """The length of the longest chain of imports. Modules that import each other in a circle count as one."""
    far = reached(arrows)
    heights: dict[Node, int] = {}

    def height(node: Node) -> int:
        if node not in heights:
            below = [one for one in far[node] if one != node and node not in far[one]]
            heights[node] = 1 + max(map(height, below), default=0)
        return heights[node]

    return max(map(height, arrows))


def counts(package: Path) -> dict[str, int]:
    """The counts, each with its description. The package's `__init__` module is left out."""
    found = {module: path for module, path in modules(package).items() if len(module) > 1}
    arrows = imports(found)
    loaded = imports(found, when_loaded=True)
    rooms: dict[str, set[str]] = {room(module): set() for module in found}
    for module, targets in arrows.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    return {
        "files": len(found),
        "rooms": len(rooms),
        "floors: rooms in the longest chain of imports": longest_chain(rooms),
        "files in the longest chain of imports": longest_chain(loaded),
        "arrows between rooms": sum(map(len, rooms.values())),
        "arrows between files": sum(map(len, arrows.values())),
        "files in a circle of imports": sum(module in far for module, far in reached(loaded).items()),
        "lines of the longest file": max(len(path.read_text().splitlines()) for path in found.values()),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[2] / "linkrx"
    for what, number in counts(folder.resolve()).items():
        print(f"{number:5}  {what}")
