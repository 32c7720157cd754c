"""Measures floods from one processor to another: received packets, drops, and the cost per packet, for each reader.

The benchmark fails unless every frame that send() accepted was delivered or is in a counter of the kernel. The kernel's work for
the receiver in the sender's system call (all of it on a veth) is the sender's processor time.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import peers
import pytest
from floors import Flood, Frames, RingWalk
from peers import Missing
from queues import ignore, packet_socket, ring, tap
from race import note
from traffic import PACKET_STATISTICS, device_counters

import linkrx
from linkrx.kernel.uapi import SOL_PACKET
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import veth

ROUNDS, SECONDS, SHORT_SECONDS = 3, 0.3, 0.05
QUIET = 0.1  # seconds without a packet, after the sender's end, after which the queue is empty
MANY = 256  # packets between two reads of the clock, for readers that receive one at a time

Done = Callable[[], bool]
Consumed = tuple[int, int]  # packets, and the time of the last one


@dataclass
class Lane:
    """A source under a flood: the frames, the reader, and the kernel's counters."""

    injector: socket.socket
    consume: Callable[[Done], Consumed]
    drops: Callable[[], int]
    cpu_ns: Callable[[], int] = time.thread_time_ns


def consume(some: Callable[[], int]) -> Callable[[Done], Consumed]:
    """Call `some`, which waits QUIET seconds for packets and returns their number, until no more come."""

    def until_quiet(done: Done) -> Consumed:
        packets, last, ended = 0, time.perf_counter_ns(), False
        while (got := some()) or not ended:
            if got:
                packets, last = packets + got, time.perf_counter_ns()
            else:
                ended = done()  # and once more, for packets that came after `some` returned
        return packets, last

    return until_quiet


def patient(drain: Callable[[], int], wait: Callable[[], bool]) -> Callable[[Done], Consumed]:
    """Make a waiting reader from one that never waits. `wait` waits, and returns whether there is a packet."""
    return consume(lambda: drain() or (drain() if wait() else 0))


def singly(
    receive: Callable[[], object], nothing: type[Exception], wait: Callable[[], bool]
) -> Callable[[Done], Consumed]:
    """A loop of a call that receives one packet, and raises `nothing` without one. `wait` returns whether there is a packet."""

    def some() -> int:
        got = 0
        while True:
            try:
                for got in range(1, MANY):  # noqa: B007
                    receive()
            except nothing:
                # The last one was not received. The others count before the next wait.
                if got > 1 or not wait():
                    return got - 1
            else:
                return got

    return consume(some)


def polled(fd: int) -> Callable[[], bool]:
    """Wait for a packet on a descriptor that does not block."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return lambda: bool(poll.poll(QUIET * 1000))


def socket_drops(source: socket.socket) -> Callable[[], int]:
    """The drops of a packet socket. Reading them resets them."""
    dropped = 0

    def drops() -> int:
        nonlocal dropped
        _, lately = struct.unpack("II", source.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        dropped += int(lately)
        return dropped

    return drops


def linkrx_consumer(rx: linkrx.Dispatcher, way: str) -> Callable[[Done], Consumed]:
    """linkrx by columns or by `deliver`."""

    def columns(done: Done) -> Consumed:
        packets, last, ended = 0, time.perf_counter_ns(), False
        while not ended:
            ended = done()
            for batch in rx.batches(timeout=QUIET):
                packets, last = packets + len(batch), time.perf_counter_ns()
        return packets, last

    wait = polled(rx.fileno())
    return columns if way == "columns" else patient(rx.drain, wait)


@contextmanager
def linkrx_on_tap(size: int, backend: str, way: str) -> Iterator[Lane]:
    """A TAP queue read by linkrx."""
    with tap(Frames(size)) as (queue, source, _):
        assert isinstance(source, linkrx.TunTap)
        name = source.name
        with linkrx.open(source, None if way == "columns" else ignore, backend=backend) as rx:
            yield Lane(queue.injector, linkrx_consumer(rx, way), lambda: tap_drops(name))


def tap_drops(name: str) -> int:
    """Frames for which a TAP's queue had no room."""
    return device_counters(name)["tx_dropped"]


@contextmanager
def read_on_tap(size: int, peer: str, mode: str) -> Iterator[Lane]:
    """A TAP queue read by a bare C loop, by hand, by python-pytun or by gVisor."""
    with ExitStack() as stack:
        if peer == "pytun":
            device = stack.enter_context(peers.pytun_device())
            os.set_blocking(device.fileno(), False)
            Device(device.name).set_up()
            injector = stack.enter_context(injector_on(device.name))
            pytun = peers.package("pytun", "python-pytun")
            receive = singly(lambda: device.read(peers.ROOM), pytun.Error, polled(device.fileno()))
            yield Lane(injector, receive, lambda: tap_drops(device.name))
            return
        queue, source, floor = stack.enter_context(tap(Frames(size)))
        assert isinstance(source, linkrx.TunTap)
        name, fd = source.name, source.fileno()

        def drops() -> int:
            return tap_drops(name)

        if peer == "gvisor":
            yield stack.enter_context(gvisor(queue.injector, fd, mode, drops))
        elif peer == "floor":
            drain, wait = stack.enter_context(floor.open(None)), polled(fd)
            yield Lane(queue.injector, patient(drain, wait), drops)
        else:
            receive = singly(lambda: os.read(fd, peers.ROOM), BlockingIOError, polled(fd))
            yield Lane(queue.injector, receive, drops)


@contextmanager
def gvisor(injector: socket.socket, fd: int, mode: str, drops: Callable[[], int]) -> Iterator[Lane]:
    """gVisor's dispatcher of a mode, in a separate process on the receiver's processor."""
    process = peers.Gvisor(fd, mode, 0)
    counted = 0

    def some() -> int:
        nonlocal counted
        before, until = counted, time.monotonic() + QUIET
        while time.monotonic() < until and counted == before:
            time.sleep(0.005)
            counted = process.ask("count")[0]
        return counted - before

    try:
        yield Lane(injector, consume(some), drops, lambda: process.ask("count")[1])
    finally:
        process.close()


@contextmanager
def linkrx_on_interface(size: int, backend: str, way: str) -> Iterator[Lane]:
    """An interface read by linkrx, with default options."""
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        linkrx.open(near, None if way == "columns" else ignore, backend=backend) as rx,
    ):
        yield Lane(
            injector,
            linkrx_consumer(rx, way),
            lambda: (rx.stats().kernel_drops or 0) + device_counters(near)["rx_dropped"],
        )


@contextmanager
def peer_on_interface(size: int, peer: str, call: str) -> Iterator[Lane]:
    """An interface read by another library."""
    with ExitStack() as stack:
        if peer == "floor":
            queue, near, floor = stack.enter_context(ring(Frames(size)))
            assert isinstance(near, str)
            walk = stack.enter_context(floor.open(None))
            assert isinstance(walk, RingWalk)
            full, wait, name = socket_drops(walk.source), polled(walk.source.fileno()), near
            walks = patient(walk, wait)
            yield Lane(queue.injector, walks, lambda: full() + device_counters(name)["rx_dropped"])
            return
        if peer == "pcapy":
            near, far = stack.enter_context(veth())
            injector = stack.enter_context(injector_on(far))
            yield Lane(injector, *pcapy(near, call))
            return
        if peer == "scapy":
            near, far = stack.enter_context(veth())
            injector = stack.enter_context(injector_on(far))
            listener = peers.scapy_listener(near)
            stack.callback(listener.close)
            listener.ins.setblocking(False)
            receive = listener.recv if call == "dissected" else listener.recv_raw
            wait, drops = polled(listener.ins.fileno()), socket_drops(listener.ins)
            yield Lane(injector, singly(receive, BlockingIOError, wait), drops)
            return
        queue, source, _ = stack.enter_context(packet_socket(Frames(size)))
        assert isinstance(source, socket.socket)
        drops = socket_drops(source)
        if peer == "gvisor":
            yield stack.enter_context(gvisor(queue.injector, source.fileno(), call, drops))
        else:
            memory = bytearray(peers.ROOM)
            receive = singly(lambda: source.recv_into(memory), BlockingIOError, polled(source.fileno()))
            yield Lane(queue.injector, receive, drops)


def pcapy(near: str, call: str) -> tuple[Callable[[Done], Consumed], Callable[[], int]]:
    """pcapy-ng with a ring as large as linkrx's. Its calls hold the GIL while they wait, so they are called without waiting."""
    reader = peers.pcapy_on(near)
    received, wait = 0, polled(reader.getfd())

    def take(header: object, data: bytes) -> None:
        nonlocal received
        received += 1

    def once() -> int:
        if call == "dispatch":
            before = received
            reader.dispatch(-1, take)
            return received - before
        data, meta = reader.next_batch(1024)
        for _, _, start, length in struct.iter_unpack("=4I", meta):
            data[start : start + length]
        return len(meta) // 16

    return consume(
        lambda: once() or (once() if wait() else 0)
    ), lambda: int(reader.stats()[1]) + device_counters(near)["rx_dropped"]


MakeLane = Callable[[int], AbstractContextManager[Lane]]
LANES: dict[str, MakeLane] = {
    "tap, C floor": lambda size: read_on_tap(size, "floor", ""),
    "tap, linkrx readv, columns": lambda size: linkrx_on_tap(size, "readv", "columns"),
    "tap, linkrx readv, deliver": lambda size: linkrx_on_tap(size, "readv", "deliver"),
    "tap, linkrx os_readv, deliver": lambda size: linkrx_on_tap(size, "os_readv", "deliver"),
    "tap, os.read": lambda size: read_on_tap(size, "os.read", ""),
    "tap, python-pytun": lambda size: read_on_tap(size, "pytun", ""),
    "tap, gVisor, readv": lambda size: read_on_tap(size, "gvisor", "readv"),
    "interface, C floor": lambda size: peer_on_interface(size, "floor", ""),
    "interface, linkrx packet_mmap, columns": lambda size: linkrx_on_interface(
        size, "packet_mmap", "columns"
    ),
    "interface, linkrx packet_mmap, deliver": lambda size: linkrx_on_interface(
        size, "packet_mmap", "deliver"
    ),
    "interface, linkrx recvmmsg, columns": lambda size: linkrx_on_interface(size, "recvmmsg", "columns"),
    "interface, linkrx recvmmsg, deliver": lambda size: linkrx_on_interface(size, "recvmmsg", "deliver"),
    "interface, linkrx readv, deliver": lambda size: linkrx_on_interface(size, "readv", "deliver"),
    "interface, linkrx os_readv, deliver": lambda size: linkrx_on_interface(size, "os_readv", "deliver"),
    "interface, pcapy-ng next_batch, bytes each": lambda size: peer_on_interface(size, "pcapy", "next_batch"),
    "interface, pcapy-ng dispatch": lambda size: peer_on_interface(size, "pcapy", "dispatch"),
    "interface, socket.recv_into": lambda size: peer_on_interface(size, "socket", ""),
    "interface, scapy, raw": lambda size: peer_on_interface(size, "scapy", "raw"),
    "interface, scapy, dissected": lambda size: peer_on_interface(size, "scapy", "dissected"),
    "interface, gVisor, recvmmsg": lambda size: peer_on_interface(size, "gvisor", "recvmmsg"),
    "interface, gVisor, mmap": lambda size: peer_on_interface(size, "gvisor", "mmap"),
}


@pytest.mark.parametrize("size", [64, 1514])
@pytest.mark.parametrize("lane", LANES)
def test_flood(benchmark: Any, processors: list[int], lane: str, size: int) -> None:
    """Every frame sent is delivered, or counted as dropped by the kernel."""
    if len(processors) < 2:
        pytest.skip("a flood takes two processors")
    frames = Frames(size)
    seconds = SECONDS if benchmark.enabled else SHORT_SECONDS
    rounds: list[dict[str, float]] = []
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(LANES[lane](size))
        except Missing as missing:
            pytest.skip(str(missing))
        benchmark.pedantic(
            lambda: rounds.append(flood(opened, frames, seconds, processors[0])), rounds=ROUNDS
        )
    source, _, reader = lane.partition(", ")
    medians = {name: round(statistics.median(one[name] for one in rounds), 1) for name in rounds[0]}
    note(benchmark, source=source, reader=reader, size=size, flood=medians)


def flood(lane: Lane, frames: Frames, seconds: float, processor: int) -> dict[str, float]:
    """Run one flood, and account for its frames."""
    results: list[Flood] = []

    def send() -> None:
        os.sched_setaffinity(0, {processor})  # of this thread
        results.append(frames.flood(lane.injector, seconds))

    sender = threading.Thread(target=send, name="flood")
    dropped, cpu = lane.drops(), lane.cpu_ns()
    start = time.perf_counter_ns()
    sender.start()
    packets, last = lane.consume(lambda: not sender.is_alive())
    sender.join()
    cpu, dropped = lane.cpu_ns() - cpu, lane.drops() - dropped
    (sent,) = results
    assert sent.accepted == packets + dropped, f"{sent.accepted} sent, {packets} received, {dropped} dropped"
    assert packets > 0
    return {
        "sent_pps": sent.accepted / sent.took_ns * 1e9,
        "delivered_pps": packets / (last - start) * 1e9,
        "dropped_pps": dropped / sent.took_ns * 1e9,
        "delivered_share": 100 * packets / sent.accepted,
        "sender_ns": sent.cpu_ns / (sent.accepted + sent.refused),
        "receiver_ns": cpu / packets,
    }
