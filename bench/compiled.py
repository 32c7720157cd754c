"""The C files of this folder as libraries, and other programs that are spoken to line by line."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def library(name: str) -> ctypes.CDLL:
    """NAME.c, compiled for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, f"{name}.so")
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", built, source], check=True
        )
        return ctypes.CDLL(str(built))


def end(process: subprocess.Popen[str]) -> None:
    """Let a process end that reads lines until there are no more."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(30)
    process.stdout.close()
