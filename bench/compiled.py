"""Compiles the C files of this folder, and ends programs that read lines."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def library(name: str) -> ctypes.CDLL:
    """Compile NAME.c for this processor, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, f"{name}.so")
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", built, source], check=True
        )
        return ctypes.CDLL(str(built))


def end(process: subprocess.Popen[str]) -> None:
    """Close the standard input of a process, which ends it, and wait."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(30)
    process.stdout.close()
