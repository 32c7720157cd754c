"""Records packets to a capture file, and shows progress in a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Self

import linkrx
from linkrx.cli.printing import check_reader, reader_patience
from linkrx.packets import Batch, Packet

_TICK = 0.25  # seconds between two updates of the progress line


class NotRecorded(Exception):
    """The file cannot have a packet."""


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
        self._reader = reader_patience() if path == "-" else None
        self._bytes = 0
        self._next = 0.0
        self.patience: float | None = _TICK if show else self._reader

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
        """Record packets. Raises NotRecorded for a packet that the file cannot have."""
        try:
            if isinstance(packets, Batch):
                self._writer.write(packets)
                self._bytes += sum(packets.lengths)
            else:
                for packet in packets:
                    self._writer.write(packet)
                    self._bytes += len(packet)
        except ValueError as error:
            if isinstance(error, linkrx.LinkrxError):
                raise
            raise NotRecorded(f"{error}; {self._writer.packets} packets are whole in the file") from error
        if self._show and time.monotonic() >= self._next:
            self.tick()

    def tick(self) -> None:
        """Print progress. Raises BrokenPipeError if the reader of the pipe is gone."""
        if self._reader is not None:
            check_reader()
        if self._show:
            self._print_progress()
            self._next = time.monotonic() + _TICK

    def _print_progress(self) -> None:
        dropped = self._rx.stats().kernel_drops or 0
        text = f"{self._writer.packets} packets, {self._bytes} bytes, {dropped} dropped"
        # A line that fills the last column goes on in the next one. A terminal that does not know its width has 0 columns.
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        print("\r" + f"{text:<60}"[: columns - 1], end="", file=sys.stderr, flush=True)
