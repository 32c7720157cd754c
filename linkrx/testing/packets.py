"""Checks of single packets: valid and malformed, short, long and cut."""

from __future__ import annotations

import struct

from linkrx.kernel.uapi import ETH_HEADER_BYTES
from linkrx.memory.layouts import BUFFER_SIZES
from linkrx.packets import Batch, Packet
from linkrx.registry import backends
from linkrx.testing.cells import Inapplicable
from linkrx.testing.rigs import LOCAL, PROTOCOL, REMOTE, Rig
from linkrx.testing.waiting import PATIENCE, collect, patiently

# Running sums of gVisor's buffer sizes, the frame of an MTU of 1500, and lengths at which drivers and the kernel cut.
STEPS = (128, 384, 640, 1152, 1514, 2048, 2176, 4096, 4224, 8320, 16512, 32896, 65535, 65664)

ETHERTYPE_IPV4 = b"\x08\x00"
ETHERTYPE_IPV6 = b"\x86\xdd"


def sample(rig: Rig, number: int) -> list[bytes]:
    """`number` frames of growing lengths, or as many as fit into the source's queue."""
    least = max(rig.shortest, ETH_HEADER_BYTES + 4)
    return [rig.frame(least + 37 * index, index) for index in range(min(number, rig.queue))]


def around(steps: tuple[int, ...], rig: Rig) -> list[int]:
    """Each step, one byte less, one byte more, and the longest frame, as far as the source takes them."""
    sizes = {size for step in (*steps, rig.longest) for size in (step - 1, step, step + 1)}
    return sorted(size for size in sizes if rig.shortest <= size <= rig.longest)


def check_delivery(rig: Rig, backend: str) -> None:
    """Packets are delivered whole and in order, with the protocol and addresses of the link header."""
    sent = sample(rig, 50)
    calls: list[tuple[bytes | None, bytes | None, int, Packet]] = []
    with rig.open(backend, lambda *call: calls.append(call)) as rx:
        for frame in sent:
            rig.send(frame)
        for _ in patiently(lambda: len(calls) >= len(sent)):
            rx.dispatch(PATIENCE)
        assert [bytes(call[3]) for call in calls] == sent
        for remote, local, protocol, got in calls:
            reported = REMOTE if rig.reported_protocol is not None else None
            assert (remote, local) == ((REMOTE, LOCAL) if rig.ethernet else (reported, None))
            assert (remote, local, protocol) == (got.remote, got.local, got.protocol)
            assert protocol == (PROTOCOL if rig.ethernet else 0x0800)
            assert len(got.link_header) == (ETH_HEADER_BYTES if rig.ethernet else 0)
            assert bytes(got.link_header) + bytes(got.data) == bytes(got.frame)
            assert not got.truncated
            assert got.wire_length == len(got)
            assert (got.vnet is not None) == bool(rx.capabilities.vnet_header_size or rig.prefix)
        counted = rx.stats()
        assert (counted.packets, counted.bytes) == (len(sent), sum(map(len, sent)))
        assert counted.receives > 0
        assert counted.kernel_drops in (None, 0)


def check_runts(rig: Rig, backend: str) -> None:
    """A frame of 1 to 13 bytes, anywhere in a batch and alone, is counted as a runt. Other frames are delivered."""
    if not rig.ethernet:
        raise Inapplicable("frames without a link header are never too short for one")
    if not rig.takes_hostile:
        raise Inapplicable("the kernel sends no frames shorter than an Ethernet header on it")
    _check_counted(rig, backend, [b"\x42" * size for size in range(1, ETH_HEADER_BYTES)], "runts")


def check_empty(rig: Rig, backend: str) -> None:
    """An empty packet, or one with only a virtio-net header, is counted as empty. Other packets are delivered."""
    if rig.shortest > 0:
        raise Inapplicable("it carries no empty packets")
    prefix = rig.prefix
    _check_counted(rig, backend, [b""], "empty")
    if prefix:
        rig.prefix = b""
        # A part of a virtio-net header, and exactly one.
        bad = [bytes(size) for size in range(len(prefix) + 1)]
        with rig.open(backend) as rx:
            for packet in bad:
                rig.send(packet)
            rig.send(prefix + rig.frame(60))
            assert [bytes(got) for got in collect(rx, 1)] == [rig.frame(60)]
            assert rx.stats().empty == len(bad)
        rig.prefix = prefix


def check_unknown_versions(rig: Rig, backend: str) -> None:
    """Without a link header, a packet that is neither IPv4 nor IPv6 is counted as unknown. Other packets are delivered."""
    if rig.ethernet:
        raise Inapplicable("the link header has the protocol")
    if rig.reported_protocol is not None:
        raise Inapplicable("the kernel reports the protocol")
    versions = [bytes([version << 4 | 5]) + b"abc" for version in range(16) if version not in (4, 6)]
    _check_counted(rig, backend, versions, "unknown_protocol")


def _check_counted(rig: Rig, backend: str, bad: list[bytes], counter: str) -> None:
    good = [rig.frame(60 + index, index) for index in range(3)]
    with rig.open(backend) as rx:
        for one in bad:
            # In the middle, alone, first and last.
            for frame in (good[0], one, good[1]):
                rig.send(frame)
            assert [bytes(packet) for packet in collect(rx, 2)] == good[:2]
            rig.send(one)
            assert rx.end is None
            for frame in (one, good[2], one):
                rig.send(frame)
            assert [bytes(packet) for packet in collect(rx, 1)] == good[2:]
        for one in bad:
            rig.send(one)
        rig.send(good[0])
        assert [bytes(packet) for packet in collect(rx, 1)] == good[:1]
        counted = rx.stats()
        names = ("runts", "empty", "unknown_protocol")
        assert {name: getattr(counted, name) for name in names} == {
            name: 5 * len(bad) * (name == counter) for name in names
        }
        assert counted.packets == 3 * len(bad) + 1
        assert rx.end is None


def check_odd_packets(rig: Rig, backend: str) -> None:
    """A packet that is malformed above the link layer, or addressed to another host, is delivered unchanged."""
    claims_more = b"\x4f\x00\xff\xff"  # an IPv4 header of 60 bytes in a packet of 65,535
    claims_data = b"\x60\x00\x00\x00\xff\xff\x00\x40"
    if rig.ethernet:
        others = (bytes.fromhex("020000000099"), b"\xff" * 6, bytes.fromhex("01005e000001"), bytes(6))
        sent = [address + REMOTE + ETHERTYPE_IPV4 + claims_more for address in others]
        sent += [LOCAL + REMOTE + ETHERTYPE_IPV6 + claims_data[:size] for size in range(len(claims_data))]
        # A length instead of an EtherType: IEEE 802.3.
        sent += [LOCAL + REMOTE + struct.pack("!H", 3) + b"\x42\x42\x03"]
    else:
        sent = [whole[:size] for whole in (claims_more, claims_data) for size in range(1, len(whole) + 1)]
    with rig.open(backend) as rx:
        for frame in sent[: rig.queue]:
            rig.send(frame)
        got = collect(rx, len(sent[: rig.queue]))
        assert [bytes(packet) for packet in got] == sent[: rig.queue]
        for packet, frame in zip(got, sent, strict=False):
            if rig.ethernet:
                assert (packet.local, packet.remote) == (frame[:6], frame[6:12])
                assert packet.protocol == int.from_bytes(frame[12:14], "big")
            else:
                assert packet.protocol == (rig.reported_protocol or {4: 0x0800, 6: 0x86DD}[frame[0] >> 4])


def check_odd_vnet_headers(rig: Rig, backend: str) -> None:
    """A virtio-net header with offsets outside the packet is reported unchanged. linkrx does not follow the offsets."""
    if not rig.prefix:
        raise Inapplicable("the kernel writes its virtio-net headers, or it has none")
    prefix = rig.prefix
    hostile = [
        struct.pack("=BBHHHH", 1, 1, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
        struct.pack("=BBHHHH", 0xFF, 0xFF, 0, 0, 14, 0xFFFF),
        struct.pack("=BBHHHH", 1, 4, 54, 0, 60, 0),
    ]
    with rig.open(backend) as rx:
        for rig.prefix in hostile:
            rig.send(rig.frame(60))
            rig.send(rig.frame(14))
        rig.prefix = prefix
        got = collect(rx, 2 * len(hostile))
        assert [bytes(packet) for packet in got] == [rig.frame(60), rig.frame(14)] * len(hostile)
        for packet, header in zip(got[::2], hostile, strict=True):
            vnet = packet.vnet
            assert vnet is not None
            assert struct.pack("=BBHHHH", *vnet) == header


def check_lengths(rig: Rig, backend: str) -> None:
    """The default layout cuts no frame that the source carries."""
    with rig.open(backend) as rx:
        for size in around(STEPS, rig):
            frame = rig.frame(size, size)
            rig.send(frame)
            (got,) = collect(rx, 1)
            assert bytes(got) == frame
            assert not got.truncated
            assert got.wire_length == size
        assert rx.stats().truncated == 0


def check_ladder(rig: Rig, backend: str) -> None:
    """Over the ladder of sizes every length is whole up to its sum; past it the packet says that it was cut."""
    _need_ladder(rig, backend)
    sum_of = sum(BUFFER_SIZES)
    with rig.open(backend, buffer_sizes=BUFFER_SIZES) as rx:
        for size in around((*STEPS, sum_of), rig):
            frame = rig.frame(size, size)
            rig.send(frame)
            (got,) = collect(rx, 1)
            assert bytes(got) == frame[:sum_of]
            assert got.truncated == (size > sum_of)


def check_truncation(rig: Rig, backend: str) -> None:
    """With `buffer_sizes`, a frame that does not fit is cut and flagged, and one that just fits is not."""
    _need_ladder(rig, backend)
    sizes = (20, 40, 60)
    with rig.open(backend, buffer_sizes=sizes) as rx:
        frames = [rig.frame(size, size) for size in (119, 120, 121, 500, 90)]
        for frame in frames:
            rig.send(frame)
        got = collect(rx, len(frames))
        assert [bytes(packet) for packet in got] == [frame[:120] for frame in frames]
        assert [packet.truncated for packet in got] == [False, False, True, True, False]
        for packet, frame in zip(got, frames, strict=True):
            assert packet.wire_length in (len(frame), len(packet))
        if rx.capabilities.socket and backend in ("readv", "recvmmsg", "packet_mmap"):
            assert [packet.wire_length for packet in got] == [len(frame) for frame in frames]
        assert rx.stats().truncated == 2


def _need_ladder(rig: Rig, backend: str) -> None:
    if rig.options.get("segment"):
        raise Inapplicable("super-packets are received whole")
    if not any("buffer_sizes" in info.honours for info in backends() if info.name == backend):
        raise Inapplicable("the backend does not honour buffer_sizes")


def check_columns(rig: Rig, backend: str) -> None:
    """The columns of a batch and its packets agree with the frames that were sent."""
    sent = sample(rig, 20)
    with rig.open(backend, batch_size=7) as rx:
        for frame in sent:
            rig.send(frame)
        batches: list[Batch] = []
        for batch in rx.batches(PATIENCE):
            assert 1 <= len(batch) <= 7
            batches.append(batch)
            if sum(map(len, batches)) == len(sent):
                break
        frames = []
        for batch in batches:
            assert batch.memory.readonly
            for index, got in enumerate(batch):
                start, length = batch.starts[index], batch.lengths[index]
                frames.append(bytes(batch.memory[start : start + length]))
                assert frames[-1] == bytes(got) == bytes(batch[index])
                assert batch.protocols[index] == got.protocol
                assert batch.wire_lengths[index] == got.wire_length
                assert batch.flags[index] & 1 == got.truncated
        assert frames == sent
        assert rx.stats().batches == len(batches)
