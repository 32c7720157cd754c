"""Records packets from batches of a ring: `recorder.py INTERFACE FILE PACKETS`."""

from __future__ import annotations

import os
import sys

import linkrx

LATENCY = 0.1  # seconds that the ring may hold back a packet; tcpdump's ring: one second


def main() -> None:
    """Run the command."""
    name, path, packets = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with (
        linkrx.open(name, backend="packet_mmap", timestamps=True, latency=LATENCY) as rx,
        linkrx.PcapWriter(path, source=rx) as out,
    ):
        print("ready", flush=True)
        for batch in rx.batches():
            out.write(batch)
            if out.packets >= packets:
                break
        assert rx.stats().kernel_drops == 0
    os._exit(0)  # the end of the interpreter is not measured


if __name__ == "__main__":
    main()
