"""Sending in plain Python, simple rather than fast. In C: `_core/types/send.c`.

One guarantee is weaker than in C: after an exception of a signal handler, `stats().sent` may lack one frame that was sent.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

from linkrx.kernel import libc
from linkrx.kernel.errnos import NOWAIT_UNKNOWN
from linkrx.kernel.uapi import ETH_HEADER_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, GSO_ECN
from linkrx.memory.framing import Framing
from linkrx.packets.headers import CHECKSUM_UNFINISHED, NEEDS_CSUM
from linkrx.packets.plain import Packet
from linkrx.receiving.sending import FULL, MESSAGES, NO_PROTOCOL, NOTHING, POLLED, SUPER_PACKET, UNFINISHED
from linkrx.receiving.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Buffer

_RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
_IP_VERSIONS = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}


class _UnsendableError(Exception):
    """The frame cannot be sent. `code` is one of the numbers in `sending`."""

    def __init__(self, code: int) -> None:
        self.code = code


class Sending:
    """The half of a receiver that sends."""

    _sends = NOTHING
    _sent = 0
    _was_down = False

    # Attributes of the other half and of the subclass.
    _closed: bool
    _stripped: Framing
    _wakeup: Wakeup
    _set_readable: Callable[[], None]
    _refuse_send: Callable[[int, int], NoReturn]

    def _prepare_sending(self, how: int, /) -> None:
        self._sends = how

    def send(self, frame: Buffer, /) -> None:
        """Send one frame out of the source, from any thread. Never waits: see `linkrx.Dispatcher.send` of the C core."""
        code = self._send(frame)
        if code is not None:
            self._refuse_send(code, memoryview(frame).nbytes)

    def send_batch(self, frames: Iterable[Buffer], /) -> int:
        """Send many frames in order. Returns how many were sent. Raises if the first is refused."""
        if self._closed or self._sends == NOTHING:
            self._refuse_send(0, 0)
        taken = 0
        for frame in tuple(frames):
            try:
                code = self._send(frame)
            except (BufferError, TypeError, ValueError):  # of a frame; others are of signal handlers
                if not taken:
                    raise
                break  # the next call raises it
            if code is not None:
                if not taken and code not in FULL:
                    self._refuse_send(code, memoryview(frame).nbytes)
                break
            taken += 1
        return taken

    def _send(self, frame: Buffer) -> int | None:
        """Send one frame. Returns None, or the reason why it was not sent: an errno, or one of the numbers in `sending`."""
        with memoryview(frame) as view:  # raises TypeError for an object that is no buffer
            if not view.c_contiguous:
                raise BufferError("the buffer of a frame must be contiguous, and this one is not")
            plain = view.tobytes()
        if self._closed or self._sends == NOTHING:
            return 0
        packet = frame if isinstance(frame, Packet) else None
        try:
            wire = _headers(plain, packet, self._stripped) + (packet.tagged() if packet else plain)
            self._put(wire)
        except _UnsendableError as error:
            return error.code
        except OSError as error:
            return error.errno
        self._sent += 1
        return None

    def _put(self, wire: bytes) -> None:
        fd = self._wakeup.source
        if self._sends == MESSAGES:
            try:
                libc.send(fd, wire, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError as error:
                if error.errno != errno.ENETDOWN:
                    raise
                # A packet socket keeps ENETDOWN for its next call, which may be a send after the link is up again. Send again, and
                # leave the news to the receiver.
                again = errno.ENETDOWN
                try:
                    libc.send(fd, wire, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    again = 0
                except OSError as other:
                    again = other.errno or 0
                    raise
                finally:
                    if again != errno.ENETDOWN:
                        self._was_down = True
                        self._set_readable()
        elif not self._write(fd, wire):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # write(2) of 0 bytes sends nothing

    def _write(self, fd: int, wire: bytes) -> int:
        if self._sends != POLLED and _RWF_NOWAIT is not None:
            try:
                return os.pwritev(fd, [wire], -1, _RWF_NOWAIT)
            except OSError as error:
                if error.errno not in NOWAIT_UNKNOWN:
                    raise
        self._sends = POLLED
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(fd, wire)


def _headers(frame: bytes, packet: Packet | None, framing: Framing) -> bytes:
    """The packet information and virtio-net header to send in front of a frame. Raises _UnsendableError."""
    info = b""
    if framing.packet_info:
        protocol = packet.protocol if packet else 0
        if not protocol and framing.ethernet:
            protocol = int.from_bytes(frame[12:ETH_HEADER_BYTES], "big")
        elif not protocol:
            protocol = _IP_VERSIONS.get(frame[0] >> 4 if frame else 0, 0)
            if not protocol:
                raise _UnsendableError(NO_PROTOCOL)
        info = struct.pack("!HH", 0, protocol)
    size = framing.vnet_header_size
    header = packet._vnet if packet else b""
    unfinished = bool(packet and packet._flags & CHECKSUM_UNFINISHED)
    if not size:
        if header and header[1] & ~GSO_ECN:
            raise _UnsendableError(SUPER_PACKET)
        if unfinished or (header and header[0] & NEEDS_CSUM):
            raise _UnsendableError(UNFINISHED)
        return info
    if not packet or not header:
        if unfinished:
            raise _UnsendableError(UNFINISHED)
        return info + bytes(size)
    flags, kind, headers, segment, start, offset = struct.unpack(
        ">BBHHHH" if packet._big_endian else "<BBHHHH", header
    )
    tag = len(packet.tagged()) - len(packet)  # the tag is inserted, so offsets after it grow
    vnet = (flags, kind, headers + tag if headers else 0, segment, start + tag if start else 0, offset)
    return info + struct.pack(framing.vnet_format, *vnet).ljust(size, b"\0")
