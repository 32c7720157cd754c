"""Conformance: what every backend must do on every source it accepts, for plug-in authors to call. No pytest inside.

    linkrx.namespace.enter_private_network()
    for cell in linkrx.testing.cells("mine"):
        print(cell.run())

A cell is one check on one kind of source. It passes, or says that the backend refuses the source, or raises
AssertionError. Rigs that make devices need CAP_NET_ADMIN and a network namespace of one's own.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from linkrx.batch import Batch
from linkrx.capabilities import HasFileno, probe
from linkrx.dispatcher import Dispatcher
from linkrx.errors import UnsupportedSource
from linkrx.factory import backends, open
from linkrx.packet import ETH_HEADER_BYTES, Packet
from linkrx.stats import End
from linkrx.tuntap import TunTap

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
PROTOCOL = 0x88B5  # IEEE 802: local experimental use
PATIENCE = 10.0  # seconds until a packet that should have come is missing

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
        if self.ethernet:
            head = LOCAL + REMOTE + PROTOCOL.to_bytes(2, "big")
        else:
            head = b"\x45"
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


def _injector(name: str) -> socket.socket:
    """A socket that sends on the interface and receives nothing (protocol 0)."""
    injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    injector.bind((name, 0))
    return injector


def _queue(mode: str, *, blocking: bool = False, **settings: Any) -> Iterator[Rig]:
    with TunTap(f"lrx{next(_numbers)}", mode, **settings) as queue:
        os.set_blocking(queue.fileno(), blocking)
        _raise_link(queue.name, mtu=65_000)
        with _injector(queue.name) as injector:
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
    with veth() as (near, far), _injector(far) as injector:
        yield Rig(
            near, injector.send, ethernet=True, shortest=ETH_HEADER_BYTES, longest=65_000, takes_hostile=False
        )


def _packet_socket(kind: socket.SocketKind) -> Iterator[Rig]:
    with (
        veth() as (near, far),
        _injector(far) as injector,
        socket.socket(socket.AF_PACKET, kind, 0) as borrowed,
    ):
        borrowed.setsockopt(socket.SOL_SOCKET, 33, 8 * 1024 * 1024)  # SO_RCVBUFFORCE
        borrowed.bind((near, 3))  # ETH_P_ALL
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

# Every kind of source, and whether its rig makes a device.
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


# Checks. Each opens the rig's source itself and leaves it as it was.


def collect(dispatcher: Dispatcher, packets: int) -> list[Packet]:
    """That many packets, or fewer if no more come."""
    found: list[Packet] = []
    while len(found) < packets:
        try:
            found.append(dispatcher.recv(PATIENCE))
        except TimeoutError:
            break
    return found


def _frames(rig: Rig, number: int) -> list[bytes]:
    least = max(rig.shortest, ETH_HEADER_BYTES + 4)
    return [rig.frame(least + 37 * index, index) for index in range(min(number, rig.queue))]


def check_delivery(rig: Rig, backend: str) -> None:
    """Packets are delivered whole and in order, with protocol and addresses from the header."""
    sent = _frames(rig, 50)
    calls: list[tuple[bytes | None, bytes | None, int, Packet]] = []
    with rig.open(backend, lambda *call: calls.append(call)) as rx:
        for frame in sent:
            rig.send(frame)
        while len(calls) < len(sent) and rx.dispatch(PATIENCE):
            pass
        assert [bytes(call[3]) for call in calls] == sent
        for remote, local, protocol, got in calls:
            assert (remote, local) == ((REMOTE, LOCAL) if rig.ethernet else (None, None))
            assert (remote, local, protocol) == (got.remote, got.local, got.protocol)
            assert protocol == (PROTOCOL if rig.ethernet else 0x0800)
            assert len(got.link_header) == (ETH_HEADER_BYTES if rig.ethernet else 0)
            assert bytes(got.link_header) + bytes(got.data) == bytes(got.frame)
            assert not got.truncated
            assert got.wire_length == len(got)
            assert (got.vnet is not None) == bool(rx.capabilities.vnet_header_size or rig.prefix)
        counted = rx.stats()
        assert (counted.packets, counted.bytes) == (len(sent), sum(map(len, sent)))
        assert counted.receives > 0
        assert counted.kernel_drops in (None, 0)


def check_lengths(rig: Rig, backend: str) -> None:
    """No length around a power of two, nor the longest, is cut by the default layout."""
    steps = [128, 384, 640, 1152, 1514, 2048, 2176, 4096, 4224, 8320, 16512, 32896, rig.longest]
    sizes = sorted({size for step in steps for size in (step - 1, step, step + 1) if size <= rig.longest})
    with rig.open(backend) as rx:
        for size in sizes:
            frame = rig.frame(size, size)
            rig.send(frame)
            (got,) = collect(rx, 1)
            assert bytes(got) == frame
            assert not got.truncated
        assert rx.stats().truncated == 0


def check_bad_packets(rig: Rig, backend: str) -> None:
    """Runts, empty packets and unknown IP versions are counted under their names and cost no neighbour."""
    good = [rig.frame(60 + index, index) for index in range(4)]
    runts = range(max(1, rig.shortest), ETH_HEADER_BYTES) if rig.ethernet and rig.takes_hostile else range(0)
    unknown = [b"\x00" * 40, b"\xff", b"\x50abc"] if not rig.ethernet and rig.takes_hostile else []
    empty = 2 if rig.shortest == 0 else 0
    with rig.open(backend) as rx:
        got = []
        for bad in [b"\x42" * size for size in runts] + unknown + [b""] * empty:
            for frame in (good[0], bad, good[1]):
                rig.send(frame)
            got += collect(rx, 2)
        for frame in good:
            rig.send(frame)
        got += collect(rx, 4)
        pairs = len(runts) + len(unknown) + empty
        assert [bytes(packet) for packet in got] == good[:2] * pairs + good
        counted = rx.stats()
        assert (counted.runts, counted.unknown_protocol, counted.empty) == (len(runts), len(unknown), empty)
        assert rx.end is None


def check_truncation(rig: Rig, backend: str) -> None:
    """A caller's own layout cuts what does not fit, flags it, and cuts nothing that just fits."""
    sizes = (20, 40, 60)
    with rig.open(backend, buffer_sizes=sizes) as rx:
        frames = [rig.frame(size, size) for size in (119, 120, 121, 500, 90)]
        for frame in frames:
            rig.send(frame)
        got = collect(rx, len(frames))
        assert [bytes(packet) for packet in got] == [frame[:120] for frame in frames]
        assert [packet.truncated for packet in got] == [False, False, True, True, False]
        for packet, frame in zip(got, frames, strict=True):
            assert packet.wire_length in (len(frame), len(packet))
        if rx.capabilities.socket and backend in ("readv", "recvmmsg"):
            assert [packet.wire_length for packet in got] == [len(frame) for frame in frames]
        assert rx.stats().truncated == 2


def check_columns(rig: Rig, backend: str) -> None:
    """A batch's columns, its packets and the frames that were sent say the same."""
    sent = _frames(rig, 20)
    with rig.open(backend, batch_size=7) as rx:
        for frame in sent:
            rig.send(frame)
        batches: list[Batch] = []
        for batch in rx.batches(PATIENCE):
            assert 1 <= len(batch) <= 7
            batches.append(batch)
            if sum(map(len, batches)) == len(sent):
                break
        frames = []
        for batch in batches:
            assert batch.memory.readonly
            for index, got in enumerate(batch):
                start, length = batch.starts[index], batch.lengths[index]
                frames.append(bytes(batch.memory[start : start + length]))
                assert frames[-1] == bytes(got) == bytes(batch[index])
                assert batch.protocols[index] == got.protocol
                assert batch.wire_lengths[index] == got.wire_length
                assert batch.flags[index] & 1 == got.truncated
        assert frames == sent
        assert rx.stats().batches == len(batches)


def check_keeping(rig: Rig, backend: str) -> None:
    """What is kept, in whatever pattern, still shows what was sent when everything else has come and gone."""
    kept: list[tuple[bytes, Packet | memoryview]] = []
    with rig.open(backend, batch_size=5) as rx:
        for turn in range(30):
            sent = [rig.frame(100 + 11 * turn + index, 16 * turn + index) for index in range(8)]
            for frame in sent:
                rig.send(frame)
            for index, (frame, got) in enumerate(zip(sent, collect(rx, len(sent)), strict=True)):
                if turn % 3 == 0 or index == turn % 8:
                    kept.append((frame, got))
                if index % 4 == 1:
                    kept.append((frame[20:40], got.frame[10:50][10:30]))
                if index % 5 == 2:
                    kept.append((frame, got.copy()))
    for frame, held in kept:
        assert bytes(held) == frame


def check_raising(rig: Rig, backend: str) -> None:
    """What deliver raises comes out of dispatch, and no packet is lost or delivered twice for it."""
    sent = _frames(rig, 12)
    got: list[bytes] = []

    class Refused(Exception):
        pass

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        if len(got) % 3 == 1:
            raise Refused

    raised = 0
    with rig.open(backend, deliver) as rx:
        for frame in sent:
            rig.send(frame)
        while len(got) < len(sent):
            try:
                rx.dispatch(PATIENCE)
            except Refused:
                raised += 1
    assert got == sent
    assert raised == len(sent) // 3


def check_stopping(rig: Rig, backend: str) -> None:
    """After stop() from inside deliver nothing more is delivered, and what was received is accounted for."""
    sent = _frames(rig, 10)
    got: list[bytes] = []
    with rig.open(backend, lambda _r, _l, _p, packet: (got.append(bytes(packet)), rx.stop())) as rx:
        for frame in sent:
            rig.send(frame)
        assert rx.run() is End.STOPPED
        assert rx.dispatch() is False
        assert rx.drain() == 0
        assert got == sent[:1]
        counted = rx.stats()
        assert counted.packets == 1
        assert 0 <= counted.undelivered < len(sent)


def check_polling(rig: Rig, backend: str) -> None:
    """fileno() is readable exactly when drain() has something to do."""
    got: list[bytes] = []
    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet)), batch_size=4) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        assert not poll.poll(0)
        sent = _frames(rig, 10)
        for frame in sent:
            rig.send(frame)
        while len(got) < len(sent):
            assert poll.poll(PATIENCE * 1000)
            assert rx.drain() <= 4
        assert got == sent
        assert rx.drain() == 0
        assert not poll.poll(0)
        rx.stop()
        assert poll.poll(0)


def check_restoring(rig: Rig, backend: str) -> None:
    """Nothing is left behind, open or refused: no descriptor, no changed flag, no packet taken."""
    before = set(os.listdir("/proc/self/fd"))
    found = probe(rig.source)
    for _ in range(3):
        with rig.open(backend) as rx:
            assert rx.backend == backend
        rx.close()
    assert probe(rig.source) == found
    assert set(os.listdir("/proc/self/fd")) == before


CHECKS: tuple[Callable[[Rig, str], None], ...] = (
    check_delivery,
    check_lengths,
    check_bad_packets,
    check_truncation,
    check_columns,
    check_keeping,
    check_raising,
    check_stopping,
    check_polling,
    check_restoring,
)


@dataclass(frozen=True)
class Cell:
    """One backend on one kind of source under one check."""

    backend: str
    make_rig: MakeRig
    check: Callable[[Rig, str], None]

    @property
    def name(self) -> str:
        """For reports: backend-source-check."""
        source = getattr(self.make_rig, "__name__", "source")
        return f"{self.backend}-{source}-{self.check.__name__.removeprefix('check_')}"

    def run(self) -> str:
        """ "supported" after the check passed, "refused" when the backend says why it does not take the source.

        A refusal must name both. An option that the backend does not honour leaves nothing to check: "supported".
        """
        info = next(info for info in backends() if info.name == self.backend)
        with self.make_rig() as rig:
            reason = info.backend.refuses(probe(rig.source))
            if reason is None:
                if self.check is not check_truncation or "buffer_sizes" in info.honours:
                    self.check(rig, self.backend)
                return "supported"
            try:
                rig.open(self.backend).close()
            except UnsupportedSource as error:
                assert self.backend in str(error)
                assert reason in str(error)
                return "refused"
            raise AssertionError(f"{self.backend} refuses the source ({reason}), but opened it")


def cells(backend: str, rigs: tuple[MakeRig, ...] = PLAIN_RIGS + DEVICE_RIGS) -> list[Cell]:
    """All cells of one backend."""
    return [Cell(backend, make_rig, check) for make_rig in rigs for check in CHECKS]
