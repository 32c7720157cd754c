"""A DHCP watcher with the interface of aiodhcpwatcher. It needs only linkrx, and no scapy.

`python dhcp_watcher.py` prints each request for an address, on every interface. It needs CAP_NET_RAW.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import linkrx

FILTER = "udp and (port 67 or 68)"  # runs in the kernel, so other packets cost nothing

# RFC 2131 and RFC 2132.
MAGIC = b"\x63\x82\x53\x63"
OPTIONS = 240  # the offset of the options; the magic number is the four bytes before them
PAD, HOST_NAME, REQUESTED_ADDRESS, MESSAGE_TYPE, END = 0, 12, 50, 53, 255
REQUEST = b"\x03"


@dataclass(slots=True)
class DHCPRequest:
    """A client's request for an address."""

    ip_address: str
    hostname: str
    mac_address: str


def parse(packet: linkrx.Packet) -> DHCPRequest | None:
    """The DHCP request in a frame. None if the frame is cut, malformed, or has no such request."""
    ip = packet.data
    if packet.protocol != 0x0800 or len(ip) < 20 or packet.remote is None:
        return None
    dhcp = bytes(ip[(ip[0] & 15) * 4 + 8 :])
    if dhcp[OPTIONS - 4 : OPTIONS] != MAGIC:
        return None
    options: dict[int, bytes] = {}
    at = OPTIONS
    while at + 1 < len(dhcp) and dhcp[at] != END:
        if dhcp[at] == PAD:
            at += 1
            continue
        options[dhcp[at]] = dhcp[at + 2 : at + 2 + dhcp[at + 1]]
        at += 2 + dhcp[at + 1]
    if options.get(MESSAGE_TYPE) != REQUEST:
        return None
    wanted = options.get(REQUESTED_ADDRESS, b"")
    address = socket.inet_ntoa(wanted if len(wanted) == 4 else bytes(ip[12:16]))  # a renewal has no option 50
    name = options.get(HOST_NAME, b"")
    try:
        hostname = name.decode("idna")
    except UnicodeError:
        hostname = name.decode("utf-8", errors="replace")
    return DHCPRequest(address, hostname, packet.remote.hex(":"))


async def _watch(rx: linkrx.Dispatcher, callback: Callable[[DHCPRequest], None]) -> None:
    async for packet in rx:  # until the interface is deleted; a link that goes down does not end it
        request = parse(packet)
        if request is not None:
            callback(request)


async def async_start(
    callback: Callable[[DHCPRequest], None], if_indexes: Iterable[int] | None = None
) -> Callable[[], None]:
    """Call `callback` for each request on these interfaces, or on all. Returns a function that stops the watcher.

    Raises linkrx.MissingPrivilege without CAP_NET_RAW, and OSError if an interface does not exist.
    """
    names = ["any"] if if_indexes is None else [socket.if_indextoname(index) for index in set(if_indexes)]
    with ExitStack() as stack:
        # A ring of 64 MiB would be too large for a few requests.
        opened = [
            stack.enter_context(linkrx.open(name, backend="recvmmsg", filter=FILTER, outgoing=True))
            for name in names
        ]
        closing = stack.pop_all()
    tasks = [asyncio.create_task(_watch(rx, callback)) for rx in opened]

    def stop() -> None:
        for task in tasks:
            task.cancel()
        closing.close()

    return stop


async def main() -> None:
    """Print requests until Ctrl-C."""
    stop = await async_start(lambda request: print(request, flush=True))
    try:
        await asyncio.Event().wait()
    finally:
        stop()


if __name__ == "__main__":
    asyncio.run(main())
