"""Capture files as sources: recognising, opening, reading and decompressing them."""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, repeat
from pathlib import Path
from typing import Protocol, runtime_checkable

from linkrx.errors import UnsupportedSource
from linkrx.kernel.errnos import NOWAIT_UNKNOWN
from linkrx.memory.framing import FILE_LINK_TYPE, FILE_SWAPPED, OF_FILE
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.file_filter import FileFilters

LARGEST_RECORDED = 262_144  # MAXIMUM_SNAPLEN of libpcap, as in _core/capture_file.h

GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952
_GZIP_BITS = 31  # wbits of zlib: the largest window, with a gzip header
_COMPRESSED_BYTES = 64 * 1024

# Magic numbers of capture files, in both byte orders: see _core/capture_file.c.
_SECTION, _PCAP_MAGICS = b"\x0a\x0d\x0d\x0a", (0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34)
_MAGICS = frozenset(
    {_SECTION} | {struct.pack(order, magic) for order in ("<I", ">I") for magic in _PCAP_MAGICS}
)
_INTERFACE, _PACKETS = 1, (2, 3, 6)  # blocks of pcapng

# A Python that was built with musl may lack it.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)

# The result of a read: the number of bytes in the given memory, or the bytes. The C call that reads also extends the list, so that
# an exception of a signal handler cannot come between and lose data.
Got = list[int | bytes]
Read = Callable[[Got, memoryview], None]


@runtime_checkable
class BinaryFile(Protocol):
    """A binary file to read from. It has `read`, as the result of `open(path, "rb")` has."""

    def read(self, size: int, /) -> bytes: ...


class CaptureFile:
    """A pcap or pcapng file as a source. It may be compressed by gzip, which its first byte shows.

    `file` is a path or a binary file. Each `linkrx.open` opens a path, and its close closes it. A binary file is borrowed, and read
    from its current position: `open(path, "rb")`, `io.BytesIO`, `sys.stdin.buffer`, `gzip.open(path)`. A file with a
    descriptor is read through the descriptor, and reading never waits. Another file is read by its `readinto` or `read`, which
    may wait.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryFile) -> None:
        if not isinstance(file, (str, os.PathLike)) and not _is_binary(file):
            raise TypeError(f"CaptureFile({file!r}): give a path, or a binary file such as open(path, 'rb')")
        self.file = file

    def __repr__(self) -> str:
        return f"CaptureFile({self.file!r})"

    @property
    def name(self) -> str:
        """The path, or the `name` of the file object, or its type."""
        if isinstance(self.file, (str, os.PathLike)):
            return os.fsdecode(self.file)
        name = getattr(self.file, "name", None)
        return name if isinstance(name, str) else type(self.file).__name__

    def probe(self) -> Capabilities:
        """The result of `linkrx.probe`. Reads the beginning of a regular file that is given as a path."""
        file_type = _first_type(self.file) if isinstance(self.file, (str, os.PathLike)) else None
        return Capabilities(
            kind="capture_file",
            socket=False,
            largest_frame=LARGEST_RECORDED,
            path=self.name,
            owned=isinstance(self.file, (str, os.PathLike)),
            file_type=file_type,
        )


def _is_binary(file: object) -> bool:
    """Whether bytes can be read from a file object, as far as it says."""
    if not isinstance(file, BinaryFile) or isinstance(file, io.TextIOBase):
        return False
    return not isinstance(file, io.IOBase) or file.closed or file.readable()


def capture_of(source: CaptureFile | os.PathLike[str]) -> CaptureFile:
    """The source as a CaptureFile. A path stands for one."""
    return source if isinstance(source, CaptureFile) else CaptureFile(source)


@contextmanager
def perhaps_a_file(name: str) -> Iterator[None]:
    """Raise a better UnsupportedSource if the name is no interface, but a file."""
    try:
        yield
    except UnsupportedSource as error:
        try:
            is_file = bool(name) and not stat.S_ISDIR(os.stat(name).st_mode)  # noqa: PTH116 # Path takes "" for "."
        except (OSError, ValueError):  # not there; too long, or with a zero byte
            is_file = False
        if not is_file:
            raise
        raise UnsupportedSource(
            f"{name!r} is no interface, but a file: linkrx.open(linkrx.CaptureFile({name!r})) reads a capture file"
        ) from error


def _first_type(path: str | os.PathLike[str]) -> int | None:
    """The link type of the first packet, if the beginning of a regular file shows it, else None. Raises UnsupportedSource for a
    directory, a missing file, or a regular file that is no capture file.
    """
    path = os.fsdecode(path)
    shown = repr(path)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 # Path takes "" for "."
        if stat.S_ISDIR(mode):
            raise UnsupportedSource(f"{shown} is a directory: give the path of a capture file")
        if not stat.S_ISREG(mode):
            return None  # reading from a pipe would consume data
        with Path(path).open("rb", buffering=0) as file:
            begin = file.read(4) or b""
            found = _link_type_in(file, begin) if begin in _MAGICS else None
    except OSError as error:
        raise UnsupportedSource(f"reading the capture file {shown}: {error.strerror}") from error
    if begin not in _MAGICS and not begin.startswith(GZIP_MAGIC):
        raise UnsupportedSource(
            f"{shown} is no capture file: it begins with {begin.hex(' ') or 'nothing'}, which is not pcap, pcapng or gzip. "
            "The command `file` shows its type"
        )
    if found is None:
        return None
    link_type, little = found
    return OF_FILE | link_type | (0 if little == (sys.byteorder == "little") else FILE_SWAPPED)


def _link_type_in(file: io.FileIO, begin: bytes) -> tuple[int, bool] | None:
    """The link type, and whether the file is little-endian. None if the file is damaged; reading it reports that."""

    def words(at: int, count: int) -> tuple[int, ...]:
        file.seek(at)
        return struct.unpack(order + f"{count}I", file.read(4 * count))

    try:
        if begin != _SECTION:
            order = "<" if int.from_bytes(begin, "little") in _PCAP_MAGICS else ">"
            return words(20, 1)[0] & FILE_LINK_TYPE, order == "<"
        file.seek(8)
        order = "<" if file.read(4) == b"\x4d\x3c\x2b\x1a" else ">"
        interface = words(4, 1)[0]
        kind, length, described = words(interface, 3)
        if kind != _INTERFACE or words(interface + length, 1)[0] not in _PACKETS:
            return None
    except struct.error:
        return None
    return (described & 0xFFFF if order == "<" else described >> 16), order == "<"


class CaptureReader:
    """An open capture file. `fd` can be polled. It is readable when reading does not wait."""

    def __init__(self, capture: CaptureFile) -> None:
        self.name = capture.name
        self.filters = FileFilters()
        self.fd = -1
        self._owned = -1  # the descriptor to close
        self._always = -1  # a readable eventfd, for a file that cannot be polled
        file = capture.file
        try:
            if isinstance(file, (str, os.PathLike)):
                self._owned = fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                read = self._by_descriptor(fd)
            else:
                found = _descriptor_of(file)
                read = _by_method(file) if found is None else _borrowed(file, self._by_descriptor(found))
            self._content = _Content(read)
            self.read = self._content.read
            if self.fd < 0:
                self.fd = self._always = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self.close()
            raise

    # Read into the memory without waiting, and append the number of bytes to the list, or the bytes. 0 or b"": the file has
    # ended. Raises BlockingIOError if no data is there now, OSError, EOFError for truncated compressed data, and zlib.error for
    # invalid compressed data.
    read: Read

    @property
    def goes_on(self) -> bool:
        """Whether `read` may return more although the descriptor is not readable."""
        return self._content.goes_on

    def _by_descriptor(self, fd: int) -> Read:
        if not _can_be_polled(fd):
            return _plain_read(fd)  # a regular file, which only waits for the disk
        self.fd = fd
        return _patient_read(fd)

    def finish(self) -> None:
        """Make `fd` unreadable after the end of the file."""
        if self._always >= 0:
            with suppress(BlockingIOError):
                os.eventfd_read(self._always)

    def close(self) -> None:
        """Close the descriptors that this object opened. Idempotent."""
        owned, self._owned = self._owned, -1
        if owned >= 0:
            os.close(owned)
        always, self._always = self._always, -1
        if always >= 0:
            os.close(always)


def _descriptor_of(file: BinaryFile) -> int | None:
    """The descriptor of a file or socket object, which may be buffered. None for other files: a GzipFile has a descriptor, too, but
    its contents differ.
    """
    raw: object = file.raw if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if not isinstance(raw, (io.FileIO, socket.SocketIO)):
        return None
    try:
        return raw.fileno()
    except ValueError as error:
        raise UnsupportedSource(f"{file!r}: {error}") from error


def _can_be_polled(fd: int) -> bool:
    """Whether epoll takes the descriptor. epoll_ctl(2) fails with EPERM for regular files, block devices and /dev/null."""
    with select.epoll() as epoll:
        try:
            epoll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True


def _plain_read(fd: int) -> Read:
    def read(got: Got, memory: memoryview) -> None:
        got.extend(map(os.readv, (fd,), ([memory],)))

    return read


def _patient_read(fd: int) -> Read:
    """A read from a pipe or socket that never waits. O_NONBLOCK would affect every process that has the file open."""
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    plain, nowait = _plain_read(fd), _NOWAIT

    def read(got: Got, memory: memoryview) -> None:
        nonlocal nowait
        if not ready.poll(0):
            raise BlockingIOError
        if nowait is not None:
            # RWF_NOWAIT, because another reader of the pipe may take the data after poll.
            try:
                got.extend(map(os.preadv, (fd,), ([memory],), (-1,), (nowait,)))
            except OSError as error:
                if error.errno not in NOWAIT_UNKNOWN:
                    raise
                nowait = None
            else:
                return
        plain(got, memory)

    return read


def _by_method(file: BinaryFile) -> Read:
    """A read from a file without a descriptor. Raises ValueError if the file's method breaks the rules of files."""
    readinto: Callable[[memoryview], int | None] | None = getattr(file, "readinto1", None) or getattr(
        file, "readinto", None
    )

    def is_valid(result: object, room: int) -> bool:
        if readinto is None:
            return isinstance(result, (bytes, bytearray)) and len(result) <= room
        return isinstance(result, int) and 0 <= result <= room

    def read(got: Got, memory: memoryview) -> None:
        if readinto is None:
            got.extend(map(file.read, (len(memory),)))
        else:
            got.extend(map(readinto, (memory,)))  # type: ignore[arg-type] # None is handled below
        result: object = got[0] if got else "nothing, but raised StopIteration"
        if is_valid(result, len(memory)):
            return
        got.clear()
        if result is None:  # a non-blocking file without data
            raise BlockingIOError
        call = "read" if readinto is None else "readinto"
        shown = f"{len(result)} bytes" if isinstance(result, (bytes, bytearray)) else repr(result)
        raise ValueError(f"{file!r}: its {call}() returned {shown}, and was asked for {len(memory)} bytes")

    return read


def _borrowed(file: BinaryFile, behind: Read) -> Read:
    """A read from a file object with a descriptor, until it is closed: then the descriptor may be another file's."""
    drained = _drained(file, behind)

    def read(got: Got, memory: memoryview) -> None:
        if getattr(file, "closed", False):
            raise OSError(errno.EBADF, "the file was closed")
        drained(got, memory)

    return read


def _drained(file: BinaryFile, behind: Read) -> Read:
    """A read that empties the buffer of a buffered file, and then reads its descriptor."""
    if not isinstance(file, (io.BufferedReader, io.BufferedRandom)):
        return behind
    ready = select.poll()
    ready.register(file, select.POLLIN)
    drained = False

    def read(got: Got, memory: memoryview) -> None:
        nonlocal drained
        if drained:
            behind(got, memory)
            return
        if not ready.poll(0):  # peek() waits if the buffer is empty
            raise BlockingIOError
        buffered = min(len(file.peek(1)), len(memory))
        if buffered:
            got.extend(map(file.readinto, (memory[:buffered],)))
        else:
            behind(got, memory)
        drained = buffered < len(memory)

    return read


class _Content:
    """The contents of a file, inflated if it is compressed. The first byte decides: no capture file begins as gzip does."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._begin: Got = []  # the first piece of the file, until `read` has returned it
        self._memory = memoryview(bytearray(_COMPRESSED_BYTES))
        self._inflate: _Inflate | None = None
        self._plain = False

    @property
    def goes_on(self) -> bool:
        """As CaptureReader's."""
        return bool(self._begin) or (self._inflate is not None and self._inflate.goes_on)

    def read(self, got: Got, memory: memoryview) -> None:
        """As CaptureReader.read."""
        if self._inflate is not None:
            self._inflate.read(got, memory)
        elif self._plain and not self._begin:
            self._read(got, memory)
        else:
            self._look(got, memory)

    def _look(self, got: Got, memory: memoryview) -> None:
        if not self._begin:
            self._read(self._begin, self._memory)
        first = self._begin[0]
        if isinstance(first, int):
            self._begin[0] = first = bytes(self._memory[:first])
        if first.startswith(GZIP_MAGIC[:1]):
            self._inflate = _Inflate(self._read, self._memory, self._begin)
            self._begin = []
            self._inflate.read(got, memory)
        else:
            self._plain = True
            got.extend(map(self._begin.pop, (0,)))


class _Inflate:
    """Inflates gzip data, member by member (RFC 1952)."""

    def __init__(self, read: Read, memory: memoryview, begin: Got) -> None:
        self._read = read
        self._zlib = zlib.decompressobj(_GZIP_BITS)
        self._compressed = begin  # at most one piece that was read, and not given to zlib yet
        self._memory = memory
        self._full = False  # the last output filled the memory, so zlib may hold more

    @property
    def goes_on(self) -> bool:
        """As CaptureReader's."""
        held = self._zlib.unconsumed_tail or self._zlib.unused_data.strip(b"\0")
        return self._full or bool(held) or self._compressed not in ([], [0])

    def read(self, got: Got, memory: memoryview) -> None:
        """As CaptureReader.read."""
        while True:
            if not self._compressed:
                self._fetch()
                continue
            first = self._compressed[0]
            if isinstance(first, int):  # the number of bytes in the memory
                if first == 0:
                    # The rest of zlib's output.
                    got.extend(map(self._zlib.decompress, (b"",), (len(memory),)))
                    if got[0]:
                        return
                    break
                self._compressed[0] = bytes(self._memory[:first])
                continue
            # One C call takes the piece out of the list, inflates it and extends `got`, so that no signal handler runs between.
            self._full = True
            pieces = iter(self._compressed.pop, None)
            got.extend(islice(map(self._zlib.decompress, pieces, repeat(len(memory))), 1))  # type: ignore[arg-type]
            inflated = got[0]
            self._full = isinstance(inflated, bytes) and len(inflated) == len(memory)
            if inflated:
                return
            got.clear()
        if not self._zlib.eof:
            got.clear()
            raise EOFError("the compressed data end too early")

    def _fetch(self) -> None:
        """Get more compressed data: the input that zlib has left, the next member, or the next piece of the file."""
        if self._zlib.eof:
            # Zeroes may follow a member, as on tapes. `unused_data` has all input after the member.
            behind, fresh = self._zlib.unused_data.lstrip(b"\0"), zlib.decompressobj(_GZIP_BITS)
            if behind:
                rest: Got = [behind]
                self._compressed, self._zlib = rest, fresh
                return
        elif self._zlib.unconsumed_tail or self._full:
            self._compressed.append(self._zlib.unconsumed_tail)
            return
        self._read(self._compressed, self._memory)
        if self._compressed[0] == b"":  # the end of the file, from a `read` method
            self._compressed[0] = 0
