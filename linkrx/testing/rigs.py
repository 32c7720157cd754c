"""Rigs: one for each kind of source. A rig makes a source, sends frames into it, and can change or delete its device.

Rigs with devices need CAP_NET_ADMIN and a private network namespace: call `namespace.enter_private_network` first.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from linkrx.factory import open
from linkrx.kernel.uapi import ETH_HEADER_BYTES, ETH_P_ALL, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE, SOL_PACKET
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.sources.capabilities import HasFileno
from linkrx.sources.capture_file import CaptureFile
from linkrx.sources.tuntap import TunTap
from linkrx.testing.devices import Device, delete_if_there, injector_on

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
PROTOCOL = 0x88B5  # IEEE 802: local experimental use

# The largest MTU of each kind of device: 65,535 bytes; on a TAP the link header counts too (drivers/net/tun.c).
TAP_MTU = 65_521
TUN_MTU = VETH_MTU = 65_535

# Bytes for a hundred of the longest frames.
PACKET_BUFFER = 8 * 1024 * 1024

FAR_END_PATIENCE = 30.0  # seconds
LONGEST_MESSAGE = 1 << 20

_numbers = count()


class Inapplicable(Exception):
    """The check does not apply to the source or the backend. The message says why."""


@dataclass
class Rig:
    """A source, and how to send frames into it.

    * `frame(n)` makes a frame of n bytes. Frames have `shortest` to `longest` bytes.
    * `send` never blocks. It raises BlockingIOError if a full queue stops senders. The queue holds at least `queue` frames.
    * `options` are passed to `linkrx.open`.
    * `prefix` is sent in front of each frame.
    * `takes_hostile`: `send` can send malformed frames.
    * `reported_protocol`: the protocol that the kernel reports beside each packet, with the sender REMOTE. None: it reports none.
    * `device` is the network device behind the source.
    * `hang_up` closes the other end.
    * `far_end` opens the other end. It gives a function that waits for the next frame that the source sends, and returns it.
      None: the source cannot send.
    * `recorded`: all packets are there before the source is opened.
    * `keeps_unread`: packets that one dispatcher did not read are there for the next.
    """

    source: int | str | HasFileno | CaptureFile
    send: Callable[[bytes], object]
    ethernet: bool
    shortest: int
    longest: int
    options: dict[str, Any] = field(default_factory=dict)
    prefix: bytes = b""
    takes_hostile: bool = True
    reported_protocol: int | None = None
    queue: int = 100
    device: Device | None = None
    hang_up: Callable[[], None] | None = None
    far_end: Callable[[], AbstractContextManager[Callable[[], bytes]]] | None = None
    recorded: bool = False
    keeps_unread: bool = True

    def frame(self, size: int, mark: int = 0) -> bytes:
        """A valid frame of `size` bytes. `mark` is a number in its payload."""
        head = LOCAL + REMOTE + PROTOCOL.to_bytes(2, "big") if self.ethernet else b"\x45"
        body = mark.to_bytes(4, "big") + bytes(range(256)) * (size // 256 + 1)
        return (head + body)[:size]

    def open(self, backend: str, deliver: Any = None, **options: Any) -> Dispatcher:
        """A dispatcher on this source."""
        return open(self.source, deliver, backend=backend, **{**self.options, **options})


@contextmanager
def _datagrams_of(peer: socket.socket, prefix: bytes) -> Iterator[Callable[[], bytes]]:
    def take() -> bytes:
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        assert poll.poll(FAR_END_PATIENCE * 1000), "no frame came out at the far end"
        message = peer.recv(LONGEST_MESSAGE)
        assert message.startswith(prefix)
        return message[len(prefix) :]

    yield take


@contextmanager
def _frames_on(name: str, *, ethernet: bool) -> Iterator[Callable[[], bytes]]:
    """The frames of `Rig.frame` that arrive at an interface. Packets that the kernel sends are skipped."""
    head = slice(12, 14) if ethernet else slice(0, 1)
    mark = PROTOCOL.to_bytes(2, "big") if ethernet else b"\x45"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as seen:
        seen.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        with suppress(PermissionError):
            seen.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, PACKET_BUFFER)
        seen.bind((name, ETH_P_ALL))
        seen.settimeout(FAR_END_PATIENCE)

        def take() -> bytes:
            while True:
                frame = seen.recv(LONGEST_MESSAGE)
                if frame[head] == mark:
                    return frame

        yield take


def _datagrams(kind: socket.SocketKind, *, blocking: bool = True, **options: Any) -> Iterator[Rig]:
    receiver, sender = socket.socketpair(socket.AF_UNIX, kind)
    with receiver, sender:
        receiver.setblocking(blocking)
        sender.setblocking(False)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
        rig = Rig(
            receiver,
            lambda frame: sender.send(rig.prefix + frame),
            ethernet=options.get("ethernet", True),
            shortest=0,
            longest=150_000,
            options=options,
            prefix=bytes(10) if options.get("vnet_header") else b"",
            hang_up=sender.close,
            far_end=lambda: _datagrams_of(sender, rig.prefix),
        )
        yield rig


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
            sender.setblocking(False)
            sender.connect(receiver.getsockname())
            yield Rig(receiver, sender.send, ethernet=True, shortest=0, longest=65_507, queue=64)


def _pipe(flags: int) -> Iterator[Rig]:
    reader, writing = os.pipe2(os.O_DIRECT | flags)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        writer = stack.enter_context(os.fdopen(writing, "wb", buffering=0))
        os.set_blocking(writing, False)

        def send(frame: bytes) -> None:
            if writer.write(frame) is None:
                raise BlockingIOError

        # Each packet takes a page of the pipe, which has 16 by default.
        yield Rig(reader, send, ethernet=True, shortest=1, longest=4096, queue=16, hang_up=writer.close)


@contextmanager
def pipe() -> Iterator[Rig]:
    """A blocking pipe in packet mode."""
    yield from _pipe(0)


@contextmanager
def pipe_nonblocking() -> Iterator[Rig]:
    """A non-blocking pipe in packet mode."""
    yield from _pipe(os.O_NONBLOCK)


def _queue(
    mode: str,
    name: str | None = None,
    *,
    blocking: bool = False,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Rig]:
    with TunTap(name or f"lrx{next(_numbers)}", mode, **settings) as queue:
        os.set_blocking(queue.fileno(), blocking)
        device = Device(queue.name)
        device.set_mtu(TAP_MTU if mode == "tap" else TUN_MTU)
        device.set_up()
        with injector_on(queue.name) as injector:
            yield Rig(
                queue,
                injector.send,
                ethernet=mode == "tap",
                shortest=ETH_HEADER_BYTES if mode == "tap" else 1,
                longest=65_535,
                options=options or {},
                takes_hostile=mode == "tun",
                device=device,
                far_end=lambda: _frames_on(device.name, ethernet=mode == "tap"),
            )


@contextmanager
def tap(name: str | None = None) -> Iterator[Rig]:
    """A non-blocking TAP queue."""
    yield from _queue("tap", name)


@contextmanager
def tap_blocking() -> Iterator[Rig]:
    """A blocking TAP queue."""
    yield from _queue("tap", blocking=True)


@contextmanager
def tap_vnet() -> Iterator[Rig]:
    """A TAP queue with a virtio-net header."""
    yield from _queue("tap", vnet_header=True)


@contextmanager
def tap_segment() -> Iterator[Rig]:
    """A TAP queue that delivers super-packets, which are split."""
    yield from _queue("tap", options={"segment": True}, vnet_header=True, offload=True)


@contextmanager
def tun(name: str | None = None) -> Iterator[Rig]:
    """A TUN queue."""
    yield from _queue("tun", name)


@contextmanager
def veth() -> Iterator[tuple[str, str]]:
    """The names of the two ends of a veth pair that is up and takes jumbo frames."""
    with _pair() as (device, far):
        yield device.name, far


@contextmanager
def _pair(name: str | None = None) -> Iterator[tuple[Device, str]]:
    from pyroute2 import IPRoute

    number = next(_numbers)
    near, far = name or f"lrxn{number}", f"lrxf{number}"
    with IPRoute() as route:
        route.link("add", ifname=near, kind="veth", peer=far)
    device = Device(near, far)
    try:
        Device(far).set(state="up")
        device.set_mtu(VETH_MTU)
        device.set_up()
        yield device, far
    finally:
        # Deleting one end deletes the other, even if a test has moved it.
        for name in (near, far):
            delete_if_there(name)


@contextmanager
def interface(name: str | None = None) -> Iterator[Rig]:
    """An interface by name: one end of a veth pair."""
    with _pair(name) as (device, far), injector_on(far) as injector:
        yield Rig(
            device.name,
            injector.send,
            ethernet=True,
            shortest=ETH_HEADER_BYTES,
            longest=VETH_MTU + ETH_HEADER_BYTES,
            takes_hostile=False,
            device=device,
            far_end=lambda: _frames_on(far, ethernet=True),
        )


def _packet_socket(kind: socket.SocketKind, **options: Any) -> Iterator[Rig]:
    with (
        _pair() as (device, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, kind, 0) as borrowed,
    ):
        try:
            borrowed.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, PACKET_BUFFER)
        except PermissionError:
            # SO_RCVBUFFORCE needs CAP_NET_ADMIN in the first user namespace. net.core.rmem_max bounds SO_RCVBUF.
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PACKET_BUFFER)
        borrowed.bind((device.name, ETH_P_ALL))
        raw = kind == socket.SOCK_RAW
        head = b"" if raw else LOCAL + REMOTE + b"\x08\x00"
        yield Rig(
            borrowed,
            lambda frame: injector.send(head + frame),
            ethernet=raw,
            shortest=ETH_HEADER_BYTES if raw else 1,
            longest=VETH_MTU + ETH_HEADER_BYTES * raw,
            options=options,
            takes_hostile=not raw,
            device=device,
            far_end=(lambda: _frames_on(far, ethernet=True)) if raw else None,
            reported_protocol=None if raw else 0x0800,
        )


@contextmanager
def packet() -> Iterator[Rig]:
    """A borrowed AF_PACKET socket with link headers."""
    yield from _packet_socket(socket.SOCK_RAW)


@contextmanager
def packet_segment() -> Iterator[Rig]:
    """A borrowed AF_PACKET socket that delivers super-packets, which are split."""
    yield from _packet_socket(socket.SOCK_RAW, segment=True)


@contextmanager
def packet_cooked() -> Iterator[Rig]:
    """A borrowed AF_PACKET socket without link headers."""
    yield from _packet_socket(socket.SOCK_DGRAM)


MakeRig = Callable[[], AbstractContextManager[Rig]]

# Every kind of source: those that need no privilege, and those that need a device.
PLAIN_RIGS: tuple[MakeRig, ...] = (
    unix_dgram,
    unix_dgram_ip,
    unix_dgram_vnet,
    unix_seqpacket,
    udp,
    pipe,
    pipe_nonblocking,
)
DEVICE_RIGS: tuple[MakeRig, ...] = (
    tap,
    tap_blocking,
    tap_vnet,
    tap_segment,
    tun,
    interface,
    packet,
    packet_segment,
    packet_cooked,
)
