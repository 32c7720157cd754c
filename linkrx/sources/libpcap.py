"""Compiles expressions in tcpdump's language with the system's libpcap, which is loaded on first use."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from linkrx.errors import UnsupportedOption
from linkrx.kernel import bpf
from linkrx.kernel.bpf import Instruction

# The name on Debian, and on most other distributions.
_NAMES = ("libpcap.so.0.8", "libpcap.so.1")

# pcap/dlt.h
DLT_NULL, DLT_EN10MB = 0, 1  # loopback of BSD, Ethernet
DLT_RAW = 12  # IP without a link header
DLT_LINUX_SLL = 113  # Linux cooked
LINK_TYPES = {DLT_EN10MB: "Ethernet", DLT_RAW: "IP without a link header", DLT_LINUX_SLL: "Linux cooked"}

_FILE_HEADER = (
    0xA1B2C3D4,
    2,
    4,
    0,
    0,
    2**31 - 1,
)  # pcap-savefile(5): magic, version, time zone twice, snaplen
_ERROR_BYTES = 256  # pcap/pcap.h PCAP_ERRBUF_SIZE
# libpcap's messages: for an expression that no packet can match, and for one that only works on live packets. pcapng files can
# answer some of the latter.
_NONE_TAKEN = "expression rejects all packets"
_NOT_OF_FILES = "when reading savefiles"

_SNAPLEN = 2**31 - 1  # the return value of a program that accepts a packet
_NETMASK_UNKNOWN = 0xFFFFFFFF  # pcap/pcap.h PCAP_NETMASK_UNKNOWN

# The most seconds to search the place of a syntax error, which libpcap does not report. Names in the expression cost look-ups.
_SEARCH_SECONDS = 1.0
_ENDINGS = ("", " 1", " ip", " host 1.2.3.4", " host 02:00:00:00:00:01", " net 1.0.0.0/8", " = 1")
_ENDINGS_IN_BRACKETS = ("] = 1", "0] = 1")
_SHOWN = 200  # characters of an expression in that message
_WORDS = re.compile(r"[\w.:/\\-]+|[<>=!]=|<<|>>|&&|\|\||\S")

# Before libpcap 1.8 pcap_compile() had global state.
_lock = threading.RLock()  # a signal handler may set a filter, too


class RejectsAll(ValueError):
    """The expression rejects all packets of the link type."""


@dataclass(frozen=True)
class Link:
    """The link type that an expression is for: DLT_*, or LINKTYPE_* of a file in host byte order or `swapped`."""

    number: int
    of_file: bool = False
    swapped: bool = False


class _BpfInsn(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _BpfProgram(ctypes.Structure):
    bf_len: int

    _fields_ = (("bf_len", ctypes.c_uint), ("bf_insns", ctypes.POINTER(_BpfInsn)))


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or the message of the dynamic linker."""
    message = ""
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            message = message or str(error)
            continue
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_open_dead.argtypes = (ctypes.c_int, ctypes.c_int)
        library.pcap_fopen_offline.restype = ctypes.c_void_p
        library.pcap_fopen_offline.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        library.pcap_datalink.argtypes = (ctypes.c_void_p,)
        library.pcap_datalink_val_to_description.restype = ctypes.c_char_p
        library.pcap_geterr.restype = ctypes.c_char_p
        library.pcap_geterr.argtypes = (ctypes.c_void_p,)
        library.pcap_compile.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(_BpfProgram),
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint32,
        )
        library.pcap_freecode.argtypes = (ctypes.POINTER(_BpfProgram),)
        library.pcap_freecode.restype = None
        library.pcap_close.argtypes = (ctypes.c_void_p,)
        library.pcap_close.restype = None
        return library
    return message


def compiled(expression: str, link: Link) -> list[Instruction]:
    """The program for frames of a link type. Raises ValueError with libpcap's message and the place of the mistake, and
    UnsupportedOption without libpcap.
    """
    library = _library()
    if isinstance(library, str):
        raise UnsupportedOption(
            f"filter={expression!r}: libpcap compiles expressions, but it cannot be loaded ({library}). Type "
            "`apt install libpcap0.8` (the name of Debian's package). Instructions need no libpcap: "
            "filter=linkrx.parse_ddd(text), with the output of `tcpdump -ddd` on another host"
        )
    program, message = _compile(library, expression, link)
    if message is not None and link.of_file and _NOT_OF_FILES in message:
        program, message = _compile(library, expression, Link(_datalink(library, link)))
    if message is None:
        _check(program, expression, link)
        return program
    where = _place(library, expression, link, message)
    raise (RejectsAll if _NONE_TAKEN in message else ValueError)(
        f"filter={expression!r} on frames of link type {_described(library, link)}: libpcap says: {message}{where}"
    )


def _check(program: list[Instruction], expression: str, link: Link) -> None:
    """Raise UnsupportedOption for a program that the kernel would refuse: libpcap's `protochain` has a loop. On a file, any length."""
    found = bpf.wrong(program, len(program) if link.of_file else bpf.INSTRUCTIONS_MOST)
    if found is not None:
        loop = ", because `protochain` needs a loop" if "protochain" in expression else ""
        shown = expression if len(expression) <= _SHOWN else f"{expression[:_SHOWN]}..."
        raise UnsupportedOption(
            f"filter={shown!r}: neither the kernel nor linkrx can run what libpcap makes of it{loop}: instruction {found[0]} of "
            f"{len(program)}: {found[1]}"
        )


def _described(library: ctypes.CDLL, link: Link) -> str:
    if not link.of_file:
        return LINK_TYPES[link.number]
    words = library.pcap_datalink_val_to_description(_datalink(library, link))
    return f"{link.number} ({words.decode() if words else 'unknown to libpcap'})"


def _of_file(library: ctypes.CDLL, link: Link) -> int:
    """A handle for a file without packets of this link type."""
    order = {"little": "<>", "big": "><"}[sys.byteorder][link.swapped]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writing, struct.pack(order + "IHHiIII", *_FILE_HEADER, link.number))
    finally:
        os.close(writing)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fdopen.restype = ctypes.c_void_p
    stream = libc.fdopen(reading, b"rb")
    if not stream:
        os.close(reading)
        raise OSError(ctypes.get_errno(), "fdopen")
    message = ctypes.create_string_buffer(_ERROR_BYTES)
    handle: int | None = library.pcap_fopen_offline(stream, message)
    if not handle:
        libc.fclose(ctypes.c_void_p(stream))
        raise UnsupportedOption(
            f"libpcap on a file of link type {link.number}: {message.value.decode(errors='replace')}"
        )
    return handle


def _datalink(library: ctypes.CDLL, link: Link) -> int:
    """The DLT_* number of a LINKTYPE_* number."""
    handle = _of_file(library, link)
    try:
        return int(library.pcap_datalink(handle))
    finally:
        library.pcap_close(handle)


def _compile(library: ctypes.CDLL, expression: str, link: Link) -> tuple[list[Instruction], str | None]:
    """The program and None, or no program and libpcap's message."""
    made = _BpfProgram()
    mask = 0 if link.of_file else _NETMASK_UNKNOWN  # for `ip broadcast`; tcpdump gives 0 for files too
    with _lock:
        handle = _of_file(library, link) if link.of_file else library.pcap_open_dead(link.number, _SNAPLEN)
        if not handle:
            raise MemoryError("pcap_open_dead")
        try:
            if library.pcap_compile(handle, made, expression.encode(), 1, mask) < 0:
                return [], library.pcap_geterr(handle).decode(errors="replace").strip()
            try:
                return [(one.code, one.jt, one.jf, one.k) for one in made.bf_insns[: made.bf_len]], None
            finally:
                library.pcap_freecode(made)
        finally:
            library.pcap_close(handle)


def _place(library: ctypes.CDLL, expression: str, link: Link, message: str) -> str:
    """The place of the mistake: a word that the message names, or the first word after which no ending makes the syntax valid."""
    words = [(word.start(), word.end()) for word in _WORDS.finditer(expression)]
    if "syntax error" in message:
        found = _first_wrong(library, expression, link, words)
    else:
        named = re.findall(r"'([^']+)'|\"([^\"]+)\"|\b(\w*\d\w*)\b", message)
        names = {name for group in named for name in group if name}
        found = next((start for start, end in words if expression[start:end] in names), None)
    if found is None:
        return ""
    if found == len(expression):
        return f", at its end\n  {expression}\n  {' ' * found}^"
    return f", at character {found + 1}\n  {expression}\n  {' ' * found}^"


def _first_wrong(
    library: ctypes.CDLL, expression: str, link: Link, words: Sequence[tuple[int, int]]
) -> int | None:
    until = time.monotonic() + _SEARCH_SECONDS
    for start, end in words:
        begun = expression[:end]
        closing = ")" * max(0, begun.count("(") - begun.count(")"))
        inside = begun.count("[") > begun.count("]")
        for ending in _ENDINGS_IN_BRACKETS if inside else _ENDINGS:
            if "syntax error" not in (_compile(library, begun + ending + closing, link)[1] or ""):
                break
            if time.monotonic() > until:
                return None
        else:
            return start
    return len(expression)
