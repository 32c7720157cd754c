"""PyTCP's receive and transmit rings on linkrx. Call `use_linkrx()` before the stack starts.

PyTCP's own rings have a thread each. These have none: PyTCP's packet handler waits in linkrx, and the thread that has a packet to
send writes it.
"""

from __future__ import annotations

import threading
from typing import Any

from pytcp import config
from pytcp.lib import stack
from pytcp.lib.logger import log
from pytcp.lib.packet import PacketRx

import linkrx

PATIENCE = 0.1  # seconds between two checks of the packet handler whether it must stop


class RxRing:
    """Replaces pytcp.subsystems.rx_ring.RxRing."""

    def __init__(self) -> None:
        self.rx: linkrx.Dispatcher | None = None
        self._stopped = threading.Event()

    def start(self, tap: int) -> None:
        """Start to receive from the descriptor of a TAP."""
        self._stopped.clear()
        self.rx = linkrx.open(tap)

    def stop(self) -> None:
        """Stop receiving."""
        self._stopped.set()
        if self.rx is not None:
            self.rx.close()

    def dequeue(self) -> Any:
        """The next packet, or None after PATIENCE."""
        assert self.rx is not None
        try:
            return PacketRx(self.rx.recv(PATIENCE).tobytes())
        except TimeoutError:
            return None
        except (EOFError, linkrx.Closed):  # the device was deleted, or the stack stops
            self._stopped.wait(PATIENCE)
            return None


class TxRing:
    """Replaces pytcp.subsystems.tx_ring.TxRing."""

    def __init__(self, ring: RxRing) -> None:
        self._ring = ring

    def start(self, tap: int) -> None:
        """Do nothing: the receive ring has opened the TAP."""

    def stop(self) -> None:
        """Do nothing."""

    def enqueue(self, packet_tx: Any) -> None:
        """Send a packet. A packet that the kernel does not accept is lost and logged."""
        size = len(packet_tx)
        if size > config.TAP_MTU + 14:
            log(
                "tx-ring",
                f"{packet_tx.tracker}: {size} bytes are more than the MTU allows, {config.TAP_MTU + 14}",
            )
            return
        frame = bytearray(size)
        packet_tx.assemble(memoryview(frame))
        try:
            assert self._ring.rx is not None
            self._ring.rx.send(frame)
        except (OSError, linkrx.Closed) as error:
            log("tx-ring", f"{packet_tx.tracker}: not sent: {error}")


def use_linkrx() -> RxRing:
    """Give PyTCP these rings. Returns the receive ring, which holds the dispatcher: see its `rx.stats()`."""
    ring = stack.rx_ring = RxRing()
    stack.tx_ring = TxRing(ring)
    return ring
