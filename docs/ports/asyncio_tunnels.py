"""The asyncio TUN and TAP loops of asyncssh and pymobiledevice3, on linkrx.

asyncssh, before its first tunnel:

    asyncssh.tuntap.SSHLinuxTunTapTransport = TunTapTransport

pymobiledevice3, before its first tunnel on a kernel TUN device:

    RemotePairingTunnel._tun_read_loop_via_reader = read_loop
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, cast

import linkrx

POINT_TO_POINT = 1  # asyncssh.tuntap.SSH_TUN_MODE_POINTTOPOINT: a TUN; the other mode is a TAP


class TunTapTransport(asyncio.Transport):
    """A new TUN or TAP device. Each packet from it is one `data_received`, and each `write` is one packet to it.

    `connection_lost` is called once, when the device is deleted. Writes are lost while the device is down.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, mode: int, unit: int | None) -> None:
        kind = "tun" if mode == POINT_TO_POINT else "tap"
        self._queue = linkrx.TunTap("" if unit is None else f"{kind}{unit}", kind)
        super().__init__({"interface": self._queue.name})
        self._loop = loop
        self._reading = False
        self._protocol: asyncio.Protocol | None = None
        self._rx = linkrx.open(self._queue, self._deliver)
        self._fd = self._rx.fileno()

    def _deliver(
        self, remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet
    ) -> None:
        if self._protocol is not None:
            self._protocol.data_received(packet.tobytes())

    def _read_ready(self) -> None:
        # One batch, so that other tasks run.
        if not self._rx.drain() and self._rx.end is not None:
            self.pause_reading()
            if self._protocol is not None:
                self._protocol.connection_lost(None)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that receives the packets."""
        assert self._protocol is not None
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set the protocol that receives the packets."""
        self._protocol = cast("asyncio.Protocol", protocol)

    def is_reading(self) -> bool:
        """Whether the transport delivers packets now."""
        return self._reading

    def resume_reading(self) -> None:
        """Start to deliver packets."""
        self._reading = True
        self._loop.add_reader(self._fd, self._read_ready)

    def pause_reading(self) -> None:
        """Stop delivering: packets stay in the device's queue."""
        self._reading = False
        self._loop.remove_reader(self._fd)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send one packet."""
        with suppress(OSError):  # the device is down, or its queue is full: the packet is lost
            self._rx.send(data)

    def get_write_buffer_size(self) -> int:
        """Return 0: the transport buffers nothing."""
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: the transport buffers nothing."""

    def can_write_eof(self) -> bool:
        """Return False: packets have no end of stream."""
        return False

    def write_eof(self) -> None:
        """Do nothing."""

    def is_closing(self) -> bool:
        """Whether the transport was closed."""
        return self._queue.fileno() < 0

    def abort(self) -> None:
        """Close the transport."""
        self.close()

    def close(self) -> None:
        """Delete the device, unless another process has opened it."""
        if not self.is_closing():
            self.pause_reading()
            self._rx.close()
            self._queue.close()


class Tunnel(Protocol):
    """The attributes of pymobiledevice3's RemotePairingTunnel that `read_loop` uses."""

    tun: Any
    send_packet_to_device: Callable[[bytes], Awaitable[None]]


LOOPBACK_HEADER = (
    b"\x00\x00\x86\xdd"  # pymobiledevice3's: in front of packets if the device has packet information
)


async def read_loop(tunnel: Tunnel, read_size: int) -> None:
    """Send each packet of the tunnel's TUN device to the telephone, until the device is deleted or the task is cancelled."""
    with linkrx.open(tunnel.tun) as rx:  # borrowed: tun.write and tun.close work as before
        async for packet in rx:
            await tunnel.send_packet_to_device(packet.tobytes().removeprefix(LOOPBACK_HEADER))
