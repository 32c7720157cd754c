"""Binary files to record to, and to read, that break the rules of files, that are closed meanwhile, or that several threads use."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

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


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_a_file_that_is_closed_while_it_is_recorded_to(tmp_path: Path, buffering: int, form: str) -> None:
    """Once the borrowed file is closed, nothing is written to the file that has its descriptor now."""
    file = (tmp_path / "out").open("wb", buffering=buffering)
    out = linkrx.PcapWriter(file, format=form)  # type: ignore[arg-type]
    first, *rest = packets()
    out.write(first)
    descriptor = file.fileno()
    file.close()
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    try:
        assert other == descriptor
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
    file = path.open("rb", buffering=buffering)
    with linkrx.open(linkrx.CaptureFile(file)) as rx:
        descriptor = file.fileno()
        file.close()
        other = os.open(path, os.O_RDONLY)
        try:
            assert other == descriptor
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
