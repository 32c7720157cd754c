"""Writes received packets to pcapng and pcap files."""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import stat
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Literal, Protocol, Self

from linkrx import _core
from linkrx.capture import blocks
from linkrx.capture.plain import NO_TIME, is_from_file
from linkrx.errors import Closed, RecordingFailed
from linkrx.packets import Batch, Packet
from linkrx.receiving.dispatcher import Dispatcher

if _core.types is None:
    from linkrx.capture.plain import record
else:
    record = _core.types.record

# Bytes per write(2). They fit into a processor's second-level cache, and few batches of small frames need two calls.
BUFFER_BYTES = 256 * 1024

ETHERNET, UNKNOWN = 1, 0xFFFFFFFF  # LINKTYPE_ETHERNET; no link type (_core/types/record.c)


class WritableFile(Protocol):
    """A binary file to record to. It has `write`, as the result of `open(path, "wb")` has."""

    def write(self, data: memoryview, /) -> int | None: ...


class PcapWriter:
    """Writes packets to a capture file: pcapng, or pcap with nanoseconds.

    `file` is a path or a binary file. The file at a path is truncated, or created, and `close` closes it. A binary file is
    borrowed and stays open. `write` returns after all its records are in the file, so that other programs can read the file
    while it grows. A file without a descriptor has got them by its `write` method.

    `source` is the dispatcher that the packets come from. It gives the names of interfaces and the number of packets that the
    kernel dropped: close it after this. Without it, names come from this network namespace, except for packets of a capture
    file, and no drops are written.

    A pcapng file has one interface description for each pair of interface and link type, the direction of packets that this
    host sent, and the drops at the end. A pcap file has one link type. Both have the original length of cut packets, and the
    VLAN tags that the kernel took out of frames. A packet without a timestamp gets the time of the call of `write`.

    Several threads may use it. Raises OSError if the file cannot be opened.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | WritableFile,
        *,
        format: Literal["pcapng", "pcap"] = "pcapng",
        source: Dispatcher | None = None,
    ) -> None:
        self._using = threading.RLock()
        self._busy = False  # a call is writing; only the thread that has the lock reads this
        self._closed = True  # until all is open
        self._owned = False
        if format not in ("pcapng", "pcap"):
            raise ValueError(f"format={format!r}: give 'pcapng' or 'pcap'")
        self._pcapng = format == "pcapng"
        self._source = source
        self._packets = 0  # whole packets in the file
        self._pending = 0  # whole packets in the buffer
        self._keys = array("Q")  # one for each interface of the file: link type and interface index
        self._buffer = bytearray(BUFFER_BYTES)
        self._end = 0  # bytes in the buffer
        self._done: list[int | None] = []  # bytes of them that each call of write(2) took
        self._failure: RecordingFailed | None = None
        self._open(file)
        self._closed = False
        if self._pcapng:
            try:
                self._put(blocks.section("linkrx"))
                self._flush()
            except BaseException:
                self._release()
                raise

    def _open(self, file: str | os.PathLike[str] | WritableFile) -> None:
        file = _unwrapped(file)
        self._fd = -1  # -1: written by its `write` method
        # A pair's two files are not accessible, so its buffer must be flushed.
        self._empty_buffer = file.flush if isinstance(file, io.BufferedRWPair) else lambda: None
        self._raw: io.FileIO | socket.SocketIO | None = None  # the borrowed file that has the descriptor
        self._write: Callable[[memoryview], int | None]
        if isinstance(file, (str, os.PathLike)):
            self._name = repr(os.fspath(file))
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._owned = True
        elif isinstance(file, io.TextIOBase) or not hasattr(file, "write") or not _is_writable(file):
            raise TypeError(f"PcapWriter({file!r}): give a path, or a binary file such as open(path, 'wb')")
        else:
            self._name = str(getattr(file, "name", type(file).__name__))
            self._file = file  # a reference, because collecting the object would close the file
            raw = file.raw if isinstance(file, (io.BufferedWriter, io.BufferedRandom)) else file
            if isinstance(raw, (io.FileIO, socket.SocketIO)):
                if raw is not file:
                    file.flush()  # type: ignore[attr-defined] # buffered, so it has flush()
                self._fd, self._raw = raw.fileno(), raw
        self._write = file.write if self._fd < 0 else partial(os.write, self._fd)  # type: ignore[union-attr]

    @property
    def packets(self) -> int:
        """The number of whole packets in the file."""
        return self._packets

    def __repr__(self) -> str:
        state = "closed" if self._closed else "failed" if self._failure else "open"
        return f"<PcapWriter of {self._packets} packets to {self._name}, {state}>"

    def write(self, packets: Packet | Batch) -> None:
        """Record a packet, or all packets of a batch.

        Raises RecordingFailed, an OSError, if the file cannot take them, such as on a full disk or a closed pipe. A regular file
        is then truncated to its last whole record. Raises ValueError for a packet that has no link type, or one that differs
        from the link type of a pcap file, and for a time that the format cannot have. Raises Closed after close(). An exception of
        a signal handler may lose packets of this call, but leaves no partial record. Raises RuntimeError if a signal handler, or
        the file's own `write`, calls it meanwhile.
        """
        self._alone(self._record, packets)

    def _alone(self, step: Callable[..., None], *arguments: Packet | Batch) -> None:
        """Call `step` while no other thread writes. Raises RuntimeError if this thread is already writing."""
        with self._using:
            if self._busy:
                raise RuntimeError(
                    "this PcapWriter is writing: a signal handler, or the file's write(), cannot use it"
                )
            try:
                self._busy = True
                step(*arguments)
            finally:
                self._busy = False

    def _record(self, packets: Packet | Batch) -> None:
        self._check()
        self._flush()  # the rest of a call that an exception of a signal handler ended
        count = len(packets) if isinstance(packets, Batch) else 1
        clock, following = time.time_ns(), 0
        while True:
            before = following
            following, self._end, missing = record(
                packets, before, self._keys, self._buffer, self._end, self._pcapng, clock
            )
            self._pending += following - before
            if missing:
                self._add_interface(missing, packets[following] if isinstance(packets, Batch) else packets)
            elif following == count:
                break
            elif self._end:
                self._flush()
            else:
                self._buffer = bytearray(2 * len(self._buffer))  # the packet is longer than the buffer
        self._flush()

    def _add_interface(self, key: int, packet: Packet) -> None:
        link_type, index = key >> 32, key & 0xFFFFFFFF
        if link_type == NO_TIME:
            self._flush()
            raise ValueError(
                f"the time of a packet, {packet.timestamp_ns} ns since 1970, does not fit into the file: pcapng takes times from 1970 "
                "on, pcap those until 2106"
            )
        if link_type == UNKNOWN:
            self._flush()
            raise ValueError(
                f"linkrx knows no link type (LINKTYPE_*) for frames of hardware type {index} (ARPHRD_*), so it cannot record "
                "them: see docs/capture-files.md"
            )
        if self._pcapng:
            self._put(blocks.interface(link_type, self._name_of(packet)), key)
        elif not self._keys:
            self._put(blocks.pcap_header(link_type), key)
            self._flush()
        elif self._keys[0] >> 32 == link_type:
            self._keys.append(key)
        else:
            self._flush()
            raise ValueError(
                f"a packet of link type {link_type} cannot go into a pcap file of link type {self._keys[0] >> 32}: use "
                "format='pcapng', which takes both"
            )

    def _name_of(self, packet: Packet) -> str | None:
        """The name of the packet's interface, if it is known."""
        index = packet.interface
        if self._source is not None:
            try:
                return self._source.interface_name(index)
            except Closed:  # packets are valid after that
                found = self._source.capabilities
                return found.interface if found.ifindex == index else None
        if is_from_file(packet):
            return None  # the number of an interface in that file
        try:
            return socket.if_indextoname(index) if index else None
        except OSError:
            return None  # deleted, or in another network namespace

    def _put(self, block: bytes, key: int | None = None) -> None:
        """Append a block to the buffer. With `key` it is the description of that interface, or the header of a pcap file."""
        keys = self._keys if key is None else array("Q", [*self._keys, key])
        if self._end + len(block) > len(self._buffer):
            self._flush()
        end = self._end + len(block)
        self._buffer[self._end : end] = block
        self._end, self._keys = end, keys  # no exception of a signal handler comes between

    def _flush(self) -> None:
        """Write the buffer. The C call that writes also appends to `_done`, so that no exception of a signal handler comes between."""
        if self._failure is not None:
            raise self._failure
        memory = memoryview(self._buffer)
        while self._end:
            written = 0
            for size in self._done:
                if not isinstance(size, int) or not 0 < size <= self._end - written:
                    raise self._failed(self._invalid(size), written)
                written += size
            if written == self._end:
                try:
                    self._empty_buffer()
                except OSError as error:
                    raise self._failed(error, 0) from error
                packets = self._packets + self._pending
                self._packets, self._pending, self._end, self._done = packets, 0, 0, []
                break
            if self._raw is not None and self._raw.closed:
                self._fd = -1  # it may be another file's by now
                raise self._failed(OSError(errno.EBADF, "the file was closed"), written)
            try:
                self._done.extend(map(self._write, (memory[written : self._end],)))
            except BlockingIOError as error:
                if self._fd < 0:
                    raise self._failed(error, written) from error
                self._wait()
            except OSError as error:
                raise self._failed(error, written) from error

    def _invalid(self, size: object) -> OSError:
        """The error for a result of `write` that is no number of bytes."""
        if size is None and isinstance(self._file, io.RawIOBase):
            return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # non-blocking, without room
        return OSError(errno.EIO, f"its write() returned {size!r}, not the number of bytes that it wrote")

    def _wait(self) -> None:
        """Wait until a non-blocking pipe has room."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll()

    def _failed(self, error: OSError, written: int) -> RecordingFailed:
        """Truncate a regular file to its last whole record. Returns the exception to raise."""
        packets, whole = blocks.whole_packets(self._buffer, written, pcapng=self._pcapng)
        torn = written - whole
        if torn and self._fd >= 0 and stat.S_ISREG(os.fstat(self._fd).st_mode):
            with suppress(OSError):  # the file cannot be truncated: the error has the number of torn bytes
                os.ftruncate(self._fd, os.lseek(self._fd, -torn, os.SEEK_CUR))
                torn = 0
        failure = RecordingFailed(self._name, error, self._packets + packets, torn)
        self._packets, self._pending, self._end, self._done = failure.packets, 0, 0, []
        self._failure = failure
        return failure

    def _check(self) -> None:
        if self._closed:
            raise Closed("this PcapWriter is closed: make a new one")

    def close(self) -> None:
        """Write the drop statistics, and close the file if it was given as a path. Idempotent. Raises RecordingFailed."""
        self._alone(self._finish)

    def _finish(self) -> None:
        if self._closed:
            return
        try:
            if self._failure is None:
                self._flush()
                self._put_end()
                self._flush()
        finally:
            self._release()

    def _put_end(self) -> None:
        """Append the interface statistics. In a pcap file without packets, append the file header."""
        if not self._pcapng:
            if not self._keys:
                self._put(blocks.pcap_header(ETHERNET))
            return
        drops = None
        with suppress(Closed):
            drops = self._source.stats().kernel_drops if self._source is not None else None
        if drops is not None and self._keys:
            several = f"of all {len(self._keys)} interfaces together" if len(self._keys) > 1 else None
            self._put(blocks.statistics(0, time.time_ns(), drops, several))

    def _release(self) -> None:
        self._closed = True
        if self._owned:
            self._owned = False
            os.close(self._fd)

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_owned", False):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._release()


def _unwrapped(file: str | os.PathLike[str] | WritableFile) -> str | os.PathLike[str] | WritableFile:
    """The file in the object that tempfile.NamedTemporaryFile returns; any other object itself."""
    inner: object = getattr(file, "file", file)
    return inner if isinstance(inner, (io.FileIO, io.BufferedWriter, io.BufferedRandom)) else file


def _is_writable(file: object) -> bool:
    """Whether a file object says that it can be written. One without such a method can."""
    return not isinstance(file, io.IOBase) or file.closed or file.writable()
