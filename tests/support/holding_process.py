"""A process that holds packets until the interpreter ends: `python holding_process.py JOB CELL`.

It runs in a network namespace of its own and writes its findings line by line. `test_holding_processes.py` starts and reads it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import linkrx
from linkrx.kernel.namespace import enter_private_network
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import number_of
from support import holding
from support.holding import BURST, HOLDERS, NAMED, frame, lap, receive, send, take, wrong

KEPT = 200  # packets, one from each receive
STEPS_MOST = 5000  # far more than the allocations of a receive


def say(what: str, write: Callable[[int, bytes], int] = os.write) -> None:
    """Write a line. It works during interpreter shutdown, because it looks up no global name."""
    write(1, f"{what}\n".encode())


class Reporter(list[list[str]]):
    """A list that writes each finding at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def append(self, found: list[str], say: Callable[[str], None] = say) -> None:
        """Write a finding."""
        say(f"{self.name}: {found}")


forever: list[object] = []  # holds objects until the interpreter ends


def keep(rig: Rig, rx: linkrx.Dispatcher) -> None:
    """Hold things in every kind of holder."""
    for name, hold in HOLDERS.items():
        if name != "resurrection":  # nothing could check it again
            forever.append(hold(take(rig, rx), Reporter(name)))


def open_for_ever(cell: str) -> tuple[Rig, linkrx.Dispatcher]:
    """Open a rig and a dispatcher, and never close them. The kernel removes devices and sockets when the process has ended."""
    made = NAMED[cell].kind()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    rig = made.__enter__()
    rx = NAMED[cell].open(rig)
    forever.append(rx)
    return rig, rx


# The jobs.


def forks(cell: str) -> None:
    """Fork with Python's hooks and without. Then end with all things held and the dispatcher open."""
    rig, rx = open_for_ever(cell)
    keep(rig, rx)
    things = take(rig, rx)
    by_library: Callable[[], int] = ctypes.PyDLL(None).fork  # Python's hooks do not run
    for call in (os.fork, by_library):
        gone_on, tell = os.pipe()
        child = call()
        if not child:
            os.read(gone_on, 1)
            say(f"child: {wrong(things)}")
            try:
                rx.recv(0)
            except (RuntimeError, linkrx.LinkrxError):
                say("child: refused")
            return
        lap(rig, rx)
        os.write(tell, b".")
        say(f"status of the child: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
        lap(rig, rx)
        say(f"parent: {wrong(things)}")


def no_memory(cell: str) -> None:
    """Let each allocation of a receive fail in turn. Then check the things held before and the packets received after."""
    testcapi: Any = import_module("_testcapi")
    held: list[tuple[int, Any]] = []
    with NAMED[cell].opened(batch_size=16) as (rig, rx):
        things = take(rig, rx)
        kept: list[Any] = []

        def use() -> None:
            batch = next(batches)
            packet = batch[0]
            kept.extend((packet, bytes(packet), packet.frame, batch.memory, batch.lengths, packet.copy()))

        failed, step, quiet = 0, 0, 0
        while quiet < 3 and step < STEPS_MOST:
            send(rig, range(4 * step, 4 * step + 4))
            batches = rx.batches(1)
            before = len(kept)
            testcapi.set_nomemory(step, step + 1)
            try:
                use()
                quiet += 1
            except MemoryError:
                failed, quiet = failed + 1, 0
            finally:
                testcapi.remove_mem_hooks()
            for thing in kept[before : before + 1]:
                held.append((number_of(rig, thing), thing))
            for batch in rx.batches(0):  # packets that the failed receive left
                held.extend((number_of(rig, packet), packet) for packet in batch)
            step += 1
        numbers = [number for number, _ in held]
        say(f"out of order: {numbers != sorted(set(numbers))}")
        lap(rig, rx)
        say(f"before: {wrong(things)}")
        say(f"behind: {[number for number, packet in held if bytes(packet) != frame(rig, number)]}")
        say(f"enough failures: {failed > 5}")
        say(f"it came to an end: {quiet == 3}")


def cost(cell: str) -> None:
    """Measure the memory of each kept packet, when nothing else of its receive is held. Then end with things held and the dispatcher closed."""
    with NAMED[cell].opened() as (rig, rx):
        keep(rig, rx)
        kept: list[linkrx.Packet] = []

        def receive_and_keep(number: int) -> None:
            for _ in range(number):
                kept.append(receive(rig, rx, range(BURST))[-1][-1])

        receive_and_keep(10)
        kept.clear()
        gc.collect()
        before = resident()
        tracemalloc.start()
        receive_and_keep(KEPT)
        gc.collect()
        say(f"allocated each: {allocated() // KEPT}")
        tracemalloc.stop()
        say(f"resident each: {(resident() - before) // KEPT}")


def allocated() -> int:
    """The memory that linkrx and this program have from Python's allocators, in bytes."""
    here = [
        tracemalloc.Filter(True, f"{Path(module.__file__ or '').parent}/*") for module in (linkrx, holding)
    ]
    traces = tracemalloc.take_snapshot().filter_traces(here)
    return sum(one.size for one in traces.statistics("filename"))


def resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


JOBS = {job.__name__: job for job in (forks, no_memory, cost)}


if __name__ == "__main__":
    enter_private_network()
    gc.set_threshold(1)
    JOBS[sys.argv[1]](sys.argv[2])
    if sys.version_info[:2] == (3, 12):
        # CPython 3.12.1 starts a collection in a finalizer of the last collection at shutdown if one is due, and crashes, also
        # without linkrx. So no collection may be due.
        gc.set_threshold(700)
