"""Type checkers accept users' programs, and the list of public names is complete."""

from __future__ import annotations

import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from support import documents

import linkrx
from linkrx import _core

HERE = Path(__file__).parent

# Types that only linkrx makes. Their constructors are not public.
MADE_BY_LINKRX = {
    "BackendInfo",
    "Batch",
    "Batches",
    "Choice",
    "Dispatcher",
    "Packet",
    "Stats",
    "Verdict",
}
# Modules for authors of backends, which export their own classes.
FOR_AUTHORS = {"linkrx.backend"}

# Each line must be refused by every checker.
MISTAKES = [
    'linkrx.open("eth0", batch_sise=3)',
    'linkrx.open("eth0", latency="long")',
    "linkrx.choose(3.5)",
    'linkrx.choose("eth0", timestamps=1.5)',
    'linkrx.open("eth0", lambda packet: None)',
    'linkrx.choose("eth0").backend = "readv"',
    'linkrx.open("eth0").recv().remote.hex()',
    'linkrx.opne("eth0")',
]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with every program of the documents, the client, and a file that has a mistake in each line after the first."""
    for number, program in enumerate(documents.programs()):
        (tmp_path / f"document_{number}.py").write_text(program)
    (tmp_path / "client.py").write_text((HERE / "support" / "client.py").read_text())
    (tmp_path / "mistakes.py").write_text("\n".join(["import linkrx", *MISTAKES, ""]))
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return tmp_path


def refused(folder: Path, *command: str) -> set[tuple[str, int]]:
    """The file and line of each error of a type checker."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    found = re.findall(r"(\w+\.py):(\d+).*?error:? ", done.stdout)
    assert found, done.stdout + done.stderr
    print(done.stdout)
    return {(name, int(line)) for name, line in found}


EXPECTED = {("mistakes.py", line) for line in range(2, 2 + len(MISTAKES))}


def test_mypy(programs: Path) -> None:
    """mypy --strict accepts the programs, and reports each mistake."""
    files = sorted(path.name for path in programs.glob("*.py"))
    assert refused(programs, "mypy", "--strict", "--config-file=", "--no-pretty", *files) == EXPECTED


def test_pyright(programs: Path) -> None:
    """pyright with its strict rules accepts the programs, and reports each mistake."""
    assert refused(programs, "basedpyright", "--pythonpath", sys.executable) == EXPECTED


@pytest.mark.skipif(_core.types is None, reason=f"of the types in C: {_core.reason}")
def test_the_stub_of_the_types(tmp_path: Path) -> None:
    """The stub of the types in C matches the module."""
    allowed = tmp_path / "allowed.txt"
    # Buffers of C types have this method from Python 3.12 on (PEP 688).
    allowed.write_text(r"linkrx\._core\._types\.\w+\.__buffer__" * (sys.version_info < (3, 12)))
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "linkrx._core._types", "--allowlist", str(allowed)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_public_list() -> None:
    """linkrx.__all__ has exactly the names that the client uses, and each of them exists."""
    used = set(re.findall(r"\blinkrx\.(\w+)", (HERE / "support" / "client.py").read_text()))
    assert used == set(linkrx.__all__)
    assert sorted(linkrx.__all__) == list(dict.fromkeys(sorted(linkrx.__all__)))
    for name in linkrx.__all__:
        assert getattr(linkrx, name) is vars(linkrx)[name]
    public = {name for name, value in vars(linkrx).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public == set(linkrx.__all__) == set(linkrx._HOMES)


def test_names_are_imported_when_they_are_used() -> None:
    """`import linkrx` imports no other module of it, and a room of the same name does not replace a function."""
    program = (
        "import sys, linkrx\n"
        "assert [name for name in sys.modules if name.startswith('linkrx')] == ['linkrx']\n"
        "assert 'open' in dir(linkrx)\n"
        "import linkrx.backends, linkrx.backends.os_readv\n"
        "assert 'os_readv' in [info.name for info in linkrx.backends()]\n"
        "from linkrx import *\n"
        "assert open is linkrx.open and backends is linkrx.backends\n"
        "try:\n"
        "    linkrx.opne\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "module 'linkrx' has no attribute 'opne'\n", done.stderr


def shown(name: str) -> Iterator[tuple[str, Any]]:
    """Every annotation of a public name, with its position."""
    thing = getattr(linkrx, name)
    exported = {one: getattr(linkrx, one) for one in linkrx.__all__}
    names = {**vars(builtins), **exported}  # some modules import only for type checkers
    if not inspect.isclass(thing):
        hints = get_type_hints(thing, localns=names) if inspect.isfunction(thing) else {name: thing}
        yield from ((f"{name}: {key}", hint) for key, hint in hints.items())
        return
    attributes = get_type_hints(thing, localns=names)
    yield from ((f"{name}.{key}", hint) for key, hint in attributes.items() if not key.startswith("_"))
    for key, member in inspect.getmembers_static(thing):
        member = getattr(member, "fget", getattr(member, "__func__", member))
        if not inspect.isfunction(member) or (key.startswith("_") and not key.startswith("__")):
            continue
        if key in ("__init__", "__new__") and name in MADE_BY_LINKRX:
            continue
        hints = get_type_hints(member, localns=names)
        yield from ((f"{name}.{key}: {parameter}", hint) for parameter, hint in hints.items())


def classes(hint: Any) -> Iterator[type]:
    """The classes in a type."""
    if isinstance(hint, list | tuple):
        for part in hint:
            yield from classes(part)
    elif get_origin(hint) is not None:
        yield from classes(get_args(hint))
    elif inspect.isclass(hint):
        yield hint


@pytest.mark.parametrize("name", sorted(linkrx.__all__))
def test_every_type_that_is_shown_is_exported(name: str) -> None:
    """Each class of linkrx in the signature of a public function, method, property or attribute is a public name."""
    public = {id(getattr(linkrx, one)) for one in linkrx.__all__}
    for where, hint in shown(name):
        for kind in classes(hint):
            if kind.__module__.partition(".")[0] == "linkrx" and kind.__module__ not in FOR_AUTHORS:
                assert id(kind) in public, f"{where} shows {kind.__module__}.{kind.__name__}"
