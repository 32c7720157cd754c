"""Rigs: one of every kind of source, with a way to put frames into it.

Those that make devices need CAP_NET_ADMIN and a network namespace of one's own: `namespace.enter_private_network`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from linkrx.capabilities import HasFileno
from linkrx.dispatcher import Dispatcher
from linkrx.factory import open
from linkrx.packet import ETH_HEADER_BYTES
from linkrx.source import ETH_P_ALL, SO_RCVBUFFORCE
from linkrx.tuntap import TunTap

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
PROTOCOL = 0x88B5  # IEEE 802: local experimental use

_numbers = count()


@dataclass
class Rig:
    """A source and a way to put frames into it. `frame(n)` makes one of n bytes, the least being `shortest`."""

    source: int | str | HasFileno
    send: Callable[[bytes], object]
    ethernet: bool
    shortest: int
    longest: int
    options: dict[str, Any] = field(default_factory=dict)
    prefix: bytes = b""
    takes_hostile: bool = True
    queue: int = 100

    def frame(self, size: int, mark: int = 0) -> bytes:
        """A good frame of `size` bytes; `mark` tells it from others."""
        head = LOCAL + REMOTE + PROTOCOL.to_bytes(2, "big") if self.ethernet else b"\x45"
        body = mark.to_bytes(4, "big") + bytes(range(256)) * (size // 256 + 1)
        return (head + body)[:size]

    def open(self, backend: str, deliver: Any = None, **options: Any) -> Dispatcher:
        """A dispatcher on this source."""
        return open(self.source, deliver, backend=backend, **{**self.options, **options})


def _datagrams(kind: socket.SocketKind, *, blocking: bool = True, **options: Any) -> Iterator[Rig]:
    receiver, sender = socket.socketpair(socket.AF_UNIX, kind)
    with receiver, sender:
        receiver.setblocking(blocking)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
        prefix = bytes(10) if options.get("vnet_header") else b""
        yield Rig(
            receiver,
            lambda frame: sender.send(prefix + frame),
            ethernet=options.get("ethernet", True),
            shortest=0,
            longest=150_000,
            options=options,
            prefix=prefix,
        )


@contextmanager
def unix_dgram() -> Iterator[Rig]:
    """A blocking AF_UNIX datagram pair that carries Ethernet."""
    yield from _datagrams(socket.SOCK_DGRAM)


@contextmanager
def unix_dgram_ip() -> Iterator[Rig]:
    """A non-blocking AF_UNIX datagram pair that carries IP packets."""
    yield from _datagrams(socket.SOCK_DGRAM, blocking=False, ethernet=False)


@contextmanager
def unix_dgram_vnet() -> Iterator[Rig]:
    """An AF_UNIX datagram pair with a virtio-net header in front of every frame."""
    yield from _datagrams(socket.SOCK_DGRAM, vnet_header=True)


@contextmanager
def unix_seqpacket() -> Iterator[Rig]:
    """An AF_UNIX seqpacket pair."""
    yield from _datagrams(socket.SOCK_SEQPACKET)


@contextmanager
def udp() -> Iterator[Rig]:
    """A UDP socket on the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(receiver.getsockname())
            yield Rig(receiver, sender.send, ethernet=True, shortest=0, longest=65_507, queue=64)


def _pipe(flags: int) -> Iterator[Rig]:
    reader, writer = os.pipe2(os.O_DIRECT | flags)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        # Each packet takes a page of the pipe, 16 by default.
        yield Rig(
            reader, lambda frame: os.write(writer, frame), ethernet=True, shortest=1, longest=4096, queue=16
        )


@contextmanager
def pipe() -> Iterator[Rig]:
    """A blocking pipe in packet mode."""
    yield from _pipe(0)


@contextmanager
def pipe_nonblocking() -> Iterator[Rig]:
    """A non-blocking pipe in packet mode."""
    yield from _pipe(os.O_NONBLOCK)


def _raise_link(name: str, **settings: Any) -> None:
    from pyroute2 import IPRoute  # half a second to import, and of no use to those who only receive

    with IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(name), state="up", **settings)


def injector_on(name: str) -> socket.socket:
    """A socket that sends on the interface and receives nothing (protocol 0)."""
    injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    injector.bind((name, 0))
    return injector


def _queue(mode: str, *, blocking: bool = False, **settings: Any) -> Iterator[Rig]:
    with TunTap(f"lrx{next(_numbers)}", mode, **settings) as queue:
        os.set_blocking(queue.fileno(), blocking)
        _raise_link(queue.name, mtu=65_000)
        with injector_on(queue.name) as injector:
            yield Rig(
                queue,
                injector.send,
                ethernet=mode == "tap",
                shortest=ETH_HEADER_BYTES if mode == "tap" else 1,
                longest=65_000,
                takes_hostile=mode == "tun",
            )


@contextmanager
def tap() -> Iterator[Rig]:
    """A non-blocking TAP queue."""
    yield from _queue("tap")


@contextmanager
def tap_blocking() -> Iterator[Rig]:
    """A blocking TAP queue."""
    yield from _queue("tap", blocking=True)


@contextmanager
def tap_vnet() -> Iterator[Rig]:
    """A TAP queue with a virtio-net header."""
    yield from _queue("tap", vnet_header=True)


@contextmanager
def tun() -> Iterator[Rig]:
    """A TUN queue."""
    yield from _queue("tun")


@contextmanager
def veth() -> Iterator[tuple[str, str]]:
    """The names of the two ends of a veth pair that is up and takes jumbo frames."""
    from pyroute2 import IPRoute

    number = next(_numbers)
    near, far = f"lrxn{number}", f"lrxf{number}"
    with IPRoute() as route:
        route.link("add", ifname=near, kind="veth", peer=far)
    try:
        for name in (near, far):
            _raise_link(name, mtu=65_000)
        yield near, far
    finally:
        with IPRoute() as route:
            for index in route.link_lookup(ifname=near):
                route.link("del", index=index)


@contextmanager
def interface() -> Iterator[Rig]:
    """An interface by name: one end of a veth pair."""
    with veth() as (near, far), injector_on(far) as injector:
        yield Rig(
            near, injector.send, ethernet=True, shortest=ETH_HEADER_BYTES, longest=65_000, takes_hostile=False
        )


def _packet_socket(kind: socket.SocketKind) -> Iterator[Rig]:
    with (
        veth() as (near, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, kind, 0) as borrowed,
    ):
        borrowed.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 * 1024 * 1024)
        borrowed.bind((near, ETH_P_ALL))
        raw = kind == socket.SOCK_RAW

        def send(frame: bytes) -> None:
            injector.send(frame if raw else LOCAL + REMOTE + b"\x08\x00" + frame)

        yield Rig(
            borrowed,
            send,
            ethernet=raw,
            shortest=ETH_HEADER_BYTES if raw else 1,
            longest=64_000,
            takes_hostile=not raw,
        )


@contextmanager
def packet() -> Iterator[Rig]:
    """A borrowed AF_PACKET socket with link headers."""
    yield from _packet_socket(socket.SOCK_RAW)


@contextmanager
def packet_cooked() -> Iterator[Rig]:
    """A borrowed AF_PACKET socket without link headers."""
    yield from _packet_socket(socket.SOCK_DGRAM)


MakeRig = Callable[[], AbstractContextManager[Rig]]

# Every kind of source: those that anyone can make, and those that take a device.
PLAIN_RIGS: tuple[MakeRig, ...] = (
    unix_dgram,
    unix_dgram_ip,
    unix_dgram_vnet,
    unix_seqpacket,
    udp,
    pipe,
    pipe_nonblocking,
)
DEVICE_RIGS: tuple[MakeRig, ...] = (tap, tap_blocking, tap_vnet, tun, interface, packet, packet_cooked)
