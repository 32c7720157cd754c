"""Shows what each part of a lone packet costs, by sampling with perf(1): `python bench/lone_parts.py [PROCESSOR]`.

A TAP queue holds 64-byte packets, and each call takes one, as `batch_size=1` has it. Only these calls are timed and sampled, not
the sending. The samples are counted by the C file of their function, and scaled to the time that the calls take without perf.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import linkrx
from linkrx.kernel.namespace import enter_private_network
from linkrx.testing.devices import Device, injector_on

CORE = Path(linkrx.__file__).parent / "_core"
FRAME = bytes.fromhex("020000000001 020000000002 0800") + bytes(50)
ETHERNET = struct.Struct("!6s6sH")
PACKETS, ROUNDS = 400, 1000
WAYS = ("dispatch", "recv", "next", "os.read")
SYSTEM_CALLS = ("preadv", "read", "__read", "__libc_read")  # their wrappers in the C library
OF_PERF = ("finish_task_switch", "os_write", "os_read", "_Py_write", "__libc_write", "__GI___libc_write")


def ignore(_remote: object, _local: object, _protocol: int, _packet: object) -> None:
    """What a packet is delivered to."""


@contextmanager
def one_packet(way: str, queue: linkrx.TunTap) -> Iterator[Callable[[], object]]:
    """The call that takes one packet."""
    if way == "os.read":
        fd = queue.fileno()

        def by_hand() -> None:
            frame = os.read(fd, 65536)
            local, remote, protocol = ETHERNET.unpack_from(frame)
            ignore(remote, local, protocol, frame)

        yield by_hand
        return
    with linkrx.open(queue, ignore, batch_size=1) as rx:
        calls: dict[str, Callable[[], object]] = {
            "dispatch": rx.dispatch,
            "recv": rx.recv,
            "next": rx.__next__,
        }
        yield calls[way]


def measure(way: str, control: str, acknowledged: str) -> None:
    """Print the median time of a call, in nanoseconds. Samples the calls if `control` is perf's."""
    enter_private_network()
    fds = (os.open(control, os.O_WRONLY), os.open(acknowledged, os.O_RDONLY)) if control else ()

    def sampling(word: bytes) -> None:
        if fds:
            os.write(fds[0], word)
            os.read(fds[1], 10)

    took = []
    with linkrx.TunTap() as queue:
        os.set_blocking(queue.fileno(), False)
        Device(queue.name).set_up()
        with injector_on(queue.name) as injector, one_packet(way, queue) as one:
            for _ in range(ROUNDS):
                for _ in range(PACKETS):
                    injector.send(FRAME)
                sampling(b"enable\n")
                start = time.perf_counter_ns()
                for _ in range(PACKETS):
                    one()
                took.append((time.perf_counter_ns() - start) / PACKETS)
                sampling(b"disable\n")
    print(statistics.median(took))


def files_of_functions() -> dict[str, str]:
    """The C file of each function of the core."""
    found = {}
    for path in sorted(CORE.rglob("*.c")):
        if path.name != "_native.c":  # cffi generates it
            found.update(
                dict.fromkeys(
                    re.findall(r"^\w[\w *]*?(\w+)\([^;]*?\)\n\{", path.read_text(), re.MULTILINE), path.name
                )
            )
    return found


def part_of(library: str, function: str, files: dict[str, str]) -> str | None:
    """The part that a function belongs to; None for functions of perf's control."""
    if function.startswith(OF_PERF):
        return None
    if "kernel" in library or function.startswith(SYSTEM_CALLS):
        return "the system call"
    if library.startswith(("_types", "_native")):
        return files.get(function, "other functions of the core")
    return "CPython, C library"


def sampled(way: str, command: list[str]) -> Counter[str]:
    """The share of each part of the samples."""
    files, parts = files_of_functions(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        control, acknowledged, data = (f"{folder}/{name}" for name in ("control", "acknowledged", "data"))
        os.mkfifo(control)
        os.mkfifo(acknowledged)
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "25000", "-D", "-1", "-o", data]
        record += ["--control", f"fifo:{control},{acknowledged}", *command, way, control, acknowledged]
        subprocess.run(record, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = ["perf", "report", "-i", data, "-n", "--no-children", "--sort", "dso,symbol", "--stdio"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        words = line.split()
        if len(words) >= 5 and not line.startswith("#"):
            part = part_of(words[2], words[4].partition("@")[0].partition(".")[0], files)
            if part is not None:
                parts[part] += int(words[1])
    return parts


def main() -> None:
    """Print a table: the nanoseconds of each part, for each call."""
    if shutil.which("perf") is None:
        sys.exit("needs perf(1): apt install linux-perf")
    os.sched_setaffinity(0, {int(sys.argv[1]) if len(sys.argv) > 1 else max(os.sched_getaffinity(0))})
    command = [sys.executable, __file__, "--measure"]
    table: dict[str, dict[str, float]] = {}
    for way in WAYS:
        runs = [subprocess.run([*command, way, "", ""], check=True, capture_output=True) for _ in range(3)]
        whole = statistics.median(float(run.stdout) for run in runs)
        parts = sampled(way, command)
        table[way] = {part: whole * count / parts.total() for part, count in parts.items()} | {"all": whole}
    most = {
        part: max(parts.get(part, 0) for parts in table.values())
        for parts in table.values()
        for part in parts
    }
    print("| ns of a lone packet |", " | ".join(f"`{way}`" for way in WAYS), "|")
    print("| --- |", " | ".join(["---:"] * len(WAYS)), "|")
    for part in sorted(most, key=lambda part: -most[part]):
        if most[part] >= 1:
            print(f"| {part} |", " | ".join(f"{table[way].get(part, 0):.0f}" for way in WAYS), "|")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
