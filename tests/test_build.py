"""The build of the C core, and the messages if it was not built or does not match."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.paths import ROOT

from linkrx import _core
from linkrx._core.sources import sources_hash

CORE = ROOT / "linkrx" / "_core"
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or ""
# musl has its own headers, and also needs the kernel's headers.
FLAGS = {
    "gcc": [],
    "clang": [],
    "musl-gcc": ["-idirafter", "/usr/include", "-idirafter", f"/usr/include/{MULTIARCH}"],
}
COMPILERS = [name for name in FLAGS if shutil.which(name)]
WARNINGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
# Warnings that are errors by default in GCC 14.
WARNINGS += ["-Werror=implicit-function-declaration", "-Werror=int-conversion"]

needs_sources = pytest.mark.skipif(not CORE.joinpath("ring.h").exists(), reason="the C sources are not here")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with `cwd` first in its module path."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("LINKRX_", "CFLAGS"))
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def reason(cwd: Path) -> str:
    """The reason that the linkrx in a folder gives for having no core."""
    output = python("-c", "from linkrx import _core; print(_core.lib is None, _core.reason)", cwd=cwd)
    assert output.returncode == 0, output.stdout
    missing, _, why = output.stdout.rstrip("\n").partition(" ")
    assert missing == "True", output.stdout
    return why


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout, without built files."""
    generated = shutil.ignore_patterns("*.so", "__pycache__", "build_failure.txt", "_built.py")
    shutil.copytree(ROOT / "linkrx", tmp_path / "linkrx", ignore=generated)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def installed(checkout: Path) -> Path:
    """A copy as installed by a wheel: without the C sources, with their hash."""
    (checkout / "linkrx/_core/_built.py").write_text(f'SOURCES = "{sources_hash()}"\n')
    for path in list((checkout / "linkrx/_core").rglob("*.*")):
        if path.suffix in (".c", ".h", ".inc"):
            path.unlink()
    return checkout


def put_core(folder: Path) -> None:
    """Copy the core that was built here."""
    built = [*CORE.glob("_native*.so"), *CORE.glob("_types*.so")]
    assert len(built) == 2
    for path in built:
        shutil.copy(path, folder / "linkrx/_core")


@needs_sources
@pytest.mark.skipif(not COMPILERS, reason="needs gcc, clang or musl-gcc")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_header_stands_on_its_own(compiler: str, tmp_path: Path) -> None:
    """A file that includes only one header of the core, and every C file, compile without a warning."""
    headers = sorted(path.name for path in CORE.iterdir() if path.suffix in (".h", ".inc"))
    assert headers
    files = []
    for name in headers:
        files.append(tmp_path / f"{name}.c")
        files[-1].write_text(f'#include "{name}"\n')
    flags = [*WARNINGS, *FLAGS[compiler]]
    command = [compiler, *flags, "-Wno-unused-function", f"-I{CORE}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    sources = [str(path) for path in CORE.glob("*.c") if path.name != "_native.c"]
    done = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_sources
@pytest.mark.skipif(not {"gcc", "clang"} & set(COMPILERS), reason="needs gcc or clang")
@pytest.mark.parametrize("compiler", [name for name in COMPILERS if name != "musl-gcc"])
@pytest.mark.parametrize("limited", [True, False], ids=["limited", "full"])
def test_every_file_of_the_types_compiles(compiler: str, limited: bool, tmp_path: Path) -> None:
    """Every file of the types, and their header alone, compile with the limited API and, for free-threaded builds, without."""
    alone = tmp_path / "alone.c"
    alone.write_text('#include "types.h"\n')
    flags = [*WARNINGS, "-Wno-unused-function", '-DLRX_SOURCES="test"', f"-I{CORE}", f"-I{CORE / 'types'}"]
    flags += ["-DPy_LIMITED_API=0x030B0000"] * limited + [f"-isystem{sysconfig.get_path('include')}"]
    files = [str(path) for path in [alone, *CORE.glob("types/*.c")]]
    assert len(files) > 5
    done = subprocess.run([compiler, *flags, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def build(checkout: Path, compiler: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the checkout as `pip install -e .` does, with this compiler."""
    # A flag of Debian's Python. A flag with "error" in its name is no error.
    flags = {"CFLAGS": "-Werror=format-security", **environment}
    return python("setup.py", "build_ext", "--inplace", cwd=checkout, CC=compiler, **flags)


def fake_compiler(folder: Path, failing: str) -> str:
    """A compiler that writes empty files, and fails for one file."""
    path = folder / "fake-cc"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *{failing}*) echo "{failing}:7:1: error: a comma is missing" >&2; exit 1;; esac\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_sources
def test_a_compiler_that_fails_on_the_core(checkout: Path) -> None:
    """With a failing compiler the install works, an old core is removed, and `open` and `doctor` show the compiler's output."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools, to build")
    if _core.lib is not None:
        put_core(checkout)
    compiler = fake_compiler(checkout, "packet_mmap.c")
    done = build(checkout, compiler)
    assert done.returncode == 0, done.stdout
    assert not list((checkout / "linkrx/_core").glob("_native*.so"))
    why = reason(checkout)
    assert why.startswith(
        "the C core could not be built when linkrx was installed: packet_mmap.c:7:1: error: a comma is"
    )
    assert "`linkrx doctor` shows" in why
    doctor = python("-m", "linkrx", "doctor", cwd=checkout)
    assert doctor.returncode == 0, doctor.stdout
    assert re.search(
        r"^C core +no: the C core could not be built .* a comma is missing", doctor.stdout, re.MULTILINE
    )
    assert re.search(rf"^  {compiler} .*-c linkrx/_core/packet_mmap.c ", doctor.stdout, re.MULTILINE)
    assert "\n  packet_mmap.c:7:1: error: a comma is missing\n" in doctor.stdout
    # The next build removes that message.
    done = build(checkout, fake_compiler(checkout, "nothing.c"))
    assert not (checkout / "linkrx/_core/build_failure.txt").exists(), done.stdout


@needs_sources
def test_an_old_build_folder(checkout: Path) -> None:
    """Files of an earlier build in build/ are compiled again or not used, so no wheel has an old core."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools, to build")
    done = python(
        "setup.py", "build", "--build-lib", "lib", cwd=checkout, CC=fake_compiler(checkout, "nothing.c")
    )
    core = checkout / "lib/linkrx/_core"
    note = (core / "_built.py").read_text()
    (old,) = core.glob("_native*.so")
    old.write_bytes(b"old")
    done = python(
        "setup.py", "build", "--build-lib", "lib", cwd=checkout, CC=fake_compiler(checkout, "nothing.c")
    )
    assert old.read_bytes() == b"", done.stdout
    with (checkout / "linkrx/_core/readv.c").open("a") as file:
        file.write("/* edited */\n")
    done = python(
        "setup.py", "build", "--build-lib", "lib", cwd=checkout, CC=fake_compiler(checkout, "readv.c")
    )
    assert not old.exists(), done.stdout
    assert "a comma is missing" in (core / "build_failure.txt").read_text()
    assert (core / "_built.py").read_text() != note


@needs_sources
@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/bin/false", "'/bin/false' failed and did not say why"),
        ("/nowhere/cc", r"there is no C compiler '/nowhere/cc' \(Debian: apt install gcc python3-dev\)"),
    ],
)
def test_without_a_compiler(checkout: Path, compiler: str, said: str) -> None:
    """Without a working compiler linkrx installs and gives the reason. If the core is required, the install fails."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools, to build")
    done = build(checkout, compiler)
    assert done.returncode == 0, done.stdout
    assert re.match(f"the C core could not be built when linkrx was installed: {said}; ", reason(checkout))
    done = build(checkout, compiler, LINKRX_REQUIRE_CORE="1")
    assert done.returncode != 0
    assert re.search(r"error: linkrx\._core\._\w+ could not be compiled", done.stdout)


@needs_sources
def test_a_checkout_that_was_not_built(checkout: Path) -> None:
    """linkrx in a checkout without a core says so, and what to type."""
    why = reason(checkout)
    assert why.startswith(f"the C core was not built: Python took linkrx from the checkout in {checkout}.")
    assert "`python3 -m pip install -e .`" in why
    doctor = python("-m", "linkrx", "doctor", cwd=checkout)
    assert f"no: {why}" in doctor.stdout


WARNED = """
import logging, os, socket, sys, linkrx
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
linkrx.open(receiver, backend="os_readv").close()
print("named")
os.environ["LINKRX_BACKEND"] = "os_readv"
linkrx.open(receiver).close()
print("named in the environment")
del os.environ["LINKRX_BACKEND"]
try:
    linkrx.open(receiver, backend="readv").close()
except linkrx.BackendUnavailable as error:
    print(error)
for _ in range(2):
    with linkrx.open(receiver) as rx:
        print(rx.backend)
"""


def test_a_missing_core_is_logged_once(installed: Path) -> None:
    """The first open with auto logs a warning with the reason. Later calls, and calls that name os_readv, do not.

    A call that names a backend of the core raises an error with the reason.
    """
    why = reason(installed)
    assert why == (
        f"the C core is not in {installed}/linkrx/_core: install linkrx again, with `python3 -m pip install "
        "--force-reinstall linkrx`"
    )
    assert python("-c", WARNED, cwd=installed).stdout.splitlines() == [
        "named",
        "named in the environment",
        f"readv is not available here: {why}",
        f"WARNING without its C core linkrx receives many times slower: {why}",
        "os_readv",
        "os_readv",
    ]


STALE = "was built from other sources"


@pytest.mark.skipif(_core.lib is None, reason="the C core was not built")
def test_a_core_of_another_version_in_a_wheel(installed: Path) -> None:
    """A core that was built for other Python files is refused with a reason, and linkrx works without it."""
    put_core(installed)
    output = python("-c", "from linkrx import _core; print(_core.reason)", cwd=installed)
    assert output.stdout == "None\n"
    note = installed / "linkrx/_core/_built.py"
    note.write_text('SOURCES = "0123456789abcdef"\n')
    why = reason(installed)
    assert STALE in why
    assert (
        f"({sources_hash()}) than this linkrx has (0123456789abcdef) and is not used: install linkrx again"
        in why
    )
    assert python("-c", WARNED, cwd=installed).stdout.endswith(f": {why}\nos_readv\nos_readv\n")
    note.unlink()
    assert "than this linkrx has (unknown)" in reason(installed)


@needs_sources
@pytest.mark.skipif(_core.lib is None, reason="the C core was not built")
def test_a_core_of_another_version_in_a_checkout(checkout: Path) -> None:
    """After a C file was edited, the old core is refused, and linkrx says that it must be built again."""
    put_core(checkout)
    output = python("-c", "from linkrx import _core; print(_core.reason)", cwd=checkout)
    assert output.stdout == "None\n"
    with (checkout / "linkrx/_core/readv.c").open("a") as file:
        file.write("/* edited */\n")
    why = reason(checkout)
    assert STALE in why
    assert why.endswith(f"type `python3 -m pip install -e .` in {checkout}")
    doctor = python("-m", "linkrx", "doctor", cwd=checkout)
    assert re.search(rf"^C core +no: the C core .* {STALE}", doctor.stdout, re.MULTILINE)


def test_a_core_without_a_hash(installed: Path) -> None:
    """A core without a hash, and one that cannot be loaded, are refused with different reasons."""
    core = installed / "linkrx/_core"
    (core / "_native.py").write_text("class lib: pass\nclass ffi: string = staticmethod(bytes)\n")
    assert f"{STALE} (unknown)" in reason(installed)
    (core / "_native.py").unlink()
    (core / "_native.abi3.so").write_bytes(b"no library")
    why = reason(installed)
    assert why.startswith("the C core cannot be loaded (")
    assert "_native.abi3.so" in why
