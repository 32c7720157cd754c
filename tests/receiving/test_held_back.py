"""`latency`: packets are held back until a batch is full, or the time is over."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice

import pytest
from support.latency import FOR_EVER, SEGMENT, held_back, holding, one_by_one, super_packet
from support.pairs import BACKENDS, frame, number_of, pair
from support.received import needs_core
from support.run import that_take

import linkrx
from linkrx.backend import Owner
from linkrx.kernel.uapi import ETH_P_ALL
from linkrx.packets.headers import TIMESTAMP, VLAN
from linkrx.stages import segmentation, segmenting
from linkrx.testing import rigs
from linkrx.testing.devices import injector_on
from linkrx.testing.packets import sample
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import asleep, running, until, watched
from linkrx.testing.waiting import number_of as marked

ROWS = 6
WHOLE = 0xFFFFFFFF  # bytes

# A ring holds packets back by itself.
KINDS = {
    rigs.unix_dgram: "unix_dgram",
    rigs.unix_dgram_vnet: "unix_dgram",
    rigs.unix_seqpacket: "unix_seqpacket",
    rigs.udp: "udp",
    rigs.pipe_nonblocking: "pipe",
    rigs.tap: "tap",
    rigs.tap_segment: "tap",
    rigs.tun: "tun",
    rigs.packet: "packet",
    rigs.packet_segment: "packet",
    rigs.packet_cooked: "packet_cooked",
    rigs.interface: "packet",
}
CELLS = [
    (kind, backend) for kind, name in KINDS.items() for backend in that_take(name) if backend != "packet_mmap"
]
of_each = pytest.mark.parametrize(
    ("kind", "backend"), CELLS, ids=[f"{kind.__name__}-{backend}" for kind, backend in CELLS]
)


@pytest.mark.usefixtures("devices")
@of_each
def test_a_full_batch_is_handed_over(kind: rigs.MakeRig, backend: str) -> None:
    """Packets that come one by one are held back until they are a full batch. That is handed over before the time is over."""
    with kind() as rig, rig.open(backend, latency=FOR_EVER, batch_size=ROWS) as rx, watched(rx):
        sent = sample(rig, 2 * ROWS)
        for half in (sent[:ROWS], sent[ROWS:]):
            with running(partial(one_by_one, rx, rig.send, half, rx.stats().waits)):
                batch = next(rx.batches())
            assert [bytes(packet) for packet in batch] == half
            assert [packet.wire_length for packet in batch] == [len(data) for data in half]
            assert batch.frames() == half
            reported = rigs.REMOTE if rig.reported_protocol is not None else None
            assert {packet.remote for packet in batch} == {rigs.REMOTE if rig.ethernet else reported}
            assert {packet.protocol for packet in batch} == {rigs.PROTOCOL if rig.ethernet else 0x0800}
        stats = rx.stats()
        assert (stats.packets, stats.batches, stats.undelivered) == (2 * ROWS, 2, 0)
        assert stats.receives >= 2 * ROWS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["dispatch", "recv", "next", "batches"])
def test_in_every_way_to_receive(backend: str, way: str) -> None:
    """Every call that waits holds packets back until a batch is full."""
    got: list[linkrx.Packet] = []
    with (
        pair() as (receiver, sender),
        linkrx.open(
            receiver, lambda *call: got.append(call[3]), backend=backend, latency=FOR_EVER, batch_size=ROWS
        ) as rx,
        watched(rx),
    ):
        ways: dict[str, Callable[[], object]] = {
            "dispatch": rx.dispatch,
            "recv": lambda: got.extend(rx.recv() for _ in range(ROWS)),
            "next": lambda: got.extend(islice(rx, ROWS)),
            "batches": lambda: got.extend(next(rx.batches())),
        }
        with running(partial(one_by_one, rx, sender.send, [frame(number) for number in range(ROWS)])):
            ways[way]()
        assert [number_of(packet) for packet in got] == list(range(ROWS))
        assert (rx.stats().batches, rx.stats().waits) == (1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one(backend: str) -> None:
    """With batch_size=1 each packet is a full batch, and so none is held back for the whole latency."""
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, backend=backend, latency=FOR_EVER, batch_size=1) as rx,
        watched(rx),
    ):
        for number in range(3):
            with running(partial(one_by_one, rx, sender.send, [frame(number)], number)):
                assert number_of(rx.recv()) == number


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_memory_for_a_batch_is_full(backend: str) -> None:
    """Long packets are handed over when they fill half of the memory for a batch, although they are fewer than a batch has rows."""
    long = rigs.LOCAL + rigs.REMOTE + b"\x08\x00" + bytes(60_000)
    with rigs.unix_dgram() as rig, rig.open(backend, latency=FOR_EVER, batch_size=1000) as rx, watched(rx):
        sent: list[bytes] = []
        over = threading.Event()

        def send() -> None:
            until(lambda: asleep(rx))
            while not over.is_set() and len(sent) < 900:
                before = held_back(rx)
                sent.append(long + len(sent).to_bytes(4, "big"))
                rig.send(sent[-1])
                until(lambda before=before: held_back(rx) != before or over.is_set())  # type: ignore[misc]

        with running(send):
            try:
                got = next(rx.batches()).frames()
            finally:
                over.set()
        assert 1 < len(got) < 900
        assert got == sent[: len(got)]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("tap"))
def test_a_queue_does_not_overflow(backend: str) -> None:
    """While packets are held back, many more than the queue of a TAP device has room for, none is lost."""
    # The kernel frees the places of such a queue 16 at a time (linux/ptr_ring.h).
    total, queue, ahead = 400, 100, 50
    with rigs.tap() as rig:
        assert rig.device is not None
        rig.device.set(txqlen=queue)
        with rig.open(backend, latency=FOR_EVER, batch_size=total) as rx, watched(rx):

            def send() -> None:
                until(lambda: asleep(rx))
                for number in range(total):
                    until(lambda number=number: number - held_back(rx) < ahead)  # type: ignore[misc]
                    rig.send(rig.frame(60, number))

            with running(send):
                batch = next(rx.batches())
            assert [marked(rig, packet) for packet in batch] == list(range(total))
            assert rx.stats().kernel_drops == 0


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", that_take("udp"))
def test_a_queue_is_read_until_it_is_empty(backend: str) -> None:
    """A read while packets are held back takes the whole queue, of any sizes, and not what one fill has memory for."""
    with rigs.udp() as rig, rig.open(backend, latency=FOR_EVER, batch_size=1000) as rx:
        sent = [rig.frame(1400 if number % 20 == 0 else 60, number) for number in range(100)]
        for data in sent:
            rig.send(data)
        assert not rx._hold_back()
        assert held_back(rx) == len(sent)
        assert next(rx.batches(0)).frames() == sent


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_full_of_bytes(backend: str) -> None:
    """What a batch that is full of bytes left in the queue is not held back, also where one packet may be larger than that memory."""
    with (
        rigs.unix_dgram() as rig,
        rig.open(backend, latency=FOR_EVER, batch_size=1000, buffer_sizes=[1 << 23]) as rx,
    ):
        number = 0
        while True:
            rig.send(rig.frame(100_000, number))
            number += 1
            if rx._hold_back():
                break
        assert number < 1000
        assert len(next(rx.batches(0))) == number
        assert rx._was_full


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_time_is_over(backend: str) -> None:
    """Packets that are fewer than a batch are handed over together when the time is over."""
    got: list[int] = []
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, backend=backend, latency=0.05) as rx,
        watched(rx),
    ):

        def send() -> None:
            until(lambda: asleep(rx))
            for number in range(ROWS):
                sender.send(frame(number))

        with running(send):
            while len(got) < ROWS:
                got += map(number_of, next(rx.batches()))
        assert got == list(range(ROWS))
        assert held_back(rx) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_counts_what_is_held_back(backend: str) -> None:
    """stop() ends the wait. What was held back is counted as undelivered."""
    with holding(backend, 3) as (rx, _):
        rx.stop()
        until(lambda: rx.end is linkrx.End.STOPPED and rx._ended)
    stats_of = rx._tally.undelivered + rx._undelivered
    assert (stats_of, rx._counters[0]) == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flush_delivers_what_is_held_back(backend: str) -> None:
    """stop(flush=True) ends the wait, and delivers what was held back."""
    with holding(backend, 3) as (rx, _):
        rx.stop(flush=True)
        until(lambda: rx.end is linkrx.End.STOPPED and rx._ended)
        stats = rx.stats()
    assert (stats.packets, stats.undelivered) == (3, 0)


def number_is(number: int, protocol: int = 0x0800) -> list[tuple[int, int, int, int]]:
    """A filter for the frame of one number. It does not cut."""
    load_protocol, load_number, keep, reject = (
        (0x28, 0, 0, 12),
        (0x20, 0, 0, 14),
        (6, 0, 0, WHOLE),
        (6, 0, 0, 0),
    )
    return [load_protocol, (0x15, 0, 3, protocol), load_number, (0x15, 0, 1, number), keep, reject]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_filter_applies_to_what_is_held_back(backend: str) -> None:
    """A filter that is set in another thread applies to packets that were held back before. These are then handed over."""
    with holding(backend, 3) as (rx, _):
        rx.set_filter(number_is(1))
        until(lambda: rx.stats().batches == 1)
        stats = rx.stats()
    assert (stats.packets, stats.filtered) == (1, 2)


@pytest.mark.parametrize("backend", that_take("unix_seqpacket"))
def test_a_peer_that_hangs_up(backend: str) -> None:
    """When a peer closes, what was held back is handed over at once, and then reception ends."""
    with (
        pair(socket.SOCK_SEQPACKET) as (receiver, sender),
        linkrx.open(receiver, ignore, backend=backend, latency=FOR_EVER) as rx,
        watched(rx),
    ):

        def send() -> None:
            one_by_one(rx, sender.send, [frame(number) for number in range(3)])
            until(lambda: held_back(rx) == 3)
            sender.close()

        with running(send):
            assert [number_of(packet) for packet in next(rx.batches())] == [0, 1, 2]
        assert rx.run() is linkrx.End.EOF
        assert (rx.stats().empty, rx.stats().undelivered) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_owner_closes_the_source(backend: str) -> None:
    """If the owner closes the descriptor while packets are held back, the call raises, and the next call delivers them."""
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, ignore, backend=backend, latency=FOR_EVER) as rx,
        watched(rx),
    ):

        def send() -> None:
            one_by_one(rx, sender.send, [frame(number) for number in range(3)])
            until(lambda: held_back(rx) == 3)
            receiver.close()

        with running(send), pytest.raises(OSError, match="Bad file descriptor") as caught:
            rx.recv()
        assert caught.value.errno == errno.EBADF
        assert [number_of(packet) for packet in next(rx.batches())] == [0, 1, 2]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", [name for name in that_take("packet") if name != "packet_mmap"])
def test_a_link_that_goes_down(backend: str) -> None:
    """When a link goes down, what was held back is handed over at once, and reception continues."""
    with rigs.interface() as rig, rig.open(backend, latency=FOR_EVER) as rx, watched(rx):
        device = rig.device
        assert device is not None

        def send() -> None:
            one_by_one(rx, rig.send, [rig.frame(60, number) for number in range(3)])
            until(lambda: held_back(rx) == 3)
            device.set_down()

        with running(send):
            assert [marked(rig, packet) for packet in next(rx.batches())] == [0, 1, 2]
        with pytest.raises(TimeoutError):
            rx.recv(0)
        assert (rx.stats().link_downs, rx.end) == (1, None)
        device.set_up()
        rig.send(rig.frame(60, 3))
        assert marked(rig, rx.recv(0)) == 3


def refuse(*_: object) -> int:
    """The fill of a mechanism that the kernel refuses."""
    raise OSError(errno.ENOSYS, "refused")


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", [name for name in that_take("packet") if name != "packet_mmap"])
def test_a_filter_of_the_kernel(backend: str) -> None:
    """A filter that the kernel runs is set while packets are held back. It applies to them, although the queue was empty since."""
    with rigs.interface() as rig, rig.open(backend, latency=FOR_EVER) as rx:
        for number in range(3):
            rig.send(rig.frame(60, number))
            until(lambda number=number: rx._hold_back() or held_back(rx) > number)  # type: ignore[misc]
        rx.set_filter(number_is(1, rigs.PROTOCOL))
        assert not rx._hold_back()
        assert [marked(rig, packet) for packet in next(rx.batches(0))] == [1]
        assert rx.stats().filtered == 2


@needs_core
def test_a_refused_mechanism() -> None:
    """When the kernel refuses a mechanism while packets are held back, they are handed over, and the next one goes on."""
    with pair() as (receiver, sender), linkrx.open(receiver, ignore, latency=FOR_EVER) as rx:
        refused = rx._mechanism
        rx._use(0)  # use the mechanism through Python, because its own fill is C
        sender.send(frame(0))
        assert not rx._hold_back()
        refused.fill = refuse  # type: ignore[method-assign,assignment]
        sender.send(frame(1))
        assert rx._hold_back()
        assert held_back(rx) == 1
        assert [rx.drain(), rx.drain()] == [1, 1]
        assert (rx.backend, rx.stats().demotions) == ("readv", 1)


def test_a_mechanism_that_ignores_most() -> None:
    """A mechanism may report as many packets as it has rows, although others are held back. The batch is larger then.

    Each packet has what the mechanism reported for it.
    """
    with pair() as (receiver, sender), linkrx.open(receiver, latency=FOR_EVER, batch_size=4) as rx:
        given, columns = rx._descriptors.report, rx._descriptors.columns
        sizes = iter([3, 0, 4])

        def fill(arena: Owner, room: int) -> int:
            count = next(sizes)
            for row in range(count):
                columns.starts[row], columns.lengths[row] = 24 * row, 18
                at, number = arena.cursor + 24 * row, 10 * count + row
                arena.view[at : at + 18] = frame(number)
                columns.flags[row] = VLAN | TIMESTAMP
                columns.vlan_tcis[row], columns.vlan_tpids[row] = number, number + 1
                columns.timestamps[row], columns.interfaces[row] = number + 2, number + 3
                columns.wire_lengths[row] = number + 4
            given.receives, given.end, given.count = 1, 24 * count, count
            return count

        rx._use(0)
        rx._mechanism.fill = fill  # type: ignore[method-assign]
        sender.close()
        assert not rx._hold_back()
        assert rx._hold_back()
        batch = next(rx.batches(0))
        assert [number_of(packet) for packet in batch] == [30, 31, 32, 40, 41, 42, 43]
        for number, packet in zip([30, 31, 32, 40, 41, 42, 43], batch, strict=True):
            assert packet.vlan == (number + 1, number)
            assert (packet.timestamp_ns, packet.interface) == (number + 2, number + 3)
            assert packet.wire_length == number + 4


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", [name for name in that_take("packet_cooked") if name != "packet_mmap"])
def test_protocols_that_the_kernel_reports(backend: str) -> None:
    """Packets without a link header that are held back keep their protocol and their sender."""
    protocols = [0x88B5, 0x0806, 0x0800, 0x88B6]
    senders = [rigs.REMOTE[:5] + bytes([number]) for number in range(4)]
    with (
        rigs.veth() as (near, far),
        injector_on(far) as injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as cooked,
    ):
        cooked.bind((near, ETH_P_ALL))
        with linkrx.open(cooked, backend=backend, latency=FOR_EVER, batch_size=4) as rx:
            for sender, protocol in zip(senders, protocols, strict=True):
                before = held_back(rx)
                injector.send(rigs.LOCAL + sender + protocol.to_bytes(2, "big") + bytes(46))
                until(lambda before=before: rx._hold_back() or held_back(rx) > before)  # type: ignore[misc]
            batch = next(rx.batches(0))
            assert [packet.protocol for packet in batch] == protocols
            assert [packet.remote for packet in batch] == senders


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rows_of_a_mechanism_stay_its_own(backend: str) -> None:
    """A mechanism may rely on its rows: what a packet that was held back had there is not reported for a later one."""
    with rigs.unix_dgram() as rig, rig.open(backend, snaplen=20, batch_size=4, latency=FOR_EVER) as rx:
        for sizes in ([20, 20, 60, 60], [60, 60, 20, 20], [20, 20, 20, 20]):
            for size in sizes[:-1]:
                rig.send(rig.frame(size))
                assert not rx._hold_back()
            rig.send(rig.frame(sizes[-1]))
            assert rx._hold_back()
            batch = next(rx.batches(0))
            assert [packet.truncated for packet in batch] == [size > 20 for size in sizes]
            assert list(batch.wire_lengths) == sizes


@pytest.mark.parametrize("python", [False, True], ids=["core", "python"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_of_super_packets(backend: str, python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segment=True the frames of several super-packets are held back until they are a full batch. The rest comes at once."""
    if python:
        monkeypatch.setattr(segmenting, "segmenter", segmentation.PythonSegmenter)
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, backend=backend, latency=FOR_EVER, batch_size=8, **SEGMENT) as rx,
        watched(rx),
    ):

        def send() -> None:
            until(lambda: asleep(rx))
            for first in (0, 3, 6):
                sender.send(super_packet(range(first, first + 3)))
                until(lambda first=first: held_back(rx) != first)  # type: ignore[misc]

        with running(send):
            first = next(rx.batches())
        rest = next(rx.batches())
        assert [[packet.data[28] for packet in batch] for batch in (first, rest)] == [list(range(8)), [8]]
        assert (rx.stats().batches, rx.stats().waits) == (2, 1)
