"""snaplen= cuts frames. A cut frame is flagged, with its true length if the kernel reports it."""

from __future__ import annotations

from typing import Any

import pytest
from support.run import that_take

import linkrx
from linkrx.testing import rigs

SOURCES = [
    pytest.param(backend, make, id=f"{backend}-{make.__name__}")
    for make, kind in (
        (rigs.unix_dgram, "unix_dgram"),
        (rigs.udp, "udp"),
        (rigs.interface, "packet"),
        (rigs.packet, "packet"),
        (rigs.packet_cooked, "packet_cooked"),
        (rigs.tap, "tap"),
        (rigs.tun, "tun"),
    )
    for backend in that_take(kind)
]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("backend", "make"), SOURCES)
@pytest.mark.parametrize("snaplen", [14, 64, 1000])
def test_what_is_kept(backend: str, make: rigs.MakeRig, snaplen: int) -> None:
    """Longer frames are cut to snaplen bytes, flagged and counted, and others are whole."""
    with make() as rig, rig.open(backend, snaplen=snaplen) as rx:
        sizes = [max(size, rig.shortest) for size in (14, 63, 64, 65, 999, 1000, 1001, 1400)]
        for size in sizes:
            rig.send(rig.frame(size))
        got = [rx.recv(10) for _ in sizes]
        assert [len(packet) for packet in got] == [min(size, snaplen) for size in sizes]
        assert [bytes(packet) for packet in got] == [rig.frame(size)[:snaplen] for size in sizes]
        assert [packet.truncated for packet in got] == [size > snaplen for size in sizes]
        known = rx.capabilities.socket
        assert [packet.wire_length for packet in got] == [
            size if known else min(size, snaplen) for size in sizes
        ]
        assert rx.stats().truncated == sum(size > snaplen for size in sizes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"snaplen": 13}, "give 14 bytes"),
        ({"snaplen": 0}, "give 14 bytes"),
        ({"snaplen": 2**40}, "give 14 bytes"),
        ({"snaplen": 64, "buffer_sizes": [64]}, "exclude each other"),
        ({"snaplen": 64, "segment": True}, "exclude each other"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    """A snaplen below a link header or above any frame, and snaplen with buffer_sizes, raise ValueError."""
    with pytest.raises(ValueError, match=said):
        linkrx.choose("lo", **options)
    with pytest.raises(TypeError, match="snaplen='64': give int"):
        linkrx.choose("lo", snaplen="64")  # type: ignore[arg-type]
