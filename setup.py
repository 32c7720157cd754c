"""What pyproject.toml cannot say: how the C core is compiled, and what happens where it cannot be.

Every extension of the core is built by one rule. Where one cannot be compiled linkrx still installs, without it, and
the package keeps what the compiler said; with LINKRX_REQUIRE_CORE=1 that is an error. Every extension is compiled with
LRX_SOURCES, the hash over all C sources, which linkrx/_core/__init__.py compares when it loads one.
"""

import os
import runpy
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

REQUIRED = os.environ.get("LINKRX_REQUIRE_CORE") == "1"
FLAGS = ["-O2", "-fno-plt", "-fvisibility=hidden", "-std=gnu11", "-Wall", "-Wextra"]
CORE = Path("linkrx/_core")
SOURCES_HASH = runpy.run_path(str(CORE / "sources.py"))["sources_hash"]()

# A free-threaded build has no stable ABI before CPython 3.15, so only the others get an abi3 wheel.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# What both extensions have: classification, and the filters that it runs.
SHARED = ("bpf.c", "bpf_check.c", "bpf_loads.c", "classify.c")

# Beside the one that cffi makes from linkrx/_core/build.py: the types that Python touches once per packet. CPython 3.11 is
# the first whose limited API has the buffer protocol.
EXTENSIONS = [
    Extension(
        "linkrx._core._types",
        [*(str(CORE / name) for name in SHARED), *sorted(str(path) for path in (CORE / "types").glob("*.c"))],
        py_limited_api=not FREE_THREADED,
        define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", "0x030B0000")],
    )
]

KEPT_LINES = 200  # of what the compiler said


@contextmanager
def output_kept(said: list[str]) -> Iterator[None]:
    """Put the lines that this process and its children write into `said`, and then show them."""
    with tempfile.TemporaryFile() as kept:
        sys.stdout.flush()
        sys.stderr.flush()
        before = [os.dup(1), os.dup(2)]
        os.dup2(kept.fileno(), 1)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, fd in enumerate(before, 1):
                os.dup2(fd, number)
                os.close(fd)
            kept.seek(0)
            said += kept.read().decode(errors="replace").splitlines()
            print("\n".join(said), flush=True)


class BuildCore(build_ext):
    """Compiles the core, and keeps what the compiler said when it fails: linkrx/_core/build_failure.txt."""

    failures: list[str]
    in_checkout: bool  # an editable install, or build_ext --inplace

    def run(self) -> None:
        """Compile, then write down of which sources this is the package."""
        self.failures = []
        self.in_checkout = bool(self.inplace or self.editable_mode)
        for extension in self.extensions:
            extension.optional = not REQUIRED
            extension.extra_compile_args = FLAGS
            extension.include_dirs.append(str(CORE))
            extension.define_macros.append(("LRX_SOURCES", f'"{SOURCES_HASH}"'))
        super().run()
        if not self.in_checkout:  # where the sources lie beside the package, they are asked themselves
            self._write(
                Path(self.build_lib),
                "_built.py",
                f'"""Written by setup.py."""\n\nSOURCES = "{SOURCES_HASH}"\n',
            )
        self._write(
            Path() if self.in_checkout else Path(self.build_lib),
            "build_failure.txt",
            "\n".join(self.failures),
        )

    def build_extension(self, extension: Extension) -> None:
        """One of them. What an earlier build made of it goes first: it may be of another version, whatever its time says."""
        for folder in [self.build_lib, *(["."] if self.in_checkout else [])]:
            (Path(folder) / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        said: list[str] = []
        try:
            with output_kept(said):
                super().build_extension(extension)
        except Exception as error:  # of which type differs between versions of setuptools
            self.failures.append(self._account(extension.name, str(error), said))
            raise BaseError(f"{extension.name} could not be compiled: {error}") from error

    def _account(self, name: str, error: str, said: list[str]) -> str:
        """What is told of a failure. The first line is for error messages."""
        compiler = self.compiler.compiler_so[0]
        summary = next(
            (line for line in said if "error:" in line), f"{compiler!r} failed and did not say why"
        )
        if shutil.which(compiler) is None:
            summary = f"there is no C compiler {compiler!r} (Debian: apt install gcc python3-dev)"
        elif "Python.h" in summary:
            summary += " (Debian: apt install python3-dev)"
        if len(said) > KEPT_LINES:
            said[KEPT_LINES:] = [f"... and {len(said) - KEPT_LINES} lines more"]
        return "\n".join([summary, f"{name}:", *(said or [error]), ""])

    def _write(self, folder: Path, name: str, text: str) -> None:
        """A file of the package, or none if there is nothing to write."""
        path = folder / CORE / name
        if text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        else:
            path.unlink(missing_ok=True)


setup(
    cffi_modules=["linkrx/_core/build.py:ffibuilder"],
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildCore},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
