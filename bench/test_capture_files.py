"""Measures capture files: reading against pcapy-ng's offline reader, and writing against `tcpdump -w` on the same interface.

The file is in the page cache. The time of a reader is from opening the file to its end.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from floors import Frames
from peers import Missing, package
from race import ROUNDS, Check, Drain, Queue, Reader, figures, note, race, rounds_of

import linkrx
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import veth

FRAMES, SHORT_FRAMES = 1_000_000, 5_000
RECORDED, SHORT_RECORDED = {64: 800_000, 1514: 100_000}, 4_000  # packets that a writer records in a round
BURST = 2_000  # frames that are sent at once
AHEAD = 4  # bursts that may not be in the file yet; a ring of 32 MiB has room for them, so none is dropped
PATIENCE = 60.0  # seconds after which a recorder without progress counts as hanging
# On a disk, writers would wait. That is not compared.
MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
PIECE = 256 * 1024
FLOOR = "read(2) alone"
SIZED = pytest.mark.parametrize("size", [64, 1514])
HERE = Path(__file__).parent


class FileQueue(Queue):
    """A capture file as a queue."""

    def fill(self) -> None:
        """Do nothing: the file does not change."""


def pcap_of(frames: Frames, packets: int, path: Path) -> Path:
    """A pcap file of `packets` frames."""
    head = struct.pack("=IIII", 1_700_000_000, 5, frames.size, frames.size)
    with path.open("wb") as out:
        out.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 1))
        for frame in frames.numbered(packets):
            out.write(head + frame)
    return path


def by_linkrx(queue: Queue, path: Path, way: str) -> Reader:
    """linkrx: open, read all packets, close."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        def columns() -> int:
            with linkrx.open(path) as rx:
                return sum(map(len, rx.batches()))

        def byte() -> int:
            seen = total = 0

            def take(_remote: object, _local: object, _protocol: int, packet: linkrx.Packet) -> None:
                nonlocal seen, total
                seen += 1
                total += packet[23]

            with linkrx.open(path, take) as rx:
                rx.run()
            return seen

        def checked() -> int:
            assert check is not None
            seen = 0
            with linkrx.open(path) as rx:
                for packet in rx:
                    check(packet.tobytes())
                    seen += 1
            return seen

        yield checked if check else {"columns": columns, "byte": byte}[way]

    return Reader(queue, opened)


def by_hand(queue: Queue, path: Path) -> Reader:
    """The system calls alone, with pieces as large as linkrx reads: a lower bound for reading a file."""
    piece, record = bytearray(PIECE), 16 + queue.frames.size

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        def bare() -> int:
            total = 0
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(piece):
                    total += got
            return (total - 24) // record

        def checked() -> int:
            assert check is not None
            data = path.read_bytes()
            for at in range(24, len(data), record):
                check(data[at + 16 : at + record])
            return queue.packets

        yield checked if check else bare

    return Reader(queue, opened)


def by_pcapy(queue: Queue, path: Path, way: str) -> Reader:
    """pcapy-ng: open, read all packets."""
    pcapy = package("pcapy", "pcapy-ng")

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        def drained(take: Callable[[Any, bytes], None]) -> int:
            pcapy.open_offline(str(path)).loop(0, take)
            return queue.packets

        def nothing(_header: Any, _data: bytes) -> None:
            """A callback that does nothing."""

        def byte() -> int:
            total = 0

            def take(_header: Any, data: bytes) -> None:
                nonlocal total
                total += data[23]

            return drained(take)

        if check:
            yield lambda: drained(lambda _, data: check(data))
        else:
            yield byte if way == "byte" else lambda: drained(nothing)

    return Reader(queue, opened)


@SIZED
def test_read(benchmark: Any, tmp_path: Path, size: int) -> None:
    """Each reader reads a million frames: linkrx by columns, and by `deliver` with a byte of each."""
    packets = FRAMES if benchmark.enabled else SHORT_FRAMES
    frames = Frames(size)
    path = pcap_of(frames, packets, tmp_path / "frames.pcap")
    queue = FileQueue(frames, None, packets)  # type: ignore[arg-type] # sends no frames
    readers = {f"linkrx, {way}": by_linkrx(queue, path, way) for way in ("columns", "byte")}
    readers[FLOOR] = by_hand(queue, path)
    left_out = {}
    try:
        readers |= {f"pcapy-ng, {way}": by_pcapy(queue, path, way) for way in ("nothing", "byte")}
    except Missing as missing:
        left_out = dict.fromkeys(("pcapy-ng, nothing", "pcapy-ng, byte"), str(missing))
    note(benchmark, left_out=left_out)
    race(benchmark, readers, "linkrx, columns", floor=FLOOR, per_round=1, warmup=1, size=size)
    path.unlink()


# Writing.


def recorder(near: str, path: Path, packets: int) -> list[str]:
    """The command that records `packets` packets from batches of a ring."""
    return [sys.executable, str(HERE / "recorder.py"), near, str(path), str(packets)]


def tcpdump(near: str, path: Path, packets: int) -> list[str]:
    """tcpdump's command, with a ring of the same size."""
    options = ["-i", near, "-w", str(path), "-c", str(packets), "-s", "0", "-n", "-B", "65536", "-Z", "root"]
    return ["tcpdump", *options, "--time-stamp-precision=nano"]


def cpu_of(command: list[str], ready: str, send: Callable[[], None]) -> float:
    """Nanoseconds of processor time, user and system, of a program from when it is ready to its end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while ready not in (line := process.stdout.readline()):
            assert line, f"{command[0]} did not start"
        before = spent(process.pid)
        send()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        after = spent(process.pid)
        assert process.wait() == 0, process.stdout.read()
    return after - before


def until_recorded(path: Path, size: int) -> None:
    """Wait until a file has `size` bytes."""
    deadline = time.monotonic() + PATIENCE
    while size > 0 and (not path.exists() or path.stat().st_size < size):
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.001)


def spent(pid: int) -> float:
    """Nanoseconds of processor time of a process, by the scheduler's clock. It works for a zombie too."""
    return float(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


@SIZED
@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump: apt install tcpdump")
def test_write(benchmark: Any, size: int) -> None:
    """The two programs record the same frames on an interface in turn, round by round.

    The cost of recording a few frames and ending is subtracted.
    """
    packets = RECORDED[size] if benchmark.enabled else SHORT_RECORDED
    frames = Frames(size)
    programs = {
        "linkrx, PcapWriter": (recorder, "ready"),
        "tcpdump -w": (tcpdump, "listening on"),
    }
    took: dict[str, list[float]] = {name: [] for name in programs}
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        tempfile.TemporaryDirectory(dir=MEMORY) as made,
    ):
        folder = Path(made)

        def send(count: int, path: Path) -> None:
            for burst in range(count // BURST):
                until_recorded(path, (burst - AHEAD) * BURST * size)
                assert frames.send(injector, BURST) == BURST

        def cost(name: str, count: int) -> float:
            command, ready = programs[name]
            path = folder / "recorded"
            cpu = cpu_of(command(near, path, count), ready, partial(send, count, path))
            with linkrx.open(path) as rx:
                assert sum(map(len, rx.batches())) == count
            path.unlink()
            return cpu

        def one_round() -> None:
            names = list(programs)
            random.shuffle(names)
            for name in names:
                few, all_ = cost(name, BURST), cost(name, packets)
                took[name].append((all_ - few) / (packets - BURST))

        benchmark.pedantic(one_round, rounds=ROUNDS if benchmark.enabled else 1)
    note(benchmark, size=size)
    if benchmark.enabled:
        rounds = {name: rounds_of([(ns, False) for ns in all_], 1) for name, all_ in took.items()}
        note(benchmark, **figures(rounds, "linkrx, PcapWriter", "tcpdump -w"))
