"""Disturbs linkrx for minutes under load, and accounts for every frame: `.venv/bin/python bench/soak.py`.

It exits with 1 and prints the errors if a frame is in no counter, was changed, or came twice or out of order, or if a
descriptor, a thread or memory leaks. It runs in its own network namespace.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from disturbed import disturb
from traffic import FAULTS_MOST, KINDS, Account, Wire, wire

import linkrx
from linkrx.kernel.namespace import enter_private_network

# Allowed growth after warming up. One arena more would be half a megabyte. The memory that the allocator and the
# interpreter keep varies by some hundred kilobytes.
FLAT_KIB = 1024
# Allowed growth between two disturbed roads. Each held and released dozens of arenas.
SETTLED_KIB = 8 * 1024
FLAT_SECONDS = 600  # maximum for one flat run


@dataclass(frozen=True)
class Usage:
    """The resources of this process."""

    rss_kib: int
    descriptors: tuple[str, ...]  # the targets of the open descriptors
    threads: int

    def __str__(self) -> str:
        return f"{self.rss_kib / 1024:.1f} MiB, {len(self.descriptors)} descriptors, {self.threads} threads"

    def leaked_since(self, before: Usage) -> str:
        """The descriptors that were opened or closed since `before`, and the change of threads."""
        if (len(self.descriptors), self.threads) == (len(before.descriptors), before.threads):
            return ""
        more = set(self.descriptors) ^ set(before.descriptors)
        return f"leaked: {self} after {before}: {', '.join(sorted(more))}"


def usage() -> Usage:
    """The current usage. The resident set is from smaps_rollup, because the counters of statm are per processor and late."""
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    rss = next(int(line.split()[1]) for line in rollup if line.startswith("Rss:"))
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor that lists the folder
            descriptors.append(f"{link.name} {link.readlink()}")
    return Usage(rss, tuple(descriptors), sum(1 for _ in Path("/proc/self/task").iterdir()))


def disturbed(kinds: list[str], seconds: float, seed: int) -> list[str]:
    """Disturb dispatchers on each kind of source with each of its backends, for `seconds` in all. Returns the errors."""
    cells = [(kind, backend) for kind in kinds for backend in KINDS[kind]]
    print(
        f"{'source':<8} {'backend':<11} {'sent':>9} {'delivered':>9} {'unknown':>8} {'after stop':>10} "
        f"{'no room':>9} {'no link':>9} {'in ring':>8} {'unread':>8} {'lost':>5} {'opened':>6} {'flaps':>5} "
        f"{'raised':>6} {'stopped':>7} {'full':>5}  holds afterwards"
    )
    wrong = []
    settled: Usage | None = None
    for number, (kind, backend) in enumerate(cells):
        before = usage()
        with wire(kind, seed + number) as opened:
            account = disturb(opened, backend, seed + number).run(seconds / len(cells))
        after = usage()
        settled = settled or after
        print_row(kind, backend, account, after)
        faults = account.faults
        if leaked := after.leaked_since(before):
            faults.append(leaked)
        if after.rss_kib > settled.rss_kib + SETTLED_KIB:
            faults.append(f"memory grew: {after}; after the first source {settled}")
        wrong += [f"{kind} {backend} --seed {seed}: {fault}" for fault in faults]
        if faults:
            print(f"    {account}")
    return wrong


def print_row(kind: str, backend: str, account: Account, holds: Usage) -> None:
    """Print one line of the table."""
    happened, kernel = account.happened, account.kernel
    print(
        f"{kind:<8} {backend:<11} {account.sent:>9} {account.delivered:>9} "
        f"{account.unknown + account.runts + account.empty:>8} {account.undelivered:>10} "
        f"{kernel.no_room:>9} {kernel.no_link:>9} {account.left:>8} {account.unread:>8} "
        f"{account.lost_by_kernel + account.lost_by_linkrx:>5} {happened['opened']:>6} {happened['flaps']:>5} "
        f"{happened['handler raises'] + happened['deliver raises']:>6} "
        f"{happened['handler stops'] + happened['deliver stops'] + happened['thread stops']:>7} "
        f"{happened['freezes']:>5}  {holds}",
        flush=True,
    )


class Steady:
    """One dispatcher that receives a given number of small frames. Its resources are checked ten times."""

    def __init__(self, on: Wire, backend: str, packets: int, *, deliver: bool) -> None:
        self._wire, self._packets = on, packets
        self._faults: list[str] = []
        self._delivered = 0
        self._last = b""
        self._rx = linkrx.open(on.source, self._deliver if deliver else None, backend=backend)
        self._by_deliver = deliver

    def _deliver(
        self, remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet
    ) -> None:
        self._delivered += 1
        self._in_order(remote or b"")

    def _in_order(self, remote: bytes) -> None:
        """Whether the frames are in order. Their number is in the sender's address."""
        if remote <= self._last and len(self._faults) < FAULTS_MOST:
            self._faults.append(f"{remote!r} came behind {self._last!r}")
        self._last = remote

    def _receive(self, goal: int, end: float) -> None:
        while self._delivered < goal and time.monotonic() < end:
            if self._by_deliver:
                self._rx.dispatch(0.1)
                continue
            for batch in self._rx.batches(0.1):
                self._delivered += len(batch)
                for packet in (batch[0], batch[-1])[-len(batch) :]:
                    self._in_order(packet.remote or b"")
                if self._delivered >= goal:
                    break

    def run(self) -> tuple[list[Usage], list[str]]:
        """Receive the packets. Returns the usage after each tenth of them, and the errors."""
        end = time.monotonic() + FLAT_SECONDS
        traffic = self._wire.traffic
        held = []
        with self._rx as rx:
            traffic.start()
            traffic.pace(4096, 0)
            for tenth in range(1, 11):
                self._receive(self._packets * tenth // 10, end)
                held.append(usage())
            traffic.quiet()
            traffic.finish()
            self._receive(1 << 60, time.monotonic() + 0.5)  # frames in the queue and in the backlog
            stats, kernel = rx.stats(), self._wire.counted()
            if rx.backend == "packet_mmap":  # the kernel reports a ring's drops only to its reader
                drops = stats.kernel_drops or 0
                handed = traffic.control.accepted - drops - kernel.no_link
                kernel = replace(kernel, handed=handed, no_room=drops)
        if self._delivered < self._packets:
            self._faults.append(f"{self._delivered} of {self._packets} packets in {FLAT_SECONDS} seconds")
        if not self._delivered == stats.packets == kernel.handed:
            self._faults.append(f"{self._delivered} delivered, {stats}, {kernel}")
        if traffic.control.accepted != kernel.handed + kernel.no_room + kernel.no_link:
            self._faults.append(f"{traffic.control.accepted} sent, {kernel}")
        first, top = held[0], max(held, key=lambda one: one.rss_kib)
        if top.rss_kib > first.rss_kib + FLAT_KIB:
            self._faults.append(f"memory grew from {first} to {top}")
        self._faults += filter(None, [one.leaked_since(first) for one in held])
        print(
            f"{self._wire.name:<8} {rx.backend:<11} {'deliver' if self._by_deliver else 'batches':<8} "
            f"{self._delivered:>10} of {traffic.control.accepted:>10} sent, dropped {kernel.no_room}; "
            f"after a tenth {first}; largest {top}",
            flush=True,
        )
        return held, self._faults


def flat(kinds: list[str], packets: int, seed: int) -> list[str]:
    """Receive `packets` with one dispatcher, with each call, on the fastest backend of each Ethernet source."""
    kinds = [kind for kind in ("tap", "packet", "ring") if kind in kinds]
    if not kinds or not packets:
        return []
    print(f"\n{packets} packets through one dispatcher:")
    wrong = []
    for kind, deliver in itertools.product(kinds, (False, True)):
        with wire(kind, seed, strange=False) as opened:
            _, faults = Steady(opened, KINDS[kind][0], packets, deliver=deliver).run()
        wrong += [f"{kind} {'deliver' if deliver else 'batches'}: {fault}" for fault in faults]
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Run the soak. Returns 0 without errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="minutes of disturbance for all sources together"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000)
    parser.add_argument(
        "--packets", type=int, default=10_000_000, help="packets in each flat run; 0: no flat run"
    )
    parser.add_argument("--sources", nargs="*", choices=list(KINDS), default=list(KINDS))
    chosen = parser.parse_args(arguments)
    if threading.active_count() > 1:
        raise SystemExit("a network namespace is entered with one thread")
    enter_private_network()
    print(f"--seed {chosen.seed} --minutes {chosen.minutes:g}")
    wrong = disturbed(chosen.sources, chosen.minutes * 60, chosen.seed)
    wrong += flat(chosen.sources, chosen.packets, chosen.seed)
    print("\n".join(["", "WRONG:", *wrong]) if wrong else "\nEvery frame is accounted for.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
