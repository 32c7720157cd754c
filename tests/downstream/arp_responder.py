"""A small host in Python, which answers ARP requests for its address on a TAP device.

python arp_responder.py tap0 10.0.0.2
"""

from __future__ import annotations

import socket
import struct
import sys

import linkrx

MAC = bytes.fromhex("02005e000002")
ARP = struct.Struct("!HHBBH6s4s6s4s")  # RFC 826
FIXED = (1, 0x0800, 6, 4)


class Responder:
    """Answers ARP requests for one IPv4 address on one TAP queue, until it is stopped."""

    def __init__(self, queue: linkrx.TunTap, address: str) -> None:
        self._address = socket.inet_aton(address)
        self._rx = linkrx.open(queue, self._deliver)

    def run(self) -> None:
        """Answer until `stop`, which any thread may call."""
        with self._rx:
            self._rx.run()

    def stop(self) -> None:
        """End `run`."""
        self._rx.stop()

    def _deliver(
        self, remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet
    ) -> None:
        if protocol != 0x0806 or len(packet) < 14 + ARP.size:
            return
        *fixed, operation, mac, asks, _, wanted = ARP.unpack_from(packet, 14)
        if tuple(fixed) == FIXED and operation == 1 and wanted == self._address:
            reply = ARP.pack(*FIXED, 2, MAC, self._address, mac, asks)
            self._rx.send(mac + MAC + b"\x08\x06" + reply)


if __name__ == "__main__":
    with linkrx.TunTap(sys.argv[1]) as tap:
        Responder(tap, sys.argv[2]).run()
