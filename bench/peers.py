"""linkrx on an interface beside a bare walk of a ring, pcapy-ng and a bare socket, all filled by the same frames.

    python bench/peers.py [--rounds 100]

Every reader has a socket of its own on one interface, so a fill reaches all; then each drains what it has, in an order
that changes with every round. What is printed are medians. Then the processor time of sender and receiver together,
and how long a single packet takes.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from linkrx import namespace

if __name__ == "__main__":
    namespace.enter_private_network()

from floors import RingFloor

import linkrx
from linkrx.device import injector_on
from linkrx.rigs import LOCAL, REMOTE, veth
from linkrx.source import ETH_P_ALL, SO_RCVBUFFORCE

PACKETS = 4096
SIZES = (64, 1514)
CLOSED = 0.004  # seconds behind which every ring has closed the block that the last frames are in
RING_BYTES = 64 * 1024 * 1024  # linkrx's default, for all

Drain = Callable[[], int]


def frame(size: int) -> bytes:
    """A frame of IPv4, by its header."""
    return (LOCAL + REMOTE + b"\x08\x00").ljust(size, b"\0")


def linkrx_readers(near: str, stack: ExitStack) -> dict[str, Drain]:
    """Each way to receive, with default options but for zero_copy."""

    def opened(*deliver: Any, **options: Any) -> linkrx.Dispatcher:
        return stack.enter_context(linkrx.open(near, *deliver, **options))

    def columns(**options: Any) -> Drain:
        source = opened(**options).batches()

        def drain() -> int:
            packets = 0
            while packets < PACKETS:
                packets += len(next(source))
            return packets

        return drain

    def iteration(each: Callable[[linkrx.Packet], object] | None) -> Drain:
        source = opened().batches()

        def drain() -> int:
            packets = 0
            while packets < PACKETS:
                batch = next(source)
                packets += len(batch)
                if each is None:
                    for _ in batch:
                        pass
                else:
                    for packet in batch:
                        each(packet)
            return packets

        return drain

    rx = opened(lambda remote, local, protocol, packet: None)

    def deliver() -> int:
        packets = 0
        while packets < PACKETS:
            packets += rx.drain()
        return packets

    return {
        "linkrx columns": columns(),
        "linkrx columns, zero_copy": columns(zero_copy=True),
        "linkrx columns, recvmmsg": columns(backend="recvmmsg"),
        "linkrx iteration": iteration(None),
        "linkrx iteration, bytes(packet)": iteration(bytes),
        "linkrx deliver": deliver,
    }


def pcapy_readers(near: str, stack: ExitStack) -> dict[str, Drain]:
    """The calls of pcapy-ng that take many packets, without waiting, on rings as large as linkrx's."""
    try:
        import pcapy
    except ImportError:
        print("pcapy-ng is not installed: pip install pcapy-ng")
        return {}

    def opened() -> Any:
        reader = pcapy.create(near)
        reader.set_snaplen(65_536)
        reader.set_promisc(0)
        reader.set_timeout(1)
        reader.set_buffer_size(RING_BYTES)
        reader.activate()
        reader.setnonblock(1)
        stack.callback(reader.close)
        return reader

    records = struct.Struct("=4I")

    def batches(each: bool) -> Drain:
        reader = opened()

        def drain() -> int:
            packets = 0
            while packets < PACKETS:
                data, meta = reader.next_batch(1024)
                packets += len(meta) // records.size
                if each:
                    for _, _, start, length in records.iter_unpack(meta):
                        data[start : start + length]
            return packets

        return drain

    reader = opened()

    def dispatch() -> int:
        packets = 0

        def take(header: object, data: bytes) -> None:
            nonlocal packets
            packets += 1

        while packets < PACKETS:
            reader.dispatch(-1, take)
        return packets

    buffered = opened()
    memory = bytearray(8 * 1024 * 1024)

    def to_buffer() -> int:
        packets = 0
        while packets < PACKETS:
            packets += buffered.loop_to_buffer(PACKETS - packets, memory)[0]
        return packets

    return {
        "pcapy next_batch": batches(False),
        "pcapy loop_to_buffer": to_buffer,
        "pcapy next_batch, bytes each": batches(True),
        "pcapy dispatch": dispatch,
    }


def socket_reader(near: str, stack: ExitStack) -> dict[str, Drain]:
    """socket.recv in a loop."""
    source = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0))
    source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RING_BYTES)
    source.bind((near, ETH_P_ALL))

    def drain() -> int:
        for _ in range(PACKETS):
            source.recv(65_536)
        return PACKETS

    return {"socket.recv": drain}


def floor_reader(near: str, stack: ExitStack) -> dict[str, Drain]:
    """The bare walk in C."""
    source = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    floor = RingFloor(source.fileno())
    source.bind((near, ETH_P_ALL))
    stack.callback(floor.close)
    return {"bare walk in C": lambda: floor()[0]}


def drained(rounds: int) -> None:
    """Nanoseconds per packet of every reader."""
    for size in SIZES:
        with ExitStack() as stack:
            near, far = stack.enter_context(veth())
            injector = stack.enter_context(injector_on(far))
            readers: dict[str, Drain] = {}
            for make in (floor_reader, linkrx_readers, pcapy_readers, socket_reader):
                readers |= make(near, stack)
            spent: dict[str, list[float]] = {name: [] for name in readers}
            sent, names = frame(size), list(readers)
            for turn in range(rounds + 3):
                for _ in range(PACKETS):
                    injector.send(sent)
                time.sleep(CLOSED)
                random.shuffle(names)
                for name in names:
                    start = time.perf_counter_ns()
                    got = readers[name]()
                    took = time.perf_counter_ns() - start
                    assert got == PACKETS, (name, got)
                    if turn >= 3:
                        spent[name].append(took / PACKETS)
            print(f"\n{size} bytes: median of {rounds} rounds of {PACKETS} packets, ns per packet")
            for name, took_each in spent.items():
                print(f"  {name:34}{statistics.median(took_each):8.1f}")


def processor_time(rounds: int) -> None:
    """Sender and receiver in one thread, with all that the kernel does for both."""
    print("\nprocessor time of sender and receiver together, ns per packet of 64 bytes")
    spent: dict[str, list[float]] = {"recvmmsg": [], "packet_mmap": []}
    for _ in range(5):
        for backend, took in spent.items():
            with (
                veth() as (near, far),
                injector_on(far) as injector,
                linkrx.open(near, backend=backend) as rx,
            ):
                sent = frame(64)
                start = time.process_time_ns()
                for _ in range(rounds):
                    for _ in range(PACKETS):
                        injector.send(sent)
                    packets = 0
                    for batch in rx.batches():
                        packets += len(batch)
                        if packets == PACKETS:
                            break
                took.append((time.process_time_ns() - start) / rounds / PACKETS)
    for backend, took in spent.items():
        print(f"  {backend:34}{statistics.median(took):8.1f}")


def latency() -> None:
    """From send() to the return of recv(), asleep in between, with default options."""
    with veth() as (near, far), injector_on(far) as injector, linkrx.open(near) as rx:
        took = []
        for _ in range(500):
            time.sleep(random.random() / 200)
            start = time.perf_counter_ns()
            injector.send(frame(64))
            rx.recv(10)
            took.append((time.perf_counter_ns() - start) / 1e6)
        took.sort()
        print(f"\na single packet with default options ({rx.backend}), ms")
        print(f"  median {statistics.median(took):.2f}, 99 % {took[-6]:.2f}, most {took[-1]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    asked = parser.parse_args()
    drained(asked.rounds)
    processor_time(asked.rounds // 4 + 1)
    latency()
