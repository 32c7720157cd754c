"""Loads the compiled core. No other module uses cffi.

`lib` has the C functions of backends, `types` the types that Python uses once per packet. `reason` is None. If the core is
missing, or was compiled from other sources than those of this linkrx, `lib` and `types` are None, and `reason` says why and what
to type.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from linkrx._core.sources import sources_hash

_HERE = Path(__file__).resolve().parent
_FAILURE = _HERE / "build_failure.txt"  # setup.py writes it


def build_failure() -> str | None:
    """The output of the compiler if the build of the core failed, with a summary in the first line. None if it did not."""
    return _FAILURE.read_text() if _FAILURE.exists() else None


def _wanted() -> str | None:
    """The hash of the sources of this linkrx: computed in a checkout, else the one that setup.py stored."""
    try:
        return sources_hash() or str(import_module("linkrx._core._built").SOURCES)
    except ImportError:
        return None


def _again() -> str:
    """The advice for building the core again."""
    if sources_hash() is None:
        return "install linkrx again, with `python3 -m pip install --force-reinstall linkrx`"
    return f"type `python3 -m pip install -e .` in {_HERE.parent.parent}"


def _why_missing(name: str, error: ImportError) -> str:
    failure = build_failure()
    if failure is not None:
        summary = failure.partition("\n")[0]
        return (
            f"the C core could not be built when linkrx was installed: {summary}; `linkrx doctor` shows the output of the "
            "compiler. Fix the cause, and install linkrx again"
        )
    if "subinterpreters" in str(error):  # CPython refuses cffi's modules there
        return (
            f"isolated subinterpreters cannot load the C core ({error}): use linkrx in the main interpreter"
        )
    if any(_HERE.glob(f"{name}.*so")):
        return f"the C core cannot be loaded ({error}): {_again()}"
    if sources_hash() is not None:
        return (
            f"the C core was not built: Python took linkrx from the checkout in {_HERE.parent.parent}. Build it there with "
            "`python3 -m pip install -e .`, or start the program in another directory to have the linkrx that is installed"
        )
    return f"the C core is not in {_HERE}: {_again()}"


def _load(name: str, built_from: Callable[[Any], str]) -> tuple[Any, str | None]:
    """An extension module of the core, or None and the reason. `built_from` reads the hash that the module was compiled with."""
    try:
        module = import_module(f"linkrx._core.{name}")
    except ImportError as error:
        return None, _why_missing(name, error)
    wanted = _wanted()
    try:
        built = built_from(module)
    except AttributeError:
        built = "unknown"
    if built == wanted:
        return module, None
    return None, (
        f"the C core in {_HERE} was built from other sources ({built}) than this linkrx has ({wanted or 'unknown'}) and is "
        f"not used: {_again()}"
    )


_native, reason = _load("_native", lambda module: module.ffi.string(module.lib.lrx_sources()).decode())
types: Any = None
if _native is not None:
    types, reason = _load("_types", lambda module: module.SOURCES)
lib: Any = None if types is None or _native is None else _native.lib


def new(declaration: str, **fields: object) -> Any:
    """A new C object with these fields. It is freed with the returned object, which functions of `lib` take."""
    return _native.ffi.new(declaration, fields)


def owned(state: Any, free: str) -> Any:
    """A pointer that a function of `lib` returned. `free`, of `lib` too, frees it with the last reference to the result.

    Raises MemoryError for NULL.
    """
    if not state:
        raise MemoryError(f"no memory for what {free}() frees")
    return _native.ffi.gc(state, getattr(lib, free))


def address(buffer: object) -> int:
    """The address of a writable buffer as uintptr_t. The caller must keep the buffer alive."""
    return int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(buffer, require_writable=True)))


def pointer(thing: object) -> int:
    """The address of an object of `new`. The caller must keep the object alive."""
    return int(_native.ffi.cast("uintptr_t", thing))


def at(declaration: str, address: int) -> Any:
    """The C object at an address. The caller must keep it alive."""
    return _native.ffi.cast(declaration, address)


def function(name: str) -> Any:
    """A pointer to a function of `lib`, for `pointer`."""
    return _native.ffi.addressof(lib, name)


def fields(structure: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each field of a C structure."""
    described = _native.ffi.typeof(structure).fields
    return {name: (field.offset, _native.ffi.sizeof(field.type)) for name, field in described}


def text(characters: Any) -> str:
    """A C string as text. Invalid UTF-8 is replaced."""
    return bytes(_native.ffi.string(characters)).decode(errors="replace")


def last_error() -> int:
    """The errno of the last C call."""
    return int(_native.ffi.errno)
