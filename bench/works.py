"""The work for each packet, as statements that are the same for all readers, and these readers."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from peers import ROOM, Missing, cypcap_on, package, pcapy_on
from queues import Source
from race import Check, Drain, Queue, Reader

import linkrx

IPV4 = struct.Struct("!B8xB2x4s4s")  # version and header length, protocol, source, destination
UDP = struct.Struct("!HHH")  # source port, destination port, length
PATIENCE = 10.0  # seconds within which a fill must be drained


@dataclass(frozen=True)
class Work:
    """Statements on `packet`, which is a linkrx.Packet, or the `bytes` of other readers."""

    ours: str
    theirs: str
    needs: str = ""  # an attribute of linkrx.Packet that it needs

    def missing(self) -> str | None:
        """The reason if linkrx cannot do this work, else None."""
        there = not self.needs or hasattr(linkrx.Packet, self.needs)
        return None if there else f"linkrx.Packet has no {self.needs}"


INDEXED = hasattr(linkrx.Packet, "__getitem__")
PORTS = "(packet[start] << 8 | packet[start + 1]) + (packet[start + 2] << 8 | packet[start + 3])"
BY_INDEX = f"start = 14 + (packet[14] & 15) * 4; seen += packet[23] + {PORTS}"
WORKS = {
    "nothing": Work("pass", "pass"),
    "len": Work("seen += len(packet)", "seen += len(packet)"),
    "one byte": Work(
        "seen += packet[23]" if INDEXED else "seen += packet.frame[23]",
        "seen += packet[23]",
    ),
    "bytes": Work("seen += bytes(packet)[-1]", "seen += packet[-1]"),
    "tobytes": Work("seen += packet.tobytes()[-1]", "seen += packet[-1]", needs="tobytes"),
    "headers, data": Work(
        "data = packet.data; version, protocol, source, target = IPV4.unpack_from(data); "
        "near, far, length = UDP.unpack_from(data, (version & 15) * 4); seen += protocol + near + far + length",
        "version, protocol, source, target = IPV4.unpack_from(packet, 14); "
        "near, far, length = UDP.unpack_from(packet, 14 + (version & 15) * 4); seen += protocol + near + far + length",
    ),
    "headers, index": Work(BY_INDEX, BY_INDEX, needs="__getitem__"),
    "keep": Work("keep(packet)", "keep(packet)"),
}

TEMPLATE = """
def make():
    seen, kept = 0, []
    keep = kept.append
    def handle({arguments}):
        nonlocal seen
        {statements}
    def result():
        nonlocal seen
        total, seen = seen + len(kept), 0
        kept.clear()
        return total
    return handle, result, kept
"""
LINKRX, PCAP, BYTES = "remote, local, protocol, packet", "header, packet", "packet"
Handle = Callable[..., None]


class Worker:
    """A function that does the work for every packet, and the sum of the values that it reads."""

    def __init__(self, statements: str, arguments: str, queue: Queue, check: Check | None = None) -> None:
        """With `check`, which also gets every byte, the worker must not be timed."""
        names: dict[str, Any] = {"IPV4": IPV4, "UDP": UDP}
        exec(TEMPLATE.format(arguments=arguments, statements=statements), names)
        handle: Handle
        self._result: Callable[[], int]
        handle, self._result, self._kept = names["make"]()
        self._check, self.handle, self.wanted = check, handle, 0
        if check is not None and "keep" not in statements:

            def shown(*arguments: Any) -> None:
                handle(*arguments)
                check(bytes(arguments[-1]))

            self.handle = shown
        self.queue = queue

    def expect(self, work: Work) -> None:
        """From now on `result` must be the sum for the frames in the queue."""
        judge = Worker(work.theirs, BYTES, self.queue)
        for frame in self.queue.frames.numbered(self.queue.packets):
            judge.handle(frame)
        self.wanted = judge._result()

    def result(self) -> int:
        """The sum. Kept packets are dropped."""
        if self._check is not None:
            for packet in self._kept:
                self._check(bytes(packet))
        return self._result()

    def finish(self) -> int:
        """Assert that the work was done. Returns the number of packets."""
        got = self.result()
        assert got == self.wanted, f"the sum of what was looked at is {got}, and should be {self.wanted}"
        return self.queue.packets


def worker(work: Work, statements: str, arguments: str, queue: Queue, check: Check | None) -> Worker:
    """A worker with its expected result."""
    made = Worker(statements, arguments, queue, check)
    made.expect(work)
    return made


def linkrx_work(queue: Queue, source: Source, work: Work, **options: Any) -> Reader:
    """linkrx's `deliver`. Raises Missing if linkrx cannot do the work."""
    if why := work.missing():
        raise Missing(why)

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        does = worker(work, work.ours, LINKRX, queue, check)

        def drain() -> int:
            packets, wanted = 0, queue.packets
            while packets < wanted:
                packets += rx.drain()
            return does.finish()

        with linkrx.open(source, does.handle, **options) as rx:
            yield drain

    return Reader(queue, opened)


def hand_work(queue: Queue, receive: Callable[[int], bytes], work: Work) -> Reader:
    """A loop by hand of a call that takes a size and returns `bytes`, like `source.recv`."""

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        does = worker(work, work.theirs, BYTES, queue, check)

        def drain() -> int:
            handle = does.handle
            for _ in range(queue.packets):
                handle(receive(ROOM))
            return does.finish()

        yield drain

    return Reader(queue, opened)


def pcap_work(queue: Queue, near: str, work: Work, module: str) -> Reader:
    """`dispatch` of pcapy-ng (`pcapy`) or `cypcap`, on a ring as large as linkrx's."""
    package(module, {"pcapy": "pcapy-ng"}.get(module, module))  # raises Missing at once

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        does = worker(work, work.theirs, PCAP, queue, check)
        with ExitStack() as stack:
            reader = (pcapy_on if module == "pcapy" else cypcap_on)(near)
            stack.callback(reader.close)

            def pcapy() -> int:
                packets, wanted = 0, queue.packets
                while packets < wanted:
                    packets += reader.dispatch(-1, does.handle)
                return does.finish()

            def cypcap() -> int:
                # Its dispatch does not return the number of packets. One call is enough when all blocks are closed.
                reader.dispatch(-1, does.handle)
                got, until = does.result(), time.monotonic() + PATIENCE
                while got != does.wanted and time.monotonic() < until:
                    reader.dispatch(-1, does.handle)
                    got += does.result()
                assert got == does.wanted, f"the sum of what was looked at is {got}, not {does.wanted}"
                return queue.packets

            yield pcapy if module == "pcapy" else cypcap

    return Reader(queue, opened)


def socket_of(source: Source) -> socket.socket:
    """The source as a socket, for type checkers."""
    assert isinstance(source, socket.socket)
    return source
