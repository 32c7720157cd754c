"""Rigs of capture files: pcap and pcapng, on a pipe and as regular files.

A regular file gets all its packets before it is opened. A check that sends after it opened the source does not apply to files:
`send` and `open` raise Inapplicable.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import tempfile
import termios
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from linkrx.receiving.dispatcher import Dispatcher
from linkrx.sources.capture_file import CaptureFile
from linkrx.testing.rigs import Inapplicable, MakeRig, Rig

PIPE_BYTES = 1 << 20  # the most without privilege: /proc/sys/fs/pipe-max-size
PAGE = 4096

# pcap-savefile(5) and draft-ietf-opsawg-pcapng, in host byte order: Ethernet, nanoseconds; pcapng with snaplen 0, no limit.
_PCAP_BEGIN = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 0x40000, 1)
_PCAPNG_BEGIN = struct.pack("=IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
_PCAPNG_BEGIN += struct.pack("=IIHHIHHIII", 1, 32, 1, 0, 0, 9, 1, 9, 0, 32)


def _pcap(frame: bytes) -> bytes:
    return struct.pack("=IIII", 0, 0, len(frame), len(frame)) + frame


def _pcapng(frame: bytes) -> bytes:
    size = 32 + len(frame) + -len(frame) % 4
    head = struct.pack("=IIIIIII", 6, size, 0, 0, 0, len(frame), len(frame))
    return head + frame + bytes(-len(frame) % 4) + struct.pack("=I", size)


class _PipeRig(Rig):
    """A pipe. Each dispatcher reads a new file from its beginning. `open` first discards what the last dispatcher left unread."""

    begin: bytes
    sending: threading.Lock
    reader: int
    writer: int

    def open(self, backend: str, deliver: Any = None, **options: Any) -> Dispatcher:
        """A dispatcher on this source. It has read the file header."""
        with self.sending:
            while waiting := _waiting(self.reader):
                os.read(self.reader, waiting)
            os.write(self.writer, self.begin)
            rx = super().open(backend, deliver, **options)
            came = sum(map(len, rx.batches(0)))
        if came:
            rx.close()
            raise AssertionError(f"{came} packets came out of a file without packets")
        return rx


def _waiting(reader: int) -> int:
    """The number of bytes in the pipe."""
    answer = fcntl.ioctl(reader, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


@contextmanager
def _on_a_pipe(begin: bytes, record: Any) -> Iterator[Rig]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with ExitStack() as stack:
        file = stack.enter_context(io.FileIO(reader, "rb"))
        out = stack.enter_context(io.FileIO(writer, "wb"))
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

        written: deque[int] = deque()  # lengths of the writes that may be unread, oldest first
        sending = threading.Lock()

        def send(frame: bytes) -> None:
            # Write whole records only. A write that does not fit into the last page of the pipe begins a new page: pipe_write().
            made = record(frame)
            if out.closed:
                raise BrokenPipeError
            with sending:
                unread = _waiting(reader)
                while written and sum(written) - written[0] >= unread:
                    written.popleft()
                pages = sum(length // PAGE + 1 for length in (*written, len(made)))
                if pages >= PIPE_BYTES // PAGE:
                    raise BlockingIOError
                assert os.write(writer, made) == len(made)
                written.append(len(made))

        rig = _PipeRig(
            CaptureFile(file),
            send,
            ethernet=True,
            shortest=0,
            longest=65_535,
            hang_up=out.close,
            keeps_unread=False,
        )
        rig.begin, rig.sending, rig.reader, rig.writer = begin, sending, reader, writer
        os.write(writer, begin)  # for a check that opens the source without `open`
        yield rig


class _FileRig(Rig):
    """A regular file. `send` appends to it until it is opened."""

    path: Path
    is_empty: bool
    opened: bool

    def open(self, backend: str, deliver: Any = None, **options: Any) -> Dispatcher:
        """A dispatcher on this source, from its beginning."""
        rx = super().open(backend, deliver, **options)
        if self.is_empty:
            rx.close()
            raise Inapplicable("nothing comes after the end of a file")
        self.opened = True
        return rx


@contextmanager
def _as_a_file(begin: bytes, record: Any) -> Iterator[Rig]:
    maker = threading.get_ident()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recorded"
        path.write_bytes(begin)

        def send(frame: bytes) -> None:
            if rig.opened or threading.get_ident() != maker:
                raise Inapplicable("a file has all its packets before it is opened")
            with path.open("ab") as out:
                out.write(record(frame))
            rig.is_empty = False

        rig = _FileRig(CaptureFile(path), send, ethernet=True, shortest=0, longest=262_144, recorded=True)
        rig.path, rig.is_empty, rig.opened = path, True, False
        yield rig


@contextmanager
def pcap_pipe() -> Iterator[Rig]:
    """pcap on a pipe."""
    with _on_a_pipe(_PCAP_BEGIN, _pcap) as rig:
        yield rig


@contextmanager
def pcapng_pipe() -> Iterator[Rig]:
    """pcapng on a pipe."""
    with _on_a_pipe(_PCAPNG_BEGIN, _pcapng) as rig:
        yield rig


@contextmanager
def pcap_file() -> Iterator[Rig]:
    """A pcap file."""
    with _as_a_file(_PCAP_BEGIN, _pcap) as rig:
        yield rig


@contextmanager
def pcapng_file() -> Iterator[Rig]:
    """A pcapng file."""
    with _as_a_file(_PCAPNG_BEGIN, _pcapng) as rig:
        yield rig


CAPTURE_RIGS: tuple[MakeRig, ...] = (pcap_pipe, pcapng_pipe, pcap_file, pcapng_file)
