"""The cffi build of the C core: every header here is declared, every C file compiled.

A backend that needs C adds `name.h` and `name.c`; nothing else is edited. The headers are read by cffi and
by the compiler alike, so they hold plain declarations and numbers, no guards and no includes.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = sorted(path.name for path in HERE.glob("*.h"))
SOURCES = sorted(path.name for path in HERE.glob("*.c") if path.name != "_native.c")

ffibuilder = FFI()
ffibuilder.cdef("\n".join((HERE / name).read_text() for name in HEADERS))
ffibuilder.set_source(
    "linkrx._core._native",
    "#include <stdint.h>\n" + "\n".join(f'#include "{name}"' for name in HEADERS),
    sources=[f"linkrx/_core/{name}" for name in SOURCES],
    depends=[f"linkrx/_core/{name}" for name in HEADERS]
    + [f"linkrx/_core/{path.name}" for path in HERE.glob("*.inc")],
    include_dirs=["linkrx/_core"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
    # Without a compiler linkrx still installs, and says at run time what is missing.
    optional=True,
)
