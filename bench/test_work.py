"""Compares a `deliver` that processes each packet with peers that do the same work on the same frames.

Each reader calls a function for each packet. The function adds up the values that it reads, and every drain checks the sum.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from floors import Frames
from peers import Field
from queues import SOURCES
from race import race
from works import WORKS, hand_work, linkrx_work, pcap_work, socket_of

CELLS = {"ring": "packet_mmap", "tap": "readv", "packet": "recvmmsg"}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("size", [64, 1514])
@pytest.mark.parametrize("source", CELLS)
def test_work(benchmark: Any, source: str, size: int, work: str) -> None:
    """One kind of work is measured on a ring, a TAP queue and a packet socket."""
    does, backend, field = WORKS[work], CELLS[source], Field()
    with ExitStack() as stack:

        def own() -> Any:
            return stack.enter_context(SOURCES[source][0](Frames(size)))

        queue, opened, field.readers["C floor"] = own()
        if source == "ring":
            # All rings are on one interface, so that one fill reaches all.
            for name, module in (("pcapy-ng dispatch", "pcapy"), ("cypcap dispatch", "cypcap")):
                field.add(name, partial(pcap_work, queue, opened, does, module))
        else:
            queue, opened, _ = own()
            if source == "tap":
                field.readers["os.read"] = hand_work(queue, partial(os.read, opened.fileno()), does)
            else:
                field.readers["socket.recv"] = hand_work(queue, socket_of(opened).recv, does)
            queue, opened, _ = own()
        field.add("linkrx", partial(linkrx_work, queue, opened, does, backend=backend))
        race(
            benchmark,
            field.readers,
            "linkrx" if "linkrx" in field.readers else "C floor",
            source=source,
            backend=backend,
            size=size,
            work=work,
            statements={"linkrx": does.ours, "others": does.theirs},
            packets=queue.packets,
            left_out=field.left_out,
        )
