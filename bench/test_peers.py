"""Compares linkrx with other libraries: every reader drains the same frames, round by round in random order.

pytest-benchmark shows the time of linkrx's `deliver`. The others' times are below its table, and in the JSON.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import peers
import pytest
from floors import Frames
from peers import Field
from queues import (
    SOURCES,
    WAYS,
    columns_byte,
    linkrx_reader,
    packet_socket,
    packets_of,
    ring,
    tap,
)
from race import Queue, Reader, race

from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import TAP_MTU, veth

SIZED = pytest.mark.parametrize("size", [64, 1514])
SLOW_PACKETS = 64  # in a fill for readers that take many microseconds per packet
PCAPY = {
    "loop_to_buffer": "pcapy-ng loop_to_buffer",
    "next_batch": "pcapy-ng next_batch",
    "next_batch_byte": "pcapy-ng next_batch and a byte of each",
    "next_batch_bytes": "pcapy-ng next_batch, bytes each",
}


@SIZED
def test_tap(benchmark: Any, size: int) -> None:
    """Each reader drains its own TAP queue."""
    with ExitStack() as stack:
        field = Field()

        def own() -> Any:
            return stack.enter_context(tap(Frames(size)))

        queue, source, field.readers["C floor"] = own()
        for way in WAYS:
            queue, source, _ = own()
            field.readers[f"linkrx readv, {way}"] = linkrx_reader(queue, source, WAYS[way])
        queue, source, _ = own()
        field.readers["linkrx os_readv, deliver"] = linkrx_reader(
            queue, source, WAYS["deliver"], backend="os_readv"
        )
        queue, source, _ = own()
        field.readers["os.read"] = peers.os_read(queue, source.fileno())

        def pytun() -> Reader:
            device = stack.enter_context(peers.pytun_device())
            near = Device(device.name)
            near.set_mtu(TAP_MTU)
            near.set_up()
            injector = stack.enter_context(injector_on(device.name))
            return peers.pytun_read(Queue(Frames(size), injector, packets_of(size)), device)

        def gvisor() -> Reader:
            queue, source, _ = own()
            return peers.gvisor_reader(queue, source.fileno(), "readv")

        field.add("python-pytun", pytun)
        field.add("gVisor, readv", gvisor)
        compare(benchmark, field, "tap", "linkrx readv, deliver", size)


@SIZED
def test_unix(benchmark: Any, size: int) -> None:
    """Each reader drains its own AF_UNIX datagram pair."""
    compare_sockets(benchmark, "unix", size, WAYS)


@SIZED
def test_packet(benchmark: Any, size: int) -> None:
    """Each reader drains its own packet socket, on its own interface. No ring empties the caches in between."""
    compare_sockets(benchmark, "packet", size, ("columns", "deliver"))


def compare_sockets(benchmark: Any, source: str, size: int, ways: Iterable[str]) -> None:
    """Measure readers that each have a socket of their own."""
    with ExitStack() as stack:
        field = Field()

        def own() -> Any:
            return stack.enter_context(SOURCES[source][0](Frames(size)))

        queue, opened, field.readers["C floor"] = own()
        for way in ways:
            queue, opened, _ = own()
            field.readers[f"linkrx recvmmsg, {way}"] = linkrx_reader(queue, opened, WAYS[way])
        queue, opened, _ = own()
        field.readers["socket.recv_into"] = peers.socket_recv_into(queue, opened)
        for mode in ("recvmmsg", "readv"):

            def gvisor(mode: str = mode) -> Reader:
                queue, opened, _ = own()
                return peers.gvisor_reader(queue, opened.fileno(), mode)

            field.add(f"gVisor, {mode}", gvisor)
        compare(benchmark, field, source, "linkrx recvmmsg, deliver", size)


@SIZED
def test_interface(benchmark: Any, size: int) -> None:
    """All rings are on one interface, with more frames than fit in a cache. Each socket is on its own interface."""
    with ExitStack() as stack:
        field, frames = Field(), Frames(size)
        queue, near, field.readers["C floor"] = stack.enter_context(ring(frames))
        assert isinstance(near, str)
        for way in WAYS:
            field.readers[f"linkrx packet_mmap, {way}"] = linkrx_reader(queue, near, WAYS[way])
        field.readers["linkrx packet_mmap, columns and a byte of each"] = linkrx_reader(
            queue, near, columns_byte
        )
        for call, name in PCAPY.items():
            field.add(name, lambda call=call: peers.pcapy_reader(queue, near, call))  # type: ignore[misc]

        for dissect, name in ((False, "scapy, raw"), (True, "scapy, dissected")):

            def scapy(dissect: bool = dissect) -> Reader:
                near, far = stack.enter_context(veth())
                injector = stack.enter_context(injector_on(far))
                return peers.scapy_reader(Queue(Frames(size), injector, SLOW_PACKETS), near, dissect=dissect)

            field.add(name, scapy)

        def gvisor() -> Reader:
            alone, source, _ = stack.enter_context(packet_socket(Frames(size)))
            assert isinstance(source, socket.socket)
            alone.packets = peers.GVISOR_FRAMES
            return peers.gvisor_reader(alone, source.fileno(), "mmap")

        field.add("gVisor, mmap", gvisor)
        compare(benchmark, field, "interface", "linkrx packet_mmap, deliver", size)


def compare(benchmark: Any, field: Field, source: str, subject: str, size: int) -> None:
    """Measure the readers."""
    race(
        benchmark,
        field.readers,
        subject,
        source=source,
        size=size,
        left_out=field.left_out,
        packets={name: reader.queue.packets for name, reader in field.readers.items()},
        batch_size="default",
    )
