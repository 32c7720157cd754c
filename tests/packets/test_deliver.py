"""What `deliver` is given: addresses and protocol, and the packet."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.received import ETHERNET, C, Kind, Row, Source, every_kind, frame, needs_core, numbered

from linkrx.memory.framing import PER_PACKET_LINK_TYPE, Framing

Given = tuple[Any, Any, Any, Any]

# More neighbours than the receiver remembers (NEIGHBOURS in types.h). Their addresses differ in one byte, in any place.
ADDRESSES = st.builds(
    lambda at, byte: bytes(at) + bytes([byte]) + bytes(5 - at), st.integers(0, 5), st.integers(0, 3)
)
PROTOCOLS = st.sampled_from([0x0800, 0x86DD, 0x88B5, 0])
WITH_HEADER = st.builds(
    lambda local, remote, protocol, told: Row(
        local + remote + protocol.to_bytes(2, "big") + b"data", protocol=told, link_type=1, link_header=14
    ),
    *(ADDRESSES, ADDRESSES, PROTOCOLS, PROTOCOLS),
)
WITHOUT_HEADER = st.builds(
    lambda address, length, protocol: Row(
        b"\x45 data", protocol=protocol, link_type=65534, address=address[:length]
    ),
    *(ADDRESSES, st.integers(0, 6), PROTOCOLS),
)


def delivered(source: Source) -> list[Given]:
    """The arguments of each call of `deliver`, for the packets that wait."""
    calls: list[Given] = []
    source.receiver.deliver(lambda *arguments: calls.append(arguments))
    return calls


@every_kind
@given(
    st.lists(
        st.lists(st.one_of(WITH_HEADER, WITHOUT_HEADER), min_size=1, max_size=30), min_size=1, max_size=4
    )
)
def test_the_arguments_are_those_of_the_packet(kind: Kind, batches: list[list[Row]]) -> None:
    """Addresses and protocol are those of each packet, for any sequence of senders, link headers and protocols."""
    source = Source(kind, Framing(ethernet=True, per_packet=PER_PACKET_LINK_TYPE))
    for rows in batches:
        source.fill(rows)
        for row, (remote, local, protocol, packet) in zip(rows, delivered(source), strict=True):
            with_header = row.link_header > 0
            assert remote == (row.frame[6:12] if with_header else row.address or None)
            assert local == (row.frame[:6] if with_header else None)
            assert protocol == row.protocol
            assert (remote, local, protocol) == (packet.remote, packet.local, packet.protocol)
            assert packet == row.frame


@needs_core
def test_addresses_are_made_once_for_each_neighbour() -> None:
    """Packets of one sender are delivered with the same three objects, also in later batches."""
    source = Source(C, ETHERNET)
    calls: list[Given] = []
    for number in range(3):
        source.fill([Row(frame(bytes([number, index]), 0x1234), protocol=0x1234) for index in range(5)])
        calls += delivered(source)
    assert len(calls) == 15
    for place in range(3):
        assert len({id(arguments[place]) for arguments in calls}) == 1


@needs_core
@pytest.mark.parametrize("keeps", [False, True], ids=["dropped", "kept"])
def test_a_packet_that_nobody_keeps_is_used_again(keeps: bool) -> None:
    """`deliver` gets one object for all packets that it does not keep, and a new one after each that it keeps."""
    source = Source(C, ETHERNET)
    source.fill([Row(numbered(number)) for number in range(8)])
    seen: list[int] = []
    kept: list[Any] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Any) -> None:
        seen.append(id(packet))
        if keeps:
            kept.append(packet)

    assert source.receiver.deliver(deliver) == 8
    assert len(set(seen)) == (8 if keeps else 1)
    assert kept == [numbered(number) for number in range(8 if keeps else 0)]
