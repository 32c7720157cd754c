"""pcap and pcapng files of every shape are made together with their packets, and read whole, in pieces and row by row."""

from __future__ import annotations

import gzip
import io
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import captures
from support.captures import ETHERNET, Interface, Pieces, Recorded, Short, frame, read

import linkrx
from linkrx import _core

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)

SECOND = 10**9
orders = st.sampled_from("<>")
datas = st.builds(
    lambda size, mark: frame(size, mark),
    st.one_of(st.integers(14, 200), st.sampled_from([1514, 9000, 65_535, 262_144])),
    st.integers(0, 2**32 - 1),
)


@st.composite
def pcap_files(draw: st.DrawFn) -> tuple[bytes, list[Recorded]]:
    """A pcap file and its packets."""
    magic = draw(st.sampled_from([captures.MICROSECONDS, captures.NANOSECONDS, captures.KUZNETZOV]))
    modified = magic == captures.KUZNETZOV
    unit = 1 if magic == captures.NANOSECONDS else 1000
    packets = []
    for _ in range(draw(st.integers(0, 12))):
        data = draw(datas)
        packets.append(
            Recorded(
                data,
                len(data) + draw(st.sampled_from([0, 0, 1, 60_000])),
                draw(st.integers(0, 2**32 - 1)) * SECOND + draw(st.integers(0, SECOND // unit - 1)) * unit,
                draw(st.integers(0, 2**32 - 1)) if modified else 0,
                draw(st.booleans()) if modified else False,
            )
        )
    return Short(captures.pcap(packets, magic=magic, order=draw(orders))), packets


@st.composite
def pcapng_files(draw: st.DrawFn) -> tuple[bytes, list[Recorded]]:
    """A pcapng file of several sections, each with its byte order and interfaces, and its packets."""
    made, packets, before = b"", [], 0
    for _ in range(draw(st.integers(1, 3))):
        order = draw(orders)
        made += captures.section(
            order, captures.option(order, 3, b"an operating system") if draw(st.booleans()) else b""
        )
        interfaces: list[Interface] = []
        for _ in range(draw(st.integers(0, 12))):
            kind = draw(st.sampled_from("iiueeeeeop"))
            if kind == "i" or not interfaces:
                interfaces.append(
                    Interface(
                        snaplen=draw(st.sampled_from([0, 0, 65_535, 64])) if not interfaces else 0,
                        name=draw(st.one_of(st.none(), st.text("abc0", min_size=1, max_size=15))),
                        resolution=draw(st.one_of(st.none(), st.integers(0, 255))),
                        offset=draw(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.just(7))),
                    )
                )
                made += interfaces[-1].block(order)
                continue
            if kind == "u":
                body = draw(st.sampled_from([b"", b"1234", bytes(5000), bytes(400_000)]))
                made += captures.block(order, draw(st.sampled_from([4, 5, 10, 0x0BAD, 0x80000001])), body)
                continue
            number = draw(st.integers(0, len(interfaces) - 1))
            data = draw(datas)
            wire_length = len(data) + draw(st.sampled_from([0, 0, 2]))
            units = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**51)))
            if kind == "p":
                snaplen = interfaces[0].snaplen
                data = data[:snaplen] if snaplen else data
                wire_length = len(data) if not snaplen or len(data) < snaplen else wire_length
                made += captures.simple(order, data, wire_length)
                packets.append(Recorded(data, wire_length, None, before + 1))
                continue
            direction = draw(st.sampled_from([None, 0, 1, 2, 3, 6]))
            options = b""
            if direction is not None:
                options += captures.option(order, 1, b"x" * draw(st.sampled_from([1, 8, 60_000])))
                options += captures.option(order, 2, struct.pack(order + "I", direction))
            if draw(st.booleans()):
                options += captures.option(order, 0, b"")
            make = captures.enhanced if kind == "e" else captures.obsolete
            made += make(order, number, units, data, wire_length, options)
            whole = 32 + len(captures.padded(data)) + len(options) <= 327_680  # LRX_CAPTURE_WHOLE
            packets.append(
                Recorded(
                    data,
                    wire_length,
                    interfaces[number].nanoseconds(units),
                    before + number + 1,
                    direction is not None and direction & 3 == 2 and whole,
                )
            )
        before += len(interfaces)
    return Short(made), packets


@pytest.mark.parametrize("files", [pcap_files(), pcapng_files()], ids=["pcap", "pcapng"])
@given(data=st.data(), batch_size=st.sampled_from([None, 1, 3]), seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_files(
    files: st.SearchStrategy[tuple[bytes, list[Recorded]]],
    data: st.DataObject,
    batch_size: int | None,
    seed: int,
) -> None:
    """A file with any byte order, unit of time, headers, blocks and options is read as it was written, in any pieces."""
    written, packets = data.draw(files)
    assert read(io.BytesIO(written)) == packets
    assert read(Pieces(written, random.Random(seed)), batch_size=batch_size) == packets


@pytest.mark.parametrize("version", [(2, 0), (2, 2), (2, 3), (543, 0)])
def test_old_pcap(version: tuple[int, int]) -> None:
    """In files of libpcap before 2.4 the two lengths are swapped. In version 2.3 both orders are read."""
    packets = [Recorded(frame(60 + n, n), 60 + n + 40 * (n % 2), n * 1000) for n in range(9)]
    assert read(io.BytesIO(captures.pcap(packets, version=version, swap_lengths=True))) == packets


def test_rows_and_pieces_that_do_not_fit() -> None:
    """Empty records that fill all rows before the piece ends, and a packet as long as a piece, are received in order."""
    small = [Recorded(frame(14, n), 14, n * 1000) for n in range(20_000)]
    large = [Recorded(frame(262_144, n), 262_144, n * 1000) for n in range(3)]
    packets = small + large + small[:100] + large
    assert read(io.BytesIO(captures.pcap(packets))) == packets


def test_gzip(tmp_path: Path) -> None:
    """A gzip file of several members, with zeroes behind each, is read as its contents."""
    packets = [Recorded(frame(60 + n, n), 60 + n, n * 1000) for n in range(5000)]
    data = captures.pcap(packets)
    path = tmp_path / "some.pcap.gz"
    parts = [data[:1], data[1:70_000], b"", data[70_000:]]
    path.write_bytes(b"".join(gzip.compress(part) + bytes(512) for part in parts))
    assert read(path) == packets
    with gzip.open(path) as file:
        assert read(file) == packets


def test_interfaces_without_end_are_refused() -> None:
    """A file with more interfaces than linkrx supports raises an error, so its memory is bounded."""
    blocks = Interface(ETHERNET).block() * 270_000
    with pytest.raises(linkrx.DamagedCapture, match="more than 262144 interfaces"):
        read(io.BytesIO(captures.section() + blocks))
