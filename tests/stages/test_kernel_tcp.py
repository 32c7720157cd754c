"""A TCP connection from the kernel through a TAP to linkrx: segmented by the kernel, segmented by linkrx, and whole."""

from __future__ import annotations

from collections import Counter

import pytest
from support.super_packets import ones_complement
from support.tcp_sink import ETHERTYPES, IP_BYTES, MODES, MTU, PROTOCOL_AT, TCP, stream

from linkrx.kernel.uapi import ETH_HEADER_BYTES
from linkrx.testing.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("devices")

BYTES = 3_000_000


def checksums_are_right(frame: bytes, version: int) -> bool:
    """Whether the checksums of IPv4 and TCP are correct: data with its checksum has the sum 0xffff."""
    ip, tcp = frame[ETH_HEADER_BYTES:][: IP_BYTES[version]], frame[ETH_HEADER_BYTES + IP_BYTES[version] :]
    addresses = ip[12:20] if version == 4 else ip[8:40]
    length = int.from_bytes(ip[2:4], "big") - len(ip) if version == 4 else int.from_bytes(ip[4:6], "big")
    pseudo_header = addresses + length.to_bytes(4, "big") + TCP.to_bytes(4, "big")
    return (
        length == len(tcp)
        and (version == 6 or ones_complement(ip) == 0xFFFF)
        and ones_complement(pseudo_header + tcp) == 0xFFFF
    )


@pytest.mark.parametrize("timestamps", [False, True], ids=["", "timestamps"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", MODES)
def test_every_byte_of_a_stream(mode: str, version: int, timestamps: bool) -> None:
    """All bytes are received in order, and every checksum is correct or marked as unfinished.

    With offloads the kernel sent super-packets.
    """
    seen: Counter[str] = Counter()
    at = ETH_HEADER_BYTES + PROTOCOL_AT[version]
    with stream(mode, version, BYTES, timestamps=timestamps) as (rx, sink):
        for batch in rx.batches(PATIENCE):
            for packet in batch:
                if packet.protocol != ETHERTYPES[version] or packet.frame[at] != TCP:
                    continue
                seen["packets"] += 1
                seen["larger than the MTU"] += len(packet.data) > MTU
                if packet.vnet is not None:
                    seen["super-packets"] += packet.vnet.super_packet
                if packet.vnet is None or not packet.vnet.needs_checksum:
                    assert checksums_are_right(bytes(packet.frame), version)
                    seen["finished"] += 1
            sink.take(batch)
            if sink.finished:
                break
        stats = rx.stats()
    # `repeated` may be more than 0: the kernel sends the last segment again without an acknowledgement (RFC 8985, 7).
    assert (sink.received, sink.finished, sink.ahead) == (BYTES, True, 0)
    assert (stats.malformed, stats.truncated, stats.kernel_drops) == (0, 0, 0)
    if mode == "whole":
        assert 0 < seen["super-packets"] == seen["larger than the MTU"]
        assert seen["packets"] < BYTES // MTU
    else:
        assert seen["super-packets"] == seen["larger than the MTU"] == 0
        assert seen["finished"] == seen["packets"] > BYTES // MTU
    assert (stats.receives < stats.packets) == (mode == "segment")


def test_a_wrong_byte_is_seen() -> None:
    """The sink detects a wrong byte of the stream, and the checksum check detects a changed byte."""
    with stream("kernel", 4, 1000) as (rx, sink):
        right = sink.pattern
        for batch in rx.batches(PATIENCE):
            for packet in batch:
                # The kernel sends a segment again if the answer is late.
                if len(packet) > 1000 and not sink.received:
                    frame = bytearray(packet.frame)
                    assert checksums_are_right(bytes(frame), 4)
                    frame[500] ^= 1
                    assert not checksums_are_right(bytes(frame), 4)
                    sink.pattern = right[:999] + b"wrong"
                    with pytest.raises(AssertionError, match="in the 1000 bytes after byte 0"):
                        sink.take(batch)
                    sink.pattern = right
            sink.take(batch)
            if sink.finished:
                break
    assert sink.received == 1000
