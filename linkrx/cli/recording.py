"""Records packets to a capture file, and shows progress in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Self

import linkrx
from linkrx.packets import Batch, Packet

_TICK = 0.25  # seconds between two updates of the progress line


class Recorder:
    """Writes batches to a file. `show`: print progress on standard error, which is a terminal."""

    def __init__(self, rx: linkrx.Dispatcher, path: str, *, show: bool) -> None:
        self._rx = rx
        self._writer = linkrx.PcapWriter(
            sys.stdout.buffer if path == "-" else path,
            format="pcap" if path.endswith((".pcap", ".cap")) else "pcapng",
            source=rx,
        )
        self._show = show
        self._bytes = 0
        self._next = 0.0
        self.patience: float | None = _TICK if show else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        finally:
            if self._show:
                self._print_progress()
                print(file=sys.stderr, flush=True)

    def take(self, packets: Iterable[Packet]) -> None:
        """Record packets."""
        if isinstance(packets, Batch):
            self._writer.write(packets)
            self._bytes += sum(packets.lengths)
        else:
            for packet in packets:
                self._writer.write(packet)
                self._bytes += len(packet)
        if self._show and time.monotonic() >= self._next:
            self.tick()

    def tick(self) -> None:
        """Print progress."""
        if self._show:
            self._print_progress()
            self._next = time.monotonic() + _TICK

    def _print_progress(self) -> None:
        dropped = self._rx.stats().kernel_drops or 0
        text = f"{self._writer.packets} packets, {self._bytes} bytes, {dropped} dropped"
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)
