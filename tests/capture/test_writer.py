"""PcapWriter: its files are read back as received and are whole at any time, and failures are reported."""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support import captures
from support.captures import Interface, Recorded, frame, read

import linkrx
from linkrx import _core
from linkrx.capture import blocks, plain
from linkrx.testing import rigs

Format = Literal["pcapng", "pcap"]
FORMATS: tuple[Format, ...] = ("pcapng", "pcap")
every_format = pytest.mark.parametrize("form", FORMATS)
needs_core = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)


def recorded_file(count: int = 50) -> bytes:
    """A file with two interfaces, both directions, cut packets and nanoseconds."""
    made = captures.section() + b"".join(
        Interface(name=name, resolution=9).block() for name in ("eth7", "br0")
    )
    for n in range(count):
        options = captures.option("<", 2, struct.pack("<I", 1 + n % 2)) + captures.option("<", 0, b"")
        made += captures.enhanced("<", n % 2, 10**18 + n, frame(60 + n, n), 60 + n + n % 3, options)
    return made


def one_batch(data: bytes) -> linkrx.Batch:
    """A batch that starts at the second packet. A batch ends before the first packet of another interface."""
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
        first, second, *_ = [batch.copy() for batch in rx.batches()]
    assert len(first) == 1
    return second


def without_interfaces(packets: list[Recorded]) -> list[Recorded]:
    """The packets without interfaces, as in pcap."""
    return [Recorded(one.data, one.wire_length, one.timestamp_ns) for one in packets]


def by_batch(rx: linkrx.Dispatcher, out: linkrx.PcapWriter) -> None:
    """Record all batches."""
    for batch in rx.batches():
        out.write(batch)


def by_packet(rx: linkrx.Dispatcher, out: linkrx.PcapWriter) -> None:
    """Record all packets one by one."""
    for packet in rx:
        out.write(packet)


@needs_core
@every_format
@pytest.mark.parametrize("way", [by_batch, by_packet])
def test_round_trip(
    tmp_path: Path, form: Format, way: Callable[[linkrx.Dispatcher, linkrx.PcapWriter], None]
) -> None:
    """Recorded again, a file has the same packets, times and lengths, and in pcapng the same directions and interfaces."""
    data, path = recorded_file(), tmp_path / "out"
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx,
        linkrx.PcapWriter(path, format=form, source=rx) as out,
    ):
        way(rx, out)
        assert out.packets == 50
    packets = read(io.BytesIO(data))
    assert read(path) == (packets if form == "pcapng" else without_interfaces(packets))
    with linkrx.open(path) as rx:
        list(rx)
        names = [rx.interface_name(number) for number in (1, 2, 3)]
    assert names == (["eth7", "br0", None] if form == "pcapng" else [None, None, None])


def names_in(path: Path) -> list[str | None]:
    """The names of the first interfaces of a capture file."""
    with linkrx.open(path) as rx:
        list(rx)
        return [rx.interface_name(number) for number in (1, 2)]


@needs_core
@every_format
@pytest.mark.parametrize("offset", [-1, 2**32 - 1, 2**32, 9_223_372_035])
def test_times_that_do_not_fit(tmp_path: Path, form: Format, offset: int) -> None:
    """A time before 1970, and in pcap one after 2106, raises ValueError that shows it. Others are recorded, and so are the packets before."""
    data = (
        captures.section() + Interface(resolution=9).block() + Interface(resolution=9, offset=offset).block()
    )
    data += captures.enhanced("<", 0, 7, frame(60), 60) + captures.enhanced("<", 1, 7, frame(61), 61)
    path, fits = tmp_path / "out", offset >= 0 and (form == "pcapng" or offset < 2**32)
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx, linkrx.PcapWriter(path, format=form) as out:
        batches = [batch.copy() for batch in rx.batches()]
        for batch in batches:
            if fits or batch is batches[0]:
                out.write(batch)
                continue
            for packets in (batch, batch[0]):
                with pytest.raises(ValueError, match=f"{offset * 10**9 + 7} ns since 1970, does not fit"):
                    out.write(packets)
        kept = array("Q", [1 << 32 | 1, 1 << 32 | 2])
        taken = (0, 0, plain.NO_TIME << 32)
        assert fits or plain.record(batches[1], 0, kept, bytearray(999), 0, form == "pcapng", 5) == taken
    times = [7, offset * 10**9 + 7]
    assert [one.timestamp_ns for one in read(path)] == (times if fits else times[:1])


@needs_core
def test_names_of_packets_of_a_file(tmp_path: Path) -> None:
    """Without `source`, packets of a capture file are not recorded with names of this host, where interface 1 is `lo`."""
    assert socket.if_indextoname(1) == "lo"
    path = tmp_path / "out"
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(recorded_file()))) as rx, linkrx.PcapWriter(path) as out:
        by_batch(rx, out)
    assert names_in(path) == [None, None]


@needs_core
@pytest.mark.usefixtures("devices")
def test_recorded_after_the_source_was_closed(tmp_path: Path) -> None:
    """Packets that are recorded after their source was closed have the name that the interface had at open, if it was opened by name."""
    for number, (source, expected) in enumerate((("", True), ("any", False))):
        path = tmp_path / str(number)
        with rigs.interface() as rig:
            with linkrx.open(source or str(rig.source), filter="ether proto 0x88b5") as rx:
                rig.send(frame(60))
                packet = rx.recv(10)
            with linkrx.PcapWriter(path, source=rx) as out:
                out.write(packet)
            assert names_in(path) == [rig.source if expected else None, None]
            assert [one.data for one in read(path)] == [frame(60)]


@needs_core
@every_format
def test_whole_when_write_returns(tmp_path: Path, form: Format) -> None:
    """After each write, another reader of the file gets all packets written so far."""
    data, path = recorded_file(), tmp_path / "out"
    packets = read(io.BytesIO(data))
    with (
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data)), batch_size=7) as rx,
        linkrx.PcapWriter(path, format=form, source=rx) as out,
    ):
        for batch in rx.batches():
            out.write(batch)
            assert [one.data for one in read(path)] == [one.data for one in packets[: out.packets]]


@needs_core
def test_a_file_cut_anywhere_is_readable_up_to_there(tmp_path: Path) -> None:
    """If a file is cut anywhere, its whole packets are read, and the error names the byte behind them."""
    data = recorded_file(5)
    boundaries = {}
    for count in range(6):
        boundaries[len(recorded_file(count))] = count
    start = len(recorded_file(0))
    for end in range(start, len(data)):
        whole = max(count for boundary, count in boundaries.items() if boundary <= end)
        got = []
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(data[:end]))) as rx:
            if end in boundaries:
                assert len(list(rx)) == whole
                continue
            with pytest.raises(linkrx.DamagedCapture) as caught:
                for packet in rx:
                    got.append(packet)
            assert len(got) == whole
            assert caught.value.offset == max(boundary for boundary in boundaries if boundary <= end)
            assert list(rx) == []
            assert rx.end is linkrx.End.EOF


def test_packets_of_a_device_and_their_clock(tmp_path: Path) -> None:
    """Packets without a timestamp get the time of the write, and packets without an interface get none."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    path = tmp_path / "out"
    with receiver, sender, linkrx.open(receiver) as rx, linkrx.PcapWriter(path, source=rx) as out:
        before = time.time_ns()
        sender.send(frame(100))
        out.write(rx.recv(10))
        after = time.time_ns()
    saved = path.read_bytes()
    assert before <= stamp_of(saved) <= after


def stamp_of(saved: bytes) -> int:
    """The timestamp of the first packet of a pcapng file."""
    body = next(body for kind, body in blocks_of(saved) if kind == blocks.ENHANCED)
    high, low = struct.unpack_from("=II", body, 4)
    return int(high << 32 | low)


@needs_core
@pytest.mark.usefixtures("devices")
def test_vlan_tags_names_and_drops(tmp_path: Path) -> None:
    """A recording of an interface by name has the tags that the kernel took out, the interface's name and the drops."""
    path = tmp_path / "out"
    tagged = frame(60)[:12] + b"\x81\x00\x20\x07" + frame(60)[12:]
    with (
        rigs.interface() as rig,
        linkrx.open(str(rig.source), timestamps=True) as rx,
        linkrx.PcapWriter(path, source=rx) as out,
    ):
        rig.send(tagged)
        packet = rx.recv(10)
        assert packet.vlan is not None
        assert packet.tobytes() == frame(60)
        out.write(packet)
        name, stamp = rig.source, packet.timestamp_ns
        out.close()
        out.close()
        with pytest.raises(linkrx.Closed):
            out.write(packet)
    assert read(path) == [Recorded(tagged, len(tagged), stamp, 1)]
    with linkrx.open(path) as rx:
        list(rx)
        assert rx.interface_name(1) == name
    statistics = [body for kind, body in blocks_of(path.read_bytes()) if kind == blocks.STATISTICS]
    assert [struct.unpack_from("=I8xHHQ", body) for body in statistics] == [(0, blocks.ISB_IFDROP, 8, 0)]


@needs_core
@pytest.mark.usefixtures("devices")
def test_drops_are_recorded(tmp_path: Path) -> None:
    """The file's statistics have exactly the packets that the kernel dropped until close()."""
    path = tmp_path / "out"
    with (
        rigs.packet() as rig,
        linkrx.open(rig.source, receive_buffer=2304, backend="recvmmsg") as rx,
        linkrx.PcapWriter(path, source=rx) as out,
    ):
        for number in range(100):
            rig.send(frame(1000, number))
        for batch in rx.batches(0):
            out.write(batch)
        drops = rx.stats().kernel_drops
        assert drops
        assert out.packets + drops == 100
    (body,) = [body for kind, body in blocks_of(path.read_bytes()) if kind == blocks.STATISTICS]
    assert struct.unpack_from("=I8xHHQ", body) == (0, blocks.ISB_IFDROP, 8, drops)


def blocks_of(saved: bytes) -> list[tuple[int, bytes]]:
    """The blocks of a pcapng file: type and body."""
    found, at = [], 0
    while at < len(saved):
        kind, length = struct.unpack_from("=II", saved, at)
        found.append((kind, saved[at + 8 : at + length - 4]))
        at += length
    return found


@needs_core
@every_format
def test_a_full_disk(form: Format) -> None:
    """A full disk raises an error with the kernel's errno and the number of whole packets, and the file ends behind these."""
    data = recorded_file(1000)
    packets = read(io.BytesIO(data))
    batch = one_batch(data)
    packets = packets[1 : 1 + len(batch)] * 10
    for room in (5000, 20_000, 70_001):
        small = Filling(room)
        out = linkrx.PcapWriter(small, format=form)
        with pytest.raises(
            linkrx.RecordingFailed, match=r"No space left on device; \d+ packets are whole"
        ) as caught:
            for _ in range(10):
                out.write(batch)
        assert caught.value.errno == 28
        assert caught.value.packets == out.packets
        with pytest.raises(linkrx.RecordingFailed):
            out.write(batch)
        out.close()
        whole = bytes(small.taken)
        got = []
        with linkrx.open(linkrx.CaptureFile(io.BytesIO(whole))) as rx:
            try:
                for packet in rx:
                    got.append(packet.tobytes())
            except linkrx.DamagedCapture:
                assert caught.value.torn
        assert got == [one.data for one in packets][: caught.value.packets]


class Filling:
    """A file with room for a number of bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, bytearray()

    def write(self, data: memoryview) -> int:
        """Write as many bytes as there is room for."""
        if not self.room:
            raise OSError(28, os.strerror(28))
        taken = min(self.room, len(data))
        self.taken += data[:taken]
        self.room -= taken
        return taken


@needs_core
@pytest.mark.usefixtures("devices")
@every_format
def test_a_full_file_system_leaves_whole_records(tmp_path: Path, form: Format) -> None:
    """On a full file system, the regular file is truncated behind its last whole record, and is read without an error."""
    data, path = recorded_file(1000), tmp_path / "out"
    packets = read(io.BytesIO(data))
    batch = one_batch(data)
    packets = packets[1 : 1 + len(batch)] * 10
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_001, limits[1]))
        with (
            linkrx.PcapWriter(path, format=form) as out,
            pytest.raises(linkrx.RecordingFailed, match="File too large") as caught,
        ):
            for _ in range(10):
                out.write(batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.torn == 0
    assert [one.data for one in read(path)] == [one.data for one in packets][: caught.value.packets]
    assert caught.value.packets > 100


@needs_core
@every_format
def test_a_device_that_is_full(form: Format) -> None:
    """/dev/full refuses the first byte: no packet is whole, and close() raises no further error."""
    batch = one_batch(recorded_file())
    with (
        pytest.raises(linkrx.RecordingFailed, match="No space left on device; 0 packets are whole") as caught,
        linkrx.PcapWriter("/dev/full", format=form) as out,
    ):
        out.write(batch)
    assert (caught.value.errno, caught.value.packets, caught.value.torn) == (28, 0, 0)


@needs_core
def test_a_closed_pipe() -> None:
    """A closed pipe raises an error with EPIPE and the number of whole packets."""
    batch = one_batch(recorded_file(51))
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe, linkrx.PcapWriter(pipe) as out:  # noqa: PTH123 - a descriptor
        out.write(batch)
        os.close(reading)
        with pytest.raises(linkrx.RecordingFailed, match="Broken pipe; 50 packets are whole there"):
            out.write(batch)


@needs_core
def test_a_pipe_that_does_not_block_and_a_slow_reader() -> None:
    """The writer waits for a full non-blocking pipe, and every packet is written."""
    data = recorded_file(3000)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    got: list[Recorded] = []

    def take() -> None:
        with open(reading, "rb", buffering=0) as pipe, linkrx.open(linkrx.CaptureFile(pipe)) as rx:  # noqa: PTH123
            got.extend(Recorded.of(packet) for packet in rx)

    thread = threading.Thread(target=take)
    with (
        open(writing, "wb", buffering=0) as pipe,  # noqa: PTH123
        linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx,
        linkrx.PcapWriter(pipe, source=rx) as out,
    ):
        thread.start()
        by_batch(rx, out)
    thread.join(30)
    assert got == read(io.BytesIO(data))


def test_what_is_refused(tmp_path: Path) -> None:
    """Unknown formats, text files, and objects that are no packets raise errors, and leave no descriptor open."""
    with pytest.raises(ValueError, match="format='snoop'"):
        linkrx.PcapWriter(tmp_path / "out", format="snoop")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="binary file"):
        linkrx.PcapWriter(io.StringIO())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="binary file"):
        linkrx.PcapWriter(7)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        linkrx.PcapWriter(tmp_path / "none" / "out")
    with linkrx.PcapWriter(tmp_path / "out") as out, pytest.raises((TypeError, AttributeError)):
        out.write(b"a frame")  # type: ignore[arg-type]
    with pytest.warns(ResourceWarning, match="unclosed <PcapWriter"):
        linkrx.PcapWriter(tmp_path / "out")
    with linkrx.PcapWriter(tmp_path / "empty", format="pcap"):
        pass
    assert (tmp_path / "empty").stat().st_size == 24


@needs_core
def test_the_plain_twin() -> None:
    """Without the core the same records are made, byte for byte."""
    data = recorded_file(20)
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(data))) as rx:
        packets = [packet.copy() for packet in rx]
    for pcapng in (True, False):
        keys = array("Q", [1 << 32 | 2, 1 << 32 | 1])
        fast, slow, at, other = bytearray(2000), bytearray(2000), 0, 0
        for packet in packets:
            first = _core.types.record(packet, 0, keys, fast, at, pcapng, 5)
            second = _plain(packet, keys, slow, other, pcapng)
            assert first == second
            at, other = first[1], second[1]
        assert fast == slow
        assert at > 1500


def _plain(packet: linkrx.Packet, keys: Any, out: bytearray, at: int, pcapng: bool) -> tuple[int, int, int]:
    return plain.record(packet, 0, keys, out, at, pcapng, 5)
