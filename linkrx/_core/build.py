"""The cffi build of the C core: every header here is declared, every C file compiled.

A backend that needs C adds `name.h` and `name.c`, and edits nothing else. cffi has no preprocessor, so it gets the declarations
and numbers of the headers. The compiler includes the headers unchanged. setup.py compiles.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = sorted(path.name for path in HERE.glob("*.h"))
SOURCES = sorted(path.name for path in HERE.glob("*.c") if path.name != "_native.c")

# Lines that only the compiler needs: #include and #pragma.
_FOR_THE_COMPILER = re.compile(r"^#\s*(include|pragma)\b.*$", re.MULTILINE)

ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(_FOR_THE_COMPILER.sub("", (HERE / name).read_text()))
ffibuilder.cdef("const char *lrx_sources(void);")
ffibuilder.set_source(
    "linkrx._core._native",
    "\n".join(f'#include "{name}"' for name in HEADERS)
    + "\n/* linkrx/_core/sources.py; setup.py defines LRX_SOURCES. */"
    + "\nstatic const char *lrx_sources(void) { return LRX_SOURCES; }\n",
    sources=[f"linkrx/_core/{name}" for name in SOURCES],
)
