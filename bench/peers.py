"""Readers of other libraries, which are compared with linkrx. A library that is not installed raises Missing."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from compiled import end
from queues import BUFFER, BYTE
from race import Buffer, Check, Drain, OwnClock, Queue, Reader

from linkrx.kernel.uapi import SO_RCVBUFFORCE

ROOM = 65_600
GO_PATH = Path(os.environ.get("LINKRX_GOPATH", "/usr/share/gocode"))  # where Debian puts Go packages
GVISOR_FRAMES = 32  # in its ring
BUILD_SECONDS = 600


class Missing(Exception):
    """The reason why a reader cannot be measured here."""


class Field:
    """The readers to measure, and the reasons for those that are missing."""

    def __init__(self) -> None:
        self.readers: dict[str, Reader] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Reader]) -> None:
        """Add a reader, or the reason why it is missing."""
        try:
            self.readers[name] = make()
        except Missing as missing:
            self.left_out[name] = str(missing)


def package(name: str, install: str) -> Any:
    """Import an optional module. Raises Missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"{error}: pip install {install}") from error


def loop(queue: Queue, bare: Drain, one: Callable[[], Buffer]) -> Reader:
    """A loop over an open source: `bare` drains it once, `one` receives one packet."""

    def opened(check: Check | None) -> AbstractContextManager[Drain]:
        def checked(check: Check) -> int:
            for _ in range(queue.packets):
                check(one())
            return queue.packets

        return nullcontext(bare if check is None else lambda: checked(check))

    return Reader(queue, opened)


def os_read(queue: Queue, fd: int) -> Reader:
    """A loop of os.read alone."""

    def bare() -> int:
        for _ in range(queue.packets):
            os.read(fd, ROOM)
        return queue.packets

    return loop(queue, bare, lambda: os.read(fd, ROOM))


def socket_recv_into(queue: Queue, source: socket.socket) -> Reader:
    """A loop of socket.recv_into one buffer."""
    memory = bytearray(ROOM)

    def bare() -> int:
        for _ in range(queue.packets):
            source.recv_into(memory)
        return queue.packets

    return loop(queue, bare, lambda: memory[: source.recv_into(memory)])


@contextmanager
def pytun_device() -> Iterator[Any]:
    """A TAP device of python-pytun."""
    pytun = package("pytun", "python-pytun")
    device = pytun.TunTapDevice(flags=pytun.IFF_TAP | pytun.IFF_NO_PI)
    try:
        yield device
    finally:
        device.close()


def pytun_read(queue: Queue, device: Any) -> Reader:
    """TunTapDevice.read."""

    def bare() -> int:
        for _ in range(queue.packets):
            device.read(ROOM)
        return queue.packets

    return loop(queue, bare, lambda: device.read(ROOM))


def scapy_listener(near: str) -> Any:
    """scapy's listening socket, with its default buffer."""
    package("scapy", "scapy")
    linux: Any = import_module("scapy.arch.linux")
    import_module("scapy.layers.inet")
    return linux.L2ListenSocket(iface=near)


def scapy_reader(queue: Queue, near: str, *, dissect: bool) -> Reader:
    """scapy's listening socket, with bytes or with dissected packets."""
    package("scapy", "scapy")

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        listener = scapy_listener(near)
        listener.ins.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)

        def raw() -> int:
            for _ in range(queue.packets):
                listener.recv_raw()
            return queue.packets

        def dissected() -> int:
            for _ in range(queue.packets):
                listener.recv()
            return queue.packets

        def checked(check: Check) -> int:
            for _ in range(queue.packets):
                check(bytes(listener.recv()) if dissect else listener.recv_raw()[1])
            return queue.packets

        try:
            yield (dissected if dissect else raw) if check is None else lambda: checked(check)
        finally:
            listener.close()

    return Reader(queue, opened)


def _pcapy_records(data: bytes, meta: bytes) -> Iterator[bytes]:
    for _, _, start, length in struct.iter_unpack("=4I", meta):
        yield data[start : start + length]


def _buffer_records(memory: Buffer, packets: int) -> Iterator[Buffer]:
    at = 0
    for _ in range(packets):
        (length,) = struct.unpack_from("<I", memory, at)
        yield memory[at + 5 : at + 5 + length]
        at += 5 + length


def pcapy_on(near: str) -> Any:
    """A reader of pcapy-ng that does not wait, with a ring as large as linkrx's."""
    reader = package("pcapy", "pcapy-ng").create(near)
    reader.set_snaplen(65_536)
    reader.set_promisc(0)
    reader.set_timeout(1)
    reader.set_buffer_size(BUFFER)
    reader.activate()
    reader.setnonblock(1)
    return reader


def cypcap_on(near: str) -> Any:
    """A reader of cypcap that does not wait, with a ring as large as linkrx's."""
    reader = package("cypcap", "cypcap").create(near)
    reader.set_snaplen(65_536)
    reader.set_promisc(False)
    reader.set_timeout(0.001)
    reader.set_buffer_size(BUFFER)
    reader.activate()
    reader.setnonblock(True)
    return reader


def pcapy_reader(queue: Queue, near: str, call: str) -> Reader:
    """A call of pcapy-ng that takes many packets without waiting, on a ring as large as linkrx's.

    `next_batch` (metadata only), `next_batch_byte` (and one byte of each), `next_batch_bytes` (and one `bytes` each),
    `loop_to_buffer` (all into one buffer: no object per packet).
    """
    wanted = queue.packets
    package("pcapy", "pcapy-ng")  # raises Missing at once

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        reader = pcapy_on(near)
        memory = bytearray(wanted * (queue.frames.size + 64))
        show = check or (lambda frame: None)
        size = struct.calcsize("=4I")

        def next_batch() -> int:
            packets = 0
            while packets < wanted:
                packets += len(reader.next_batch(1024)[1]) // size
            return packets

        def next_batch_bytes() -> int:
            packets = 0
            while packets < wanted:
                data, meta = reader.next_batch(1024)
                packets += len(meta) // size
                for _, _, start, length in struct.iter_unpack("=4I", meta):
                    data[start : start + length]
            return packets

        def next_batch_byte() -> int:
            packets = seen = 0
            while packets < wanted:
                data, meta = reader.next_batch(1024)
                packets += len(meta) // size
                for _, _, start, _ in struct.iter_unpack("=4I", meta):
                    seen += data[start + BYTE]
            assert seen == packets * socket.IPPROTO_UDP
            return packets

        def next_batch_checked() -> int:
            packets = 0
            while packets < wanted:
                for frame in _pcapy_records(*reader.next_batch(1024)):
                    show(frame)
                    packets += 1
            return packets

        def loop_to_buffer() -> int:
            packets = 0
            while packets < wanted:
                got = reader.loop_to_buffer(wanted - packets, memory)[0]
                if check is not None:
                    for frame in _buffer_records(memory, got):
                        show(frame)
                packets += got
            return packets

        calls = {
            "next_batch": next_batch if check is None else next_batch_checked,
            "next_batch_byte": next_batch_byte if check is None else next_batch_checked,
            "next_batch_bytes": next_batch_bytes if check is None else next_batch_checked,
            "loop_to_buffer": loop_to_buffer,
        }
        try:
            yield calls[call]
        finally:
            reader.close()

    return Reader(queue, opened)


@cache
def gvisor_program() -> Path:
    """Compile gvisor.go with the system's gVisor. Raises Missing without gVisor or Go."""
    go = shutil.which("go")
    packages = GO_PATH / "src/gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
    if go is None or not packages.is_dir():
        raise Missing("no Go or no gVisor: apt install golang-go golang-gvisor-gvisor-dev")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    try:
        subprocess.run(
            [go, "build", "-o", f"{folder}/gvisor", Path(__file__).with_name("gvisor.go")],
            env={**os.environ, "GO111MODULE": "off", "GOPATH": str(GO_PATH), "GOFLAGS": ""},
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        )
    except subprocess.CalledProcessError as error:
        raise Missing(f"gvisor.go does not compile: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"gvisor.go did not compile within {BUILD_SECONDS} s") from error
    return Path(folder, "gvisor")


class Gvisor(OwnClock):
    """A process of gvisor.go, in which gVisor's dispatchers receive from a descriptor."""

    def __init__(self, fd: int, mode: str, packets: int) -> None:
        """Start the process. With 0 packets it counts, and never pauses."""
        self._packets = packets
        self._check: Check | None = None
        self._process = subprocess.Popen(
            [gvisor_program(), str(fd), mode, str(packets)],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._line()
        if said != "attached":
            self.close()
            raise Missing(f"gVisor says: {said}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, line: str) -> list[int]:
        """Send a line, and return the numbers in the answer."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return [int(word) for word in self._line().split()]

    def warm(self) -> None:
        """Wait until all packets were delivered once. Then the process pauses."""
        assert self._line() == "warm"

    def watch(self, check: Check | None) -> None:
        """From now on pass received frames to `check`, if it is given."""
        self._check = check

    def __call__(self) -> int:
        """Let the process drain a filled queue."""
        self.took_ns, size, check, switches = self.ask("drain" if self._check is None else "check")
        self.disturbed = switches > 0
        if self._check is not None:
            self._check.set(self._packets, size, check)
        return self._packets

    def close(self) -> None:
        """End the process."""
        end(self._process)


def gvisor_reader(queue: Queue, fd: int, mode: str) -> Reader:
    """gVisor's dispatcher of a mode (`readv`, `recvmmsg`, `mmap`) on a descriptor."""
    gvisor_program()

    @contextmanager
    def opened(check: Check | None) -> Iterator[Drain]:
        # gVisor cannot set fanout or a ring on a descriptor twice. So one process is first checked and then timed.
        if not running:
            running.append(Gvisor(fd, mode, queue.packets))
            queue.fill()
            running[0].warm()
        running[0].watch(check)
        yield running[0]
        if check is None:
            running.pop().close()

    running: list[Gvisor] = []
    return Reader(queue, opened)
