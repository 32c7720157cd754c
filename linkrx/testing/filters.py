"""Checks of filters: rejected packets are never delivered, whether the kernel or linkrx runs the filter."""

from __future__ import annotations

from linkrx.packets import Packet
from linkrx.testing.rigs import Rig
from linkrx.testing.waiting import PATIENCE, collect, flooded, running, until

SIZE = 64
KEPT = 20
ALL = [(0x06, 0, 0, 0xFFFFFFFF)]
NONE = [(0x06, 0, 0, 0)]
CUTTING = [(0x06, 0, 0, KEPT)]
BACKWARDS = [(0x05, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0xFFFFFFFF)]

Instructions = list[tuple[int, int, int, int]]


def _marks(rig: Rig, *, even: bool) -> Instructions:
    """A filter for frames with an even mark, or with an odd one."""
    at = 14 if rig.ethernet else 1
    take, reject = (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)
    return [(0x20, 0, 0, at), (0x45, 0, 1, 1), *((reject, take) if even else (take, reject))]


def _send(rig: Rig, first: int, behind: int) -> list[bytes]:
    frames = [rig.frame(SIZE, mark) for mark in range(first, behind)]
    for frame in frames:
        rig.send(frame)
    return frames


def check_filter(rig: Rig, backend: str) -> None:
    """`filter=` holds from the first packet on. Packets that linkrx rejects are counted. `explain()` says who filters."""
    with rig.open(backend, filter=_marks(rig, even=True)) as rx:
        sent = _send(rig, 0, 9)
        got = collect(rx, 5)
        assert [bytes(packet) for packet in got] == sent[::2]
        stats = rx.stats()
        assert stats.packets == 5
        assert stats.filtered in (None, 0, 4)
        explained = rx.choice.explain().splitlines()[-1]
        assert explained.startswith("filter ")
        assert ("linkrx" in explained) or stats.filtered is None
    with rig.open(backend, filter=CUTTING) as rx:
        (whole,) = _send(rig, 3, 4)
        _is_cut(rx.recv(PATIENCE), whole)
        assert rx.stats().truncated == 1


def _is_cut(packet: Packet, whole: bytes) -> None:
    assert bytes(packet) == whole[:KEPT]
    assert packet.truncated
    assert packet.wire_length == len(whole)


def check_set_filter(rig: Rig, backend: str) -> None:
    """After `set_filter` no rejected packet is delivered, from the current batch, from the queue or later. An invalid filter
    changes nothing. Without a filter all packets are delivered again.
    """
    even, odd = _marks(rig, even=True), _marks(rig, even=False)
    got: list[bytes] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(bytes(packet))
        if len(got) == 3:
            rx.set_filter(odd)

    with rig.open(backend, deliver, batch_size=4) as rx:
        sent = _send(rig, 0, 9)
        assert bytes(rx.recv(PATIENCE)) == sent[0]
        rx.set_filter(even)
        assert [bytes(packet) for packet in collect(rx, 4)] == sent[2::2]
        sent = _send(rig, 10, 13)
        assert [bytes(packet) for packet in collect(rx, 2)] == sent[::2]
        for wrong in (BACKWARDS, [], ALL * 5000):
            try:
                rx.set_filter(wrong)
            except ValueError:
                continue
            raise AssertionError("an invalid filter was accepted")
        sent = _send(rig, 20, 23)
        assert [bytes(packet) for packet in collect(rx, 2)] == sent[::2]
        sent = _send(rig, 30, 39)
        for expected in range(1, 4):
            rx.run(count=1)
            assert got == sent[: 2 * expected : 2]
        (last,) = _send(rig, 39, 40)
        while got[-1] != last:  # if linkrx filters, odd frames of the batch come first
            before = len(got)
            rx.run(count=1, duration=PATIENCE)
            assert len(got) > before
        assert not set(got[3:]) & set(sent[::2])
        rx.set_filter(None)
        sent = _send(rig, 40, 42)
        assert [bytes(packet) for packet in collect(rx, 2)] == sent
        rx.set_filter(CUTTING)
        (whole,) = _send(rig, 50, 51)
        _is_cut(rx.recv(PATIENCE), whole)


def _wait_for(counter: list[int], more: int) -> None:
    wanted = counter[0] + more
    until(lambda: counter[0] >= wanted)


def check_set_filter_under_load(rig: Rig, backend: str) -> None:
    """While another thread receives in a flood, no packet is delivered after `set_filter` with a filter that rejects all."""
    got = [0]

    def deliver(*_: object) -> None:
        got[0] += 1

    with rig.open(backend, deliver) as rx, flooded(rig) as flood, running(rx.run):
        try:
            for _ in range(3):
                rx.set_filter(ALL)
                _wait_for(got, 1)
                rx.set_filter(NONE)
                at = got[0]
                _wait_for(flood, 100)
                assert got[0] == at
        finally:
            rx.stop()
