"""Binary files to record to, and to read, that break the rules of files, that are closed meanwhile, or that several threads use."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import captures
from support.captures import Recorded
from support.interruptions import After, Interrupted
from support.protocols import GOOD

import linkrx
from linkrx import _core

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)

FRAMES = list(GOOD.values())
FILE = captures.pcap([Recorded(frame, len(frame), 10**9) for frame in FRAMES])


def packets() -> list[linkrx.Packet]:
    """One packet of each protocol."""
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(FILE))) as rx:
        return list(rx)


DESCRIPTOR = 500  # no other file of this process gets it: the kernel gives the lowest free one


def open_there(path: Path, flags: int) -> int:
    """Open a file with the descriptor DESCRIPTOR."""
    opened = os.open(path, flags)
    try:
        return os.dup2(opened, DESCRIPTOR, inheritable=False)
    finally:
        os.close(opened)


class Odd:
    """A file whose `write` returns what it is told to from its second call on."""

    def __init__(self, result: object) -> None:
        self.result, self.calls = result, 0

    def write(self, data: memoryview) -> int:
        """Return the result, and never a thousand times."""
        self.calls += 1
        assert self.calls < 1000, "write() is called without end"
        return len(data) if self.calls == 1 else self.result  # type: ignore[return-value]


@pytest.mark.parametrize("result", [0, -1, 10**6, None, "5", 1.5])
def test_a_write_that_returns_no_number_of_bytes(result: object) -> None:
    """A `write` whose result is no number of bytes that it can have written raises RecordingFailed, and is not called again."""
    file = Odd(result)
    out = linkrx.PcapWriter(file)
    with pytest.raises(linkrx.RecordingFailed, match=r"its write\(\) returned .*; 0 packets are whole"):
        out.write(packets()[0])
    calls = file.calls
    out.close()
    assert (file.calls, out.packets) == (calls, 0)


def test_a_raw_file_without_room() -> None:
    """None from a raw file means that it is non-blocking and full, which is the error of the kernel for that."""

    class Full(io.RawIOBase):
        def write(self, _data: object, /) -> None:
            return None

        def writable(self) -> bool:
            return True

    with pytest.raises(linkrx.RecordingFailed, match="Resource temporarily unavailable"):
        linkrx.PcapWriter(Full())


def test_a_file_that_is_not_open_for_writing(tmp_path: Path) -> None:
    """A file that is open for reading only is refused with what to give."""
    path = tmp_path / "some.pcap"
    path.write_bytes(FILE)
    for buffering in (0, -1):
        with (
            path.open("rb", buffering=buffering) as file,
            pytest.raises(TypeError, match=r"open\(path, 'wb'\)"),
        ):
            linkrx.PcapWriter(file)
    assert path.read_bytes() == FILE


@contextmanager
def named_temporary(folder: Path) -> Iterator[tuple[Any, Callable[[], bytes]]]:
    """A file of tempfile.NamedTemporaryFile, and a function that returns what others find in it."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        yield file, Path(file.name).read_bytes


@contextmanager
def socket_both_ways(_folder: Path) -> Iterator[tuple[Any, Callable[[], bytes]]]:
    """A file for reading and writing of a stream socket, and a function that returns what its peer got."""
    near, far = socket.socketpair()
    got = bytearray()

    def received() -> bytes:
        got.extend(far.recv(1 << 20, socket.MSG_DONTWAIT))
        return bytes(got)

    with near, far, near.makefile("rwb") as file:
        yield file, received


@pytest.mark.parametrize("form", ["pcap", "pcapng"])
@pytest.mark.parametrize("kind", [named_temporary, socket_both_ways])
def test_files_that_have_a_buffer_of_their_own(kind: Any, form: Any, tmp_path: Path) -> None:
    """When `write` returns, the records are in a temporary file that has a name, and at the peer of a socket."""
    given = packets()
    with kind(tmp_path) as (file, written):
        out = linkrx.PcapWriter(file, format=form)
        for count, packet in enumerate(given, 1):
            out.write(packet)
            found = captures.read(io.BytesIO(written()))
            assert [one.data for one in found] == [one.tobytes() for one in given[:count]]
        out.close()


def test_a_socket_whose_peer_has_closed() -> None:
    """The error of a file that has a buffer of its own is raised by `write`, and the packets of that call do not count."""
    near, far = socket.socketpair()
    given = packets()
    with (
        near,
        suppress(BrokenPipeError),
        near.makefile("rwb") as file,
    ):  # closing the file writes its buffer again
        out = linkrx.PcapWriter(file)
        out.write(given[0])
        far.close()
        with pytest.raises(linkrx.RecordingFailed, match="1 packets are whole") as caught:
            out.write(given[1])
        assert (caught.value.errno, out.packets) == (errno.EPIPE, 1)
        out.close()


class Answers:
    """A file whose methods do what they are told to from their second call on."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.answer, self.calls = answer, 0

    def read(self, size: int) -> Any:
        """Read the beginning of a file, then what was given."""
        self.calls += 1
        return FILE[:100] if self.calls == 1 else self.answer(size)


class AnswersInto(Answers):
    """The same for readinto."""

    def readinto(self, memory: memoryview) -> Any:
        """Read the beginning of a file, then return what was given."""
        self.calls += 1
        if self.calls > 1:
            return self.answer(len(memory))
        memory[:100] = FILE[:100]
        return 100


def ends_its_iterator(_size: int) -> bytes:
    """Raise StopIteration, as next() does in a method that reads from an iterator."""
    return next(iter([]))


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        *(
            (Answers, answer)
            for answer in (lambda size: bytes(size + 1), lambda _: "text", lambda _: 5, ends_its_iterator)
        ),
        *(
            (AnswersInto, answer)
            for answer in (
                lambda size: size + 1,
                lambda _: -1,
                lambda _: 1 << 70,
                lambda _: 1.5,
                ends_its_iterator,
            )
        ),
    ],
)
def test_a_read_that_breaks_the_rules(kind: type[Answers], answer: Callable[[int], Any]) -> None:
    """An impossible result of a file's method raises ValueError that shows it. No bytes are skipped, and stop() works."""
    with linkrx.open(linkrx.CaptureFile(kind(answer))) as rx:
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"its read(into)?\(\) returned .*, and was asked for \d+ bytes"
            ):
                list(rx)
        rx.stop()
        assert list(rx) == []


def test_an_error_that_is_none_of_the_kernel() -> None:
    """An OSError without an errno propagates from a file's method, and reading goes on at the next call."""

    def fails_once(_size: int) -> bytes:
        if file.calls == 2:
            raise OSError("the server does not answer")
        return FILE[100:] if file.calls == 3 else b""

    file = Answers(fails_once)
    with linkrx.open(linkrx.CaptureFile(file)) as rx:
        with pytest.raises(OSError, match="the server does not answer"):
            rx.recv()  # the first packet is longer than the beginning
        assert [bytes(packet) for packet in rx] == FRAMES


def test_files_that_are_not_open_for_reading_bytes(tmp_path: Path) -> None:
    """A text file, and a file that is open for writing only, are refused with what to give."""
    path = tmp_path / "some.pcap"
    with path.open("w") as text, path.open("wb") as binary, path.open("wb", buffering=0) as raw:
        for file in (text, binary, raw, io.StringIO()):
            with pytest.raises(TypeError, match=r"open\(path, 'rb'\)"):
                linkrx.CaptureFile(file)  # type: ignore[arg-type]


def test_paths_as_bytes(tmp_path: Path) -> None:
    """An os.PathLike may give its path as bytes, which need not be UTF-8, as the entries of os.scandir(b".") do."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pcap")).write_bytes(FILE)
    (entry,) = os.scandir(os.fsencode(tmp_path))
    with linkrx.open(entry) as rx:  # type: ignore[arg-type] # a PathLike[bytes]
        assert [bytes(packet) for packet in rx] == FRAMES


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_a_file_that_is_closed_while_it_is_recorded_to(tmp_path: Path, buffering: int, form: str) -> None:
    """Once the borrowed file is closed, nothing is written to the file that has its descriptor now."""
    file = os.fdopen(open_there(tmp_path / "out", os.O_WRONLY | os.O_CREAT), "wb", buffering)
    out = linkrx.PcapWriter(file, format=form)  # type: ignore[arg-type]
    first, *rest = packets()
    out.write(first)
    file.close()
    other = open_there(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(linkrx.RecordingFailed, match="the file was closed; 1 packets are whole"):
            out.write(rest[0])
        out.close()
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)
    assert [one.data for one in captures.read(tmp_path / "out")] == [first.tobytes()]


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_file_that_is_closed_while_it_is_read(tmp_path: Path, buffering: int) -> None:
    """Once the borrowed file is closed, nothing is read of the file that has its descriptor now."""
    path = tmp_path / "some.pcap"
    path.write_bytes(FILE)
    file = os.fdopen(open_there(path, os.O_RDONLY), "rb", buffering)
    with linkrx.open(linkrx.CaptureFile(file)) as rx:
        file.close()
        other = open_there(path, os.O_RDONLY)
        try:
            with pytest.raises(OSError, match=r"the file was closed|Bad file descriptor"):
                rx.recv(0)
            assert os.lseek(other, 0, os.SEEK_CUR) == 0
        finally:
            os.close(other)


@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_threads_that_record_to_one_file(form: str) -> None:
    """Several threads may write at once: each packet is whole in the file."""
    file, given, count = io.BytesIO(), packets(), 4

    def record() -> None:
        for packet in given * 20:
            out.write(packet)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with linkrx.PcapWriter(file, format=form) as out:  # type: ignore[arg-type]
            threads = [threading.Thread(target=record) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert out.packets == count * 20 * len(given)
    got = sorted(one.data for one in captures.read(io.BytesIO(file.getvalue())))
    assert got == sorted(packet.tobytes() for packet in given * 20 * count)


def test_writing_from_within_a_write() -> None:
    """A signal handler that comes during a `write` cannot write or close, and the file stays whole."""
    given = packets()
    refused: list[str] = []

    class Interrupted(io.BytesIO):
        def write(self, data: memoryview, /) -> int:  # type: ignore[override]
            if self.tell() and not refused:
                signal.raise_signal(signal.SIGUSR1)
            return super().write(data)

    def handler(*_: object) -> None:
        with pytest.raises(RuntimeError, match="is writing"):
            out.write(given[1])
        with pytest.raises(RuntimeError, match="is writing") as caught:
            out.close()
        refused.append(str(caught.value))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        file = Interrupted()
        out = linkrx.PcapWriter(file)
        out.write(given[0])
        assert len(refused) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    out.write(given[2])
    out.close()
    assert [one.data for one in captures.read(io.BytesIO(file.getvalue()))] == [
        given[0].tobytes(),
        given[2].tobytes(),
    ]


@pytest.mark.only(3, 11)  # the interruptions depend on its instructions
@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_an_exception_of_a_signal_handler_during_a_write(form: str) -> None:
    """After an exception of a signal handler at any point of `write`, the next `write` works, and records and interfaces are whole."""
    given = captures.section() + b"".join(captures.Interface(name=name).block() for name in ("eth7", "br0"))
    given += b"".join(captures.enhanced("<", which, 1, FRAMES[which], len(FRAMES[which])) for which in (0, 1))
    names = ("eth7", "br0") if form == "pcapng" else (None, None)
    both = list(zip(FRAMES[:2], names, strict=True))
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(given))) as source:
        first, second = source
        points, raised = 0, True
        while raised:
            file, after = io.BytesIO(), After(points)
            out = linkrx.PcapWriter(file, format=form, source=source)  # type: ignore[arg-type]
            with suppress(Interrupted), after:
                out.write(first)
            out.write(second)
            out.close()
            with linkrx.open(linkrx.CaptureFile(io.BytesIO(file.getvalue()))) as rx:
                got = [(packet.tobytes(), rx.interface_name(packet.interface)) for packet in rx]
            assert got in (both[1:], both)
            points, raised = points + 1, after.raised
    assert points > 10
