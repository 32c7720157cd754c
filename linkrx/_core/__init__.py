"""The compiled core, when it was built: the only module that says ffi.

`lib` holds the C functions and `reason` is None; without the core `lib` is None and `reason` is a sentence
that says why and what to type.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

lib: Any
_native: Any
try:
    _native = import_module("linkrx._core._native")
except ImportError as error:
    lib = None
    reason: str | None = (
        f"the C core was not built when linkrx was installed ({error}); install a C compiler and the "
        "Python headers (Debian: apt install gcc python3-dev) and install linkrx again"
    )
else:
    lib = _native.lib
    reason = None


def new(declaration: str, **fields: object) -> Any:
    """A C object, its fields set. It lives as long as what this returns; pass that to functions of `lib`."""
    return _native.ffi.new(declaration, fields)


def address(buffer: object) -> int:
    """The address of a writable buffer, as C's uintptr_t. Whoever takes it keeps the buffer alive."""
    return int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(buffer, require_writable=True)))


def pointer(thing: object) -> int:
    """Where C finds what `new` returned. Whoever takes it keeps that alive."""
    return int(_native.ffi.cast("uintptr_t", thing))


def function(name: str) -> Any:
    """A function of `lib` as C sees it, for `pointer`."""
    return _native.ffi.addressof(lib, name)


def last_error() -> int:
    """The errno of the C call before."""
    return int(_native.ffi.errno)
