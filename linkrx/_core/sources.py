"""The hash of the C sources that a core was compiled from. setup.py runs this file, so it imports nothing of linkrx."""

from __future__ import annotations

import hashlib
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The file that cffi generates from build.py. Older versions of cffi leave it beside the sources.
GENERATED = "_native.c"


def sources_hash() -> str | None:
    """The hash over build.py and all C sources beside and below this file; None in a wheel, which has none.

    Python and C each declare the structures and numbers that they share. So a core is used only if this hash is the same as when
    it was compiled.
    """
    paths = (
        path.relative_to(HERE).as_posix() for path in HERE.rglob("*.*") if path.suffix in (".c", ".h", ".inc")
    )
    names = sorted(path for path in paths if path != GENERATED)
    if not names:
        return None
    hashed = hashlib.sha256()
    for name in ["build.py", *names]:
        text = (HERE / name).read_bytes()
        hashed.update(f"{name} {len(text)}\n".encode() + text)
    return hashed.hexdigest()[:16]
