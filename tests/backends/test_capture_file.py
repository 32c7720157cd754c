"""A capture file as a source: files, pipes and invalid files; slow, growing, cut and damaged ones."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support import captures
from support.captures import Interface, Pieces, Recorded, frame, read
from support.interruptions import After, Interrupted
from support.run import points

import linkrx
from linkrx import _core
from linkrx.testing.waiting import asleep, running, until

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)


def packets_of(count: int, size: int = 60) -> list[Recorded]:
    """`count` packets, a microsecond apart."""
    return [Recorded(frame(size + n % 7, n), size + n % 7, n * 1000) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of ten thousand packets, which is more than a batch and several reads."""
    made = tmp_path / "some.pcap"
    made.write_bytes(captures.pcap(packets_of(10_000)))
    return made


@contextmanager
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Both ends of a pipe, without buffers."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "wb", buffering=0) as writer:  # noqa: PTH123
        yield reader, writer


# Valid and invalid capture files.


def test_ways_to_name_it(path: Path) -> None:
    """A path, a CaptureFile, and files with and without a buffer, a descriptor or readinto() give the same packets."""
    packets = packets_of(10_000)
    with linkrx.open(path) as rx:
        assert [Recorded.of(packet) for packet in rx] == packets
        assert rx.capabilities.kind == "capture_file"
        assert rx.capabilities.owned
        assert rx.backend == "capture_file"
        assert str(path) in repr(rx)
        with pytest.raises(linkrx.Ended, match="the capture file ended"):
            rx.recv()
    assert read(str(path)) == packets
    with path.open("rb") as file:
        assert read(file) == packets
        assert file.read() == b""
        assert read_fails(file) == "is empty"
    with path.open("rb", buffering=0) as file:
        assert read(file) == packets
    with path.open("r+b") as file:
        assert read(file) == packets
    assert read(io.BytesIO(path.read_bytes())) == packets
    assert read(OnlyRead(path.read_bytes())) == packets


def read_fails(file: object) -> str:
    """The end of the error message."""
    with pytest.raises(linkrx.DamagedCapture) as caught:
        read(file)
    return " ".join(str(caught.value).split()[-2:])


class OnlyRead:
    """A file whose only method is read()."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        """Read at most 777 bytes."""
        return self._file.read(min(size, 777))


def test_a_file_is_read_from_where_it_stands(path: Path) -> None:
    """A file is read from its current position: bytes in its buffer are not lost, and bytes that were read before are not read again."""
    data = b"a header of somebody else" + path.read_bytes()
    path.write_bytes(data)
    with path.open("rb") as file:
        assert file.read(25) == b"a header of somebody else"
        assert read(file) == packets_of(10_000)
    with pipe() as (reader, writer), io.BufferedReader(reader, 100_000) as file:  # type: ignore[type-var]
        writer.write(data[: 25 + 24 + 76 + 16])
        assert file.read(25) == b"a header of somebody else"
        with linkrx.open(linkrx.CaptureFile(file)) as rx:
            writer.write(data[25 + 24 + 76 + 16 : 1000])
            assert bytes(rx.recv(10)) == frame(60, 0)


def test_invalid_capture_files(tmp_path: Path) -> None:
    """An invalid capture file is refused: a path at open, others at the first read. The error says what to type."""
    other = tmp_path / "other"
    other.write_bytes(b"text, not packets")
    with pytest.raises(linkrx.UnsupportedSource, match="begins with 74 65 78 74"):
        linkrx.open(other)
    with pytest.raises(linkrx.DamagedCapture, match="damaged at byte 0: the magic number 0x"):
        read(io.BytesIO(other.read_bytes()))
    with pytest.raises(linkrx.UnsupportedSource, match="No such file"):
        linkrx.probe(tmp_path / "none")
    with pytest.raises(linkrx.UnsupportedSource, match="is a directory"):
        linkrx.probe(tmp_path)
    with pytest.raises(linkrx.UnsupportedSource, match=r"linkrx\.open\(linkrx\.CaptureFile\('.*other'\)\)"):
        linkrx.open(str(other))
    with pytest.raises(TypeError, match="give a path, or a binary file"):
        linkrx.CaptureFile(7)  # type: ignore[arg-type]
    closed = io.FileIO(other)
    closed.close()
    with pytest.raises(linkrx.UnsupportedSource, match="closed file"):
        linkrx.open(linkrx.CaptureFile(closed))


@pytest.mark.parametrize(
    "options",
    [
        {"promiscuous": True},
        {"segment": True},
        {"vnet_header": True},
        {"receive_buffer": 9},
        {"buffer_sizes": [9]},
        {"protocol": 0x0800},
        {"ethernet": True},
        {"ethernet": False},
        {"snaplen": 14},
        {"timestamps": True},
    ],
)
def test_options_that_it_has_not(path: Path, options: Any) -> None:
    """An option that a file cannot honour raises an error that names both."""
    for file, name in ((path, str(path)), (linkrx.CaptureFile(io.BytesIO(path.read_bytes())), "BytesIO")):
        with pytest.raises(linkrx.UnsupportedOption) as caught:
            linkrx.open(file, **options)
        assert next(iter(options)) in str(caught.value)
        assert f"capture file {name}" in str(caught.value)
        assert "vnet_header=True" not in str(caught.value) or "vnet_header" in options


def test_other_backends_refuse_it(path: Path) -> None:
    """Each other backend refuses a file with a reason."""
    assert linkrx.choose(path).backend == "capture_file"
    for info in linkrx.backends():
        if info.name != "capture_file":
            with pytest.raises(linkrx.UnsupportedSource, match=info.name):
                linkrx.open(path, backend=info.name)
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, pytest.raises(linkrx.UnsupportedSource, match="capture_file reads"):
        linkrx.open(receiver, backend="capture_file")


# Event loops.


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_poll_and_drain(path: Path, kind: str) -> None:
    """fileno() is readable until all packets were delivered and the end was reported."""
    got: list[bytes] = []
    source: Any = path if kind == "path" else linkrx.CaptureFile(io.BytesIO(path.read_bytes()))
    with linkrx.open(source, lambda *call: got.append(bytes(call[3])), batch_size=1000) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        while rx.end is None:
            assert poll.poll(0)
            rx.drain()
        assert rx.end is linkrx.End.EOF
    assert got == [one.data for one in packets_of(10_000)]


def test_asyncio(path: Path) -> None:
    """`async for` gives every packet of a file and of a slow pipe, and other tasks run meanwhile."""

    async def count(source: Any) -> tuple[int, int]:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with linkrx.open(source) as rx:
            task = asyncio.create_task(others())
            found = 0
            async for _ in rx:
                found += 1
            task.cancel()
        return found, turns

    found, turns = asyncio.run(count(path))
    assert found == 10_000
    assert turns > 1
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        assert asyncio.run(count(linkrx.CaptureFile(cat.stdout)))[0] == 10_000  # type: ignore[arg-type]


# Pipes.


def test_a_slow_pipe() -> None:
    """A packet is received when its last byte arrives, also if bytes arrive one by one. Reception ends when the writer closes."""
    data = captures.pcap(packets_of(2))
    with pipe() as (reader, writer), linkrx.open(linkrx.CaptureFile(reader)) as rx:
        for place, byte in enumerate(data):
            writer.write(bytes([byte]))
            whole = 1 if place == 24 + 16 + 60 - 1 else 2 if place == len(data) - 1 else 0
            assert [bytes(p) for batch in rx.batches(0) for p in batch] == (
                [frame(59 + whole, whole - 1)] if whole else []
            )
        with pytest.raises(TimeoutError):
            rx.recv(0)
        writer.close()
        assert list(rx) == []
        assert rx.end is linkrx.End.EOF


def test_a_pipe_and_small_batches() -> None:
    """Packets that were read and did not fit in a batch are received without another byte, in a wait, and with fileno() readable."""
    packets = packets_of(40)
    for way in ("wait", "poll"):
        got: list[bytes] = []
        with pipe() as (reader, writer):
            source = linkrx.CaptureFile(reader)
            with linkrx.open(source, lambda *call, got=got: got.append(bytes(call[3])), batch_size=3) as rx:
                poll = select.poll()
                poll.register(rx.fileno(), select.POLLIN)
                writer.write(captures.pcap([]))
                for _ in range(20):  # no packet comes, so linkrx learns to wait before it reads
                    rx.run(duration=0.001)
                rx.drain()
                assert not poll.poll(0)
                writer.write(captures.pcap(packets)[24:])
                if way == "wait":
                    assert rx.run(count=40, duration=30) is None
                while len(got) < 40:
                    assert poll.poll(0), len(got)
                    rx.drain()
                assert got == [one.data for one in packets]
                rx.drain()
                assert not poll.poll(0)


def compressed(data: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """The gzip data of `data`, flushed but without its end."""
    made = zlib.compressobj(9, zlib.DEFLATED, 31)
    return made.compress(data) + made.flush(flush)


@pytest.mark.parametrize("size", [60, 60_000])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_compressed_pipe(size: int, batch_size: int | None) -> None:
    """Each packet that is whole in gzip's output so far is received without another byte, at any compression level.

    Then fileno() is not readable, and reception ends when the writer closes.
    """
    packets = packets_of(60, size)
    data = captures.pcap(packets)
    whole = compressed(data, zlib.Z_FINISH)
    there = compressed(data)
    got: list[bytes] = []
    with pipe() as (reader, writer):
        source = linkrx.CaptureFile(reader)
        with linkrx.open(source, lambda *call: got.append(bytes(call[3])), batch_size=batch_size) as rx:
            poll = select.poll()
            poll.register(rx.fileno(), select.POLLIN)
            for _ in range(20):
                rx.run(duration=0.001)
            rx.drain()
            assert not poll.poll(0)
            writer.write(there)
            while len(got) < 60:
                assert poll.poll(0), len(got)
                rx.drain()
            while rx.drain():
                pass
            while poll.poll(0):  # zlib may have buffered data
                assert rx.drain() == 0
            assert rx.end is None
            writer.write(b"\x03\0" + whole[-8:])  # an empty last block, the checksum, the length
            writer.close()
            assert rx.run() is linkrx.End.EOF
    assert got == [one.data for one in packets]


@pytest.mark.parametrize("kind", ["path", "fifo", "pipe", "buffered", "bytes", "read", "gzip.open"])
def test_gzip_is_detected_by_its_first_byte(tmp_path: Path, kind: str) -> None:
    """gzip is detected by its first byte on a path, a FIFO, a pipe, a file that was peeked, memory, and an object with `read` alone."""
    packets = packets_of(3000)
    data = captures.pcap(packets)
    packed, path = gzip.compress(data[:5000]) + bytes(512) + gzip.compress(data[5000:]), tmp_path / "some"
    if kind in ("path", "buffered", "gzip.open"):
        path.write_bytes(packed)
    if kind == "path":
        assert captures.read(path) == packets
    elif kind == "buffered":
        with path.open("rb") as file:
            file.peek(1)
            assert captures.read(file) == packets
    elif kind == "gzip.open":
        with gzip.open(path) as inflated:
            assert captures.read(inflated) == packets
    elif kind == "bytes":
        assert captures.read(io.BytesIO(packed)) == packets
    elif kind == "read":
        assert captures.read(OnlyRead(packed)) == packets
        assert captures.read(OnlyRead(data)) == packets
    else:
        with pipe() as (reader, writer):
            if kind == "fifo":
                os.mkfifo(path)

            def write() -> None:
                if kind == "fifo":
                    path.write_bytes(packed)
                else:
                    writer.write(packed)
                    writer.close()

            with running(write):
                assert captures.read(path if kind == "fifo" else reader) == packets


def test_a_compressed_pipe_byte_by_byte_and_cut() -> None:
    """A compressed pipe can arrive byte by byte. If the writer closes too early, an error follows the whole packets."""
    packets = packets_of(20)
    packed = gzip.compress(captures.pcap(packets), mtime=0)
    for end in (len(packed), len(packed) - 4, 1):
        got: list[bytes] = []
        with pipe() as (reader, writer), linkrx.open(linkrx.CaptureFile(reader)) as rx:
            for byte in packed[:end]:
                writer.write(bytes([byte]))
                got += [frame for batch in rx.batches(0) for frame in batch.frames()]
            writer.close()
            if end == len(packed):
                got += map(bytes, rx)
            else:
                with pytest.raises(linkrx.DamagedCapture, match="end too early"):
                    got.extend(map(bytes, rx))
        assert got == ([one.data for one in packets] if end > 1 else [])


def dispatches(rx: linkrx.Dispatcher) -> None:
    """Dispatch until the end."""
    while rx.dispatch(30):
        pass


@pytest.mark.parametrize("way", [list, linkrx.Dispatcher.run, dispatches, lambda rx: list(rx.batches())])
def test_stop_ends_a_wait_for_a_pipe(way: Any) -> None:
    """stop() from another thread ends a wait for a silent writer: before the header, within a record and after one."""
    data = captures.pcap(packets_of(1))
    for cut in (0, 10, 30, len(data)):
        with pipe() as (reader, writer), linkrx.open(linkrx.CaptureFile(reader), lambda *_: None) as rx:
            writer.write(data[:cut])
            with running(lambda rx=rx: way(rx)):  # type: ignore[misc]
                until(lambda rx=rx: asleep(rx))  # type: ignore[misc]
                rx.stop()
            assert rx.end is linkrx.End.STOPPED


def test_a_pipe_that_closes_in_a_record() -> None:
    """If the writer closes within a record, an error with the byte follows the whole packets."""
    data = captures.pcap(packets_of(3))
    with pipe() as (reader, writer), linkrx.open(linkrx.CaptureFile(reader)) as rx:
        writer.write(data[:-1])
        writer.close()
        got = [rx.recv(10).tobytes(), rx.recv(10).tobytes()]
        with pytest.raises(linkrx.DamagedCapture, match="the file ends 77 bytes later") as caught:
            rx.recv(10)
        assert caught.value.offset == len(data) - 16 - 62
        assert got == [frame(60, 0), frame(61, 1)]
        with pytest.raises(linkrx.Ended):
            rx.recv(10)


def test_standard_input(path: Path) -> None:
    """A program receives from sys.stdin.buffer the packets that another program writes."""
    program = "import linkrx, sys\nwith linkrx.open(linkrx.CaptureFile(sys.stdin.buffer)) as rx: print(len(list(rx)))"
    with path.open("rb") as file, subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat:
        done = subprocess.run(
            [sys.executable, "-c", program], stdin=cat.stdout, capture_output=True, check=True
        )
    assert done.stdout == b"10000\n"


def test_sockets() -> None:
    """The file of a stream socket is read without waiting for more bytes than have arrived."""
    near, far = socket.socketpair()
    data = captures.pcap(packets_of(2))
    with near, far, near.makefile("rb") as file, linkrx.open(linkrx.CaptureFile(file)) as rx:
        far.sendall(data[:-1])
        assert bytes(rx.recv(10)) == frame(60, 0)
        with pytest.raises(TimeoutError):
            rx.recv(0)
        far.sendall(data[-1:])
        assert bytes(rx.recv(10)) == frame(61, 1)


# Files that change.


def test_a_file_that_grows_and_one_that_is_cut(tmp_path: Path) -> None:
    """Packets that are appended while a file is read are received. A file that is truncated ends there, with an error if that is within a record."""
    path = tmp_path / "grows"
    data = captures.pcap(packets_of(20_000))
    path.write_bytes(data[: len(data) // 2])
    with linkrx.open(path) as rx, path.open("ab") as out:
        batches = rx.batches()
        found = len(next(batches))
        out.write(data[len(data) // 2 :])
        out.flush()
        assert found + sum(map(len, batches)) == 20_000
    with linkrx.open(path) as rx:
        batches = rx.batches()
        next(batches)
        os.truncate(path, len(data) - 7)
        with pytest.raises(linkrx.DamagedCapture):
            for _ in batches:
                pass
    with linkrx.open(path) as rx:
        batches = rx.batches()
        next(batches)
        os.truncate(path, 100)
        with pytest.raises(linkrx.DamagedCapture):
            for _ in batches:
                pass


# Damage.

HEAD = captures.section() + Interface().block()


def record(kind: int, body: bytes, length: int | None = None, behind: int | None = None) -> bytes:
    """A block with chosen lengths."""
    true = 12 + len(body)
    length = true if length is None else length
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length if behind is None else behind)


def body(length: int, interface: int = 0) -> bytes:
    """The body of an enhanced packet block with these fields and 20 bytes of data."""
    return struct.pack("<IIIII", interface, 0, 0, length, length) + bytes(20)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (record(6, body(20), length=0), "a block of 0 bytes"),
        (record(6, body(20), length=11), "a block of 11 bytes"),
        (record(6, body(20), length=53), "a block of 53 bytes"),
        (record(6, body(20), length=2**32 - 4), "a block of 4294967292 bytes"),
        (record(6, body(20), length=16 * 2**20 + 4), "a block of 16777220 bytes"),
        (record(6, body(20), behind=56), "the length at the end of a block is 56 bytes"),
        (record(6, body(21)), "a packet of 21 bytes"),
        (record(6, body(2**32 - 1)), "a packet of 4294967295 bytes"),
        (record(6, body(20, interface=1)), "a packet of interface 1"),
        (record(6, bytes(8)), "a block of 20 bytes"),
        (record(3, struct.pack("<I", 100) + bytes(20)), "a packet of 100 bytes"),
        (record(1, bytes(4)), "a block of 16 bytes"),
        (record(1, struct.pack("<HHIHH", 1, 0, 0, 2, 100)), "option 2 of an interface is longer"),
        (
            record(0x0A0D0D0A, struct.pack("<IHHq", 0x12345678, 1, 0, -1)),
            "the byte-order magic of a section is 0x12345678",
        ),
        (record(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 2, 7, -1)), "version 2.7 of the format"),
        (
            record(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1), behind=0),
            "the length at the end of a block is 0",
        ),
        (record(5, bytes(20), length=400_000), "the file ends"),
    ],
)
def test_damaged_blocks(bad: bytes, said: str) -> None:
    """Packets before a damaged block are delivered. The block ends the file with an error that has its byte and the reason."""
    good = captures.enhanced("<", 0, 5, frame(60), 60)
    got: list[bytes] = []
    data = HEAD + good + bad + good
    for file in (io.BytesIO(data), Pieces(data, 5)):
        got.clear()
        with linkrx.open(linkrx.CaptureFile(file)) as rx:
            with pytest.raises(linkrx.DamagedCapture) as caught:
                for packet in rx:
                    got.append(packet.tobytes())
            assert got == [frame(60)]
            assert said in str(caught.value)
            if "file ends" not in said:
                assert caught.value.offset == len(HEAD + good)
            assert rx.end is linkrx.End.EOF
            assert list(rx) == []
            assert rx.stats().packets == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda rx: rx.run(),
        lambda rx: [rx.dispatch(0) for _ in range(9)],
        lambda rx: [rx.drain() for _ in range(9)],
        lambda rx: [rx.recv(0) for _ in range(9)],
        lambda rx: list(rx.batches()),
        lambda rx: asyncio.run(iterate(rx)),
    ],
)
def test_reception_is_over_after_damage(call: Callable[[linkrx.Dispatcher], object]) -> None:
    """After the error of a damaged file `end` is EOF, fileno() is not readable, and every call reports the end, not the error again."""
    data = captures.pcap(packets_of(2))[:-1]
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), lambda *_: None) as rx:
        rx.fileno()
        with pytest.raises(linkrx.DamagedCapture):
            call(rx)
        assert rx.end is linkrx.End.EOF
        assert not select.select([rx], [], [], 0)[0]
        assert (rx.dispatch(), rx.drain(), rx.run(), list(rx)) == (False, 0, linkrx.End.EOF, [])
        with pytest.raises(linkrx.Ended):
            rx.recv()


async def iterate(rx: linkrx.Dispatcher) -> None:
    """Receive all packets."""
    async for _ in rx:
        pass


@pytest.mark.parametrize("length", [262_145, 2**31, 2**32 - 1])
def test_damaged_records(length: int) -> None:
    """Packets before a pcap record with an invalid length are delivered, and the record ends the file with an error."""
    data = captures.pcap(packets_of(2)) + struct.pack("<IIII", 0, 0, length, length) + bytes(300_000)
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx,
        pytest.raises(linkrx.DamagedCapture) as caught,
    ):
        for _ in rx:
            pass
    assert f"a packet of {length} bytes" in str(caught.value)
    assert caught.value.offset == 24 + 2 * 16 + 60 + 61
    assert caught.value.errno == 74


def test_damaged_gzip(tmp_path: Path) -> None:
    """With compressed data that are cut or changed, whole packets are delivered, and then an error is raised."""
    packets = packets_of(5000)
    packed = gzip.compress(captures.pcap(packets), mtime=0)
    path = tmp_path / "some.pcap.gz"
    for bad, said in (
        (packed[: len(packed) // 2], "end too early"),
        (packed[:-8] + bytes(8), "incorrect data check"),
    ):
        path.write_bytes(bad)
        got = 0
        with linkrx.open(path) as rx, pytest.raises(linkrx.DamagedCapture, match=said):
            for packet in rx:
                assert bytes(packet) == packets[got].data
                got += 1
        assert got > 1000


def test_a_failure_to_read() -> None:
    """An error of the kernel or of a file's read() is raised as an OSError with its errno."""

    class Fails:
        def read(self, size: int, /) -> bytes:
            raise OSError(5, "a bad disk")

    with (
        linkrx.open(linkrx.CaptureFile(Fails())) as rx,
        pytest.raises(OSError, match="Input/output error") as caught,
    ):
        list(rx)
    assert caught.value.errno == 5


def test_blocks_without_end_can_be_stopped() -> None:
    """stop() ends the reading of a file that has only skipped blocks."""

    class Endless(io.RawIOBase):
        began = False

        def readable(self) -> bool:
            return True

        def readinto(self, into: memoryview) -> int:  # type: ignore[override]
            data = (b"" if self.began else HEAD) + captures.block("<", 5, bytes(244)) * 200
            self.began = True
            into[: len(data)] = data
            return len(data)

    with linkrx.open(linkrx.CaptureFile(Endless())) as rx:
        timer = threading.Timer(0.05, rx.stop)
        timer.start()
        assert list(rx) == []
        timer.join()
        assert rx.end is linkrx.End.STOPPED


# Interruption.


def take(got: list[bytes], _remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
    """A deliver that keeps packets."""
    got.append(packet.tobytes())


def sources_of(path: Path) -> dict[str, Any]:
    """One source for each way of reading."""
    data = path.read_bytes()
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(data[:2000]) + gzip.compress(data[2000:]))
    return {
        "path": path,
        "gzip": packed,
        "bytes": linkrx.CaptureFile(io.BytesIO(data)),
        "read": linkrx.CaptureFile(OnlyRead(data)),
    }


@pytest.mark.only(3, 11)
@pytest.mark.samples
@pytest.mark.parametrize("kind", ["path", "gzip", "bytes", "read", "pipe", "gzip pipe"])
@pytest.mark.parametrize("batch_size", [7, 400])
def test_interrupted_at_every_point(tmp_path: Path, kind: str, batch_size: int) -> None:
    """If a signal handler raises at any point, no packet is lost or repeated, and the end follows the last one."""
    packets = packets_of(40, 200)
    path = tmp_path / "some.pcap"
    path.write_bytes(captures.pcap(packets))
    sources = sources_of(path)
    for point in points(400):
        after = After(point)
        got: list[bytes] = []
        with pipe() as (reader, writer):
            if kind in ("pipe", "gzip pipe"):
                data = path.read_bytes()
                writer.write(data if kind == "pipe" else gzip.compress(data))
                writer.close()
                source: Any = linkrx.CaptureFile(reader)
            else:
                source = sources[kind]
                if isinstance(source, linkrx.CaptureFile) and isinstance(source.file, io.BytesIO):
                    source.file.seek(0)
                elif isinstance(source, linkrx.CaptureFile):
                    source = linkrx.CaptureFile(OnlyRead(path.read_bytes()))
            with linkrx.open(source, partial(take, got), batch_size=batch_size) as rx:
                try:
                    with after:
                        for _ in range(3):
                            rx.dispatch(0)
                except Interrupted:
                    pass
                rx.run()
                assert rx.end is linkrx.End.EOF
                assert got == [one.data for one in packets], point
        if not after.raised:
            break
