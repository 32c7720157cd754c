"""IovecBuffer, the buffers of one scatter read: sizes, pulls, and which buffers are replaced."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.run import that_take

import linkrx
from linkrx import BUFFER_SIZES, IovecBuffer
from linkrx.memory.layouts import SIZES_MAX, Layout, checked_sizes

VNET_HEADER_BYTES = 10


class Pair(NamedTuple):
    """Two connected datagram sockets. The receiving one is non-blocking."""

    receiver: socket.socket
    sender: socket.socket


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A new pair."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setblocking(False)
        yield Pair(receiver, sender)


def lengths(views: Sequence[memoryview]) -> list[int]:
    """The length of each view."""
    return [len(view) for view in views]


def address(view: memoryview) -> int:
    """The address of a view's first byte."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def test_ladder_holds_any_ip_packet() -> None:
    """The sum of the ladder is at least 65,535 bytes, the longest IP packet."""
    assert sum(BUFFER_SIZES) >= 65_535


def test_ladder_keeps_headers_together() -> None:
    """The first buffer holds an IPv4 and a TCP header, each 60 bytes at most, in one piece."""
    assert BUFFER_SIZES[0] >= 60 + 60


def test_ladder_is_the_default() -> None:
    """Without arguments the buffers have the ladder's sizes and no virtio-net header in front."""
    assert lengths(IovecBuffer().next_iovecs()) == list(BUFFER_SIZES)


@pytest.mark.parametrize("sizes", [(2,), (1, 2), (1, 2, 3), BUFFER_SIZES, (1,) * SIZES_MAX])
def test_one_writable_buffer_for_each_size(sizes: tuple[int, ...]) -> None:
    """There are as many buffers as sizes, each of its size and writable."""
    iovecs = IovecBuffer(sizes).next_iovecs()
    assert len(iovecs) == len(sizes)
    assert lengths(iovecs) == list(sizes)
    assert not any(view.readonly for view in iovecs)


@pytest.mark.parametrize(
    ("sizes", "n", "pulled"),
    [
        ((2,), 1, [1]),
        ((2,), 2, [2]),
        ((1, 2), 2, [1, 1]),
        ((1, 2), 3, [1, 2]),
        ((1, 2, 3), 3, [1, 2]),
        ((1, 2, 3), 4, [1, 2, 1]),
        ((1, 2, 3), 1, [1]),
        ((1, 2, 3), 0, []),
    ],
)
def test_pull_gives_the_used_views_cut_to_size(sizes: tuple[int, ...], n: int, pulled: list[int]) -> None:
    """pull(n) returns the first views that hold n bytes, with the last one cut."""
    buffer = IovecBuffer(sizes)
    buffer.next_iovecs()
    assert lengths(buffer.pull(n)) == pulled


@pytest.mark.parametrize(
    ("sizes", "n", "used"),
    [((2,), 1, 1), ((1, 2), 2, 2), ((1, 2), 3, 2), ((1, 2, 3), 3, 2), ((1, 2, 3), 0, 0), ((5, 5, 5), 5, 1)],
)
def test_used_views_are_replaced_and_unused_ones_stay(sizes: tuple[int, ...], n: int, used: int) -> None:
    """After a pull, used buffers are replaced, and unused ones keep their address."""
    buffer = IovecBuffer(sizes)
    before = buffer.next_iovecs()
    held = buffer.pull(n)
    after = buffer.next_iovecs()
    assert lengths(after) == list(sizes)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (address(old) != address(new)) == (index < used)
    assert [address(view) for view in held] == [address(view) for view in before[:used]]


def test_buffers_that_nobody_pulled_stay() -> None:
    """next_iovecs() without a pull returns the same memory."""
    buffer = IovecBuffer((3, 4), VNET_HEADER_BYTES)
    first, second = buffer.next_iovecs(), buffer.next_iovecs()
    assert [address(view) for view in first] == [address(view) for view in second]


@pytest.mark.parametrize(
    ("n", "pulled"),
    [
        (0, []),
        (VNET_HEADER_BYTES - 1, []),
        (VNET_HEADER_BYTES, []),
        (VNET_HEADER_BYTES + 1, [1]),
        (VNET_HEADER_BYTES + 100, [10, 20, 50, 20]),
    ],
)
def test_virtio_net_header_is_not_handed_over(n: int, pulled: list[int]) -> None:
    """pull(n) leaves out the virtio-net header, and returns no view if n is not larger than the header."""
    buffer = IovecBuffer((10, 20, 50, 50), VNET_HEADER_BYTES)
    assert lengths(buffer.next_iovecs()) == [VNET_HEADER_BYTES, 10, 20, 50, 50]
    views = buffer.pull(n)
    assert lengths(views) == pulled
    assert sum(lengths(views)) == max(0, n - VNET_HEADER_BYTES)


def test_header_only_uses_no_view() -> None:
    """A pull of only the header replaces no buffer."""
    buffer = IovecBuffer((10, 20), VNET_HEADER_BYTES)
    before = [address(view) for view in buffer.next_iovecs()]
    buffer.pull(VNET_HEADER_BYTES)
    assert [address(view) for view in buffer.next_iovecs()] == before


def test_scatter_read(pair: Pair) -> None:
    """pull() returns a datagram of os.readv whole, and the next read does not change it."""
    buffer = IovecBuffer((4, 8, 16))
    pair.sender.send(b"the first datagram")
    first = buffer.pull(os.readv(pair.receiver.fileno(), buffer.next_iovecs()))
    pair.sender.send(b"and the second")
    second = buffer.pull(os.readv(pair.receiver.fileno(), buffer.next_iovecs()))
    assert b"".join(first) == b"the first datagram"
    assert b"".join(second) == b"and the second"


def test_scatter_read_with_virtio_net_header(pair: Pair) -> None:
    """The header of the last read is a read-only view, and is not part of the pulled views."""
    buffer = IovecBuffer((4, 8), VNET_HEADER_BYTES)
    header = bytes(range(1, 11))
    pair.sender.send(header + b"payload")
    views = buffer.pull(os.readv(pair.receiver.fileno(), buffer.next_iovecs()))
    assert bytes(buffer.vnet_header) == header
    assert buffer.vnet_header.readonly
    assert b"".join(views) == b"payload"


def test_no_virtio_net_header_is_empty() -> None:
    """Without a virtio-net header, its view is empty."""
    assert bytes(IovecBuffer((4,)).vnet_header) == b""


def test_largest_datagram_fits_the_ladder(pair: Pair) -> None:
    """A datagram of 65,535 bytes fits into the default buffers."""
    sent = os.urandom(65_535)
    buffer = IovecBuffer()
    pair.sender.send(sent)
    views = buffer.pull(os.readv(pair.receiver.fileno(), buffer.next_iovecs()))
    assert b"".join(views) == sent
    assert lengths(views)[:-1] == list(BUFFER_SIZES[:-1])


def test_pull_of_more_than_there_is_room_for() -> None:
    """A pull of more than the buffers hold raises an error with their room, and uses no buffer."""
    buffer = IovecBuffer((10, 20), VNET_HEADER_BYTES)
    before = [address(view) for view in buffer.next_iovecs()]
    with pytest.raises(ValueError, match=r"pull\(41\).*40 bytes"):
        buffer.pull(41)
    assert [address(view) for view in buffer.next_iovecs()] == before


@pytest.mark.parametrize("vnet_header_size", [0, VNET_HEADER_BYTES])
def test_pull_before_next_iovecs(vnet_header_size: int) -> None:
    """A pull before next_iovecs() raises an error that says so."""
    buffer = IovecBuffer((10, 20), vnet_header_size)
    with pytest.raises(ValueError, match=r"before next_iovecs\(\)"):
        buffer.pull(vnet_header_size + 1)


def test_pull_twice() -> None:
    """A second pull raises an error, and uses no buffer."""
    buffer = IovecBuffer((10, 20))
    kept = buffer.next_iovecs()[1]
    buffer.pull(5)
    with pytest.raises(ValueError, match=r"before next_iovecs\(\)"):
        buffer.pull(25)
    assert address(buffer.next_iovecs()[1]) == address(kept)


@pytest.mark.parametrize("sizes", [(), (0,), (10, 0), (-1,), (1,) * (SIZES_MAX + 1)])
def test_invalid_sizes(sizes: tuple[int, ...]) -> None:
    """No sizes, more sizes than one call of the kernel takes, and a size below one raise an error with the limits."""
    with pytest.raises(ValueError, match=f"give 1 to {SIZES_MAX} sizes of at least 1 byte"):
        IovecBuffer(sizes)
    with pytest.raises(ValueError, match="buffer_sizes"):
        checked_sizes(sizes)


def test_negative_header_size() -> None:
    """A negative header size raises an error that names it."""
    with pytest.raises(ValueError, match="vnet_header_size=-1"):
        IovecBuffer(vnet_header_size=-1)


def test_layout_without_a_ladder() -> None:
    """The default layout is one buffer for the largest frame and its prefix."""
    assert Layout.of(1000, 14, None) == Layout(1014, None)


def test_layout_of_a_ladder() -> None:
    """A caller's ladder keeps its sizes, with the prefix in a separate entry in front."""
    assert Layout.of(1000, 14, [20, 30]) == Layout(64, (14, 20, 30))
    assert Layout.of(1000, 0, [20, 30]) == Layout(50, (20, 30))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    vnet_header_size=st.sampled_from([0, 1, 10, 12, 24]),
    data=st.data(),
)
def test_any_sequence_of_datagrams(sizes: list[int], vnet_header_size: int, data: st.DataObject) -> None:
    """pull() returns each datagram, and its views do not change by later reads."""
    buffer = IovecBuffer(sizes, vnet_header_size)
    room = vnet_header_size + sum(sizes)
    sent = data.draw(st.lists(st.binary(min_size=0, max_size=room), max_size=12))
    kept: list[tuple[bytes, list[memoryview]]] = []
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setblocking(False)
        for datagram in sent:
            sender.send(datagram)
            before = [address(view) for view in buffer.next_iovecs()]
            n = os.readv(receiver.fileno(), buffer.next_iovecs())
            assert n == len(datagram)
            views = buffer.pull(n)
            in_front = 1 if vnet_header_size else 0
            used = in_front + len(views)
            assert [address(view) for view in views] == before[in_front:used]
            after = [address(view) for view in buffer.next_iovecs()]
            assert (after[:in_front], after[used:]) == (before[:in_front], before[used:])
            kept.append((datagram[vnet_header_size:], views))
            if n >= vnet_header_size:
                assert bytes(buffer.vnet_header) == datagram[:vnet_header_size]
    # Only the last view is cut: every other view is as long as its size.
    for payload, views in kept:
        assert b"".join(views) == payload
        assert lengths(views)[:-1] == sizes[: max(0, len(views) - 1)]
        assert all(lengths(views))


def test_pull_of_a_negative_length() -> None:
    """A negative length raises ValueError."""
    buffer = IovecBuffer((4,))
    buffer.next_iovecs()
    with pytest.raises(ValueError, match=r"pull\(-1\)"):
        buffer.pull(-1)


@pytest.mark.parametrize("backend", that_take("unix_dgram"))
def test_a_ladder_beyond_any_frame(backend: str) -> None:
    """open raises ValueError for a ladder of a gibibyte, on every backend."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, pytest.raises(ValueError, match="16777216 bytes in all at most"):
        linkrx.open(receiver, backend=backend, buffer_sizes=(1 << 30,))
