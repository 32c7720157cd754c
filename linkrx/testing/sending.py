"""Checks of sending: whole frames in order, from any thread, in floods, while the link is down, and the counter."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from linkrx.errors import Closed, UnsupportedSource
from linkrx.packets import Packet
from linkrx.testing.cells import Inapplicable
from linkrx.testing.links import device_of
from linkrx.testing.packets import sample
from linkrx.testing.rigs import Rig
from linkrx.testing.stops import alarmed, ignore
from linkrx.testing.waiting import PATIENCE, collect, flooded, patiently, running, until

Send = Callable[[], object]

MANY = 200  # frames; more than one system call sends
BOTH_WAYS = 2000
ODD_LENGTHS = (0, 1, 13, 70_000)
AT_ONCE = 64  # frames that fit into the queue of any far end


def _far_end(rig: Rig) -> AbstractContextManager[Callable[[], bytes]]:
    if rig.far_end is None:
        raise Inapplicable("the source cannot send")
    return rig.far_end()


def _refused(send: Send, kind: type[Exception] = OSError) -> Exception | None:
    """The exception of that kind that `send` raises. None if it raises none."""
    try:
        send()
    except kind as error:
        return error
    return None


def _taken(frames: list[bytes], send: Callable[[list[bytes]], int], take: Callable[[], bytes]) -> list[bytes]:
    """Send all frames, AT_ONCE at a time, and take them at the far end, whose queue may be short."""
    sent = 0
    seen: list[bytes] = []
    while sent < len(frames):
        sent += send(frames[sent : sent + AT_ONCE])
        seen += [take() for _ in range(sent - len(seen))]
    return seen


def check_sending(rig: Rig, backend: str) -> None:
    """Frames are sent whole and in order, singly and many at once, from any bytes-like object, and are counted."""
    with _far_end(rig) as take, rig.open(backend) as rx:
        frame = rig.frame(100, 7)
        for one in (frame, bytearray(frame), memoryview(frame), memoryview(bytes(9) + frame)[9:]):
            rx.send(one)
            assert take() == frame
        for size in (max(rig.shortest, 14), 64, 1514):
            rx.send(rig.frame(size))
            assert take() == rig.frame(size)
        assert rx.send_batch([]) == 0
        frames = [rig.frame(60 + number, number) for number in range(MANY)]
        assert _taken(frames, rx.send_batch, take) == frames
        assert _taken(frames, lambda rest: rx.send_batch(map(bytearray, rest)), take) == frames
        assert _taken(frames, lambda rest: rx.send_batch(tuple(rest)), take) == frames
        stats = rx.stats()
        assert stats.sent == 7 + 3 * MANY
        assert stats.packets == 0  # own frames do not come back


def check_sending_packets(rig: Rig, backend: str) -> None:
    """Received packets can be sent unchanged: one from `deliver`, kept ones, and a whole batch."""
    got: list[Packet] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        rx.send(packet)
        got.append(packet)

    frames = sample(rig, 5)
    with _far_end(rig) as take, rig.open(backend, deliver) as rx:
        for frame in frames:
            rig.send(frame)
        for _ in patiently(lambda: len(got) == len(frames)):
            rx.drain()
        assert [take() for _ in frames] == frames
        assert rx.send_batch(got) == len(frames)
        assert [take() for _ in frames] == frames
        for frame in frames:
            rig.send(frame)
        sent = 0
        for batch in rx.batches(PATIENCE):
            assert rx.send_batch(batch) == len(batch)
            sent += len(batch)
            if sent == len(frames):
                break
        assert [take() for _ in frames] == frames
        assert rx.stats().sent == 3 * len(frames)


def check_sending_anywhere(rig: Rig, backend: str) -> None:
    """Another thread can send while one waits to receive, and so can a signal handler that runs during a wait."""
    frame = rig.frame(100, 1)
    with _far_end(rig) as take, rig.open(backend, ignore) as rx:
        with running(rx.run):
            until(lambda: rx.stats().waits > 0)
            rx.send(frame)
            assert rx.send_batch([frame, frame]) == 2
            rx.stop()
        assert [take() for _ in range(3)] == [frame] * 3
    with _far_end(rig) as take, rig.open(backend, ignore) as rx:
        began: list[bool] = []

        def send_and_stop(_: object) -> None:
            if not began:
                began.append(True)
                rx.send(frame)
                rx.send_batch([frame, frame])
                rx.stop()

        # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
        with alarmed(send_and_stop, first=0.01, interval=0.01):
            rx.run()
        assert [take() for _ in range(3)] == [frame] * 3
        assert rx.stats().sent == 3


def check_sending_both_ways(rig: Rig, backend: str) -> None:
    """While one thread receives in a flood, another sends: no sent frame is lost, doubled or out of order."""
    with _far_end(rig) as take, rig.open(backend, ignore) as rx:
        frames = [rig.frame(100, number) for number in range(BOTH_WAYS)]
        with flooded(rig), running(rx.run):
            try:
                until(lambda: rx.stats().packets > 0)
                assert _taken(frames[:1000], rx.send_batch, take) == frames[:1000]
                for frame in frames[1000:]:
                    rx.send(frame)
                    assert take() == frame
            finally:
                rx.stop()
        assert rx.stats().sent == BOTH_WAYS


def check_sending_odd_lengths(rig: Rig, backend: str) -> None:
    """Frames of 0, 1, 13 and 70,000 bytes are sent, or refused with a clear error. Other frames are sent unchanged."""
    sent = 0
    with _far_end(rig) as take, rig.open(backend) as rx:
        good = rig.frame(100)
        for size in ODD_LENGTHS:
            odd = bytes(size)
            error = _refused(partial(rx.send, odd))
            if error is None:
                assert rx.send_batch([good, odd, good]) == 3
                sent += 4
            else:
                assert f"sending {size} bytes on the {rx.capabilities.title}: " in str(error)
                assert isinstance(error, OSError)
                assert error.errno in (errno.EINVAL, errno.EMSGSIZE)
                again = _refused(partial(rx.send_batch, [odd, good]))
                assert str(again) == str(error)
                assert rx.send_batch([good, odd, good]) == 1
                sent += 1
            # The peer of a socket receives the odd frames too.
            expected = [good] if error else [good, good]
            if rig.device is None and not error:
                expected = [odd, good, odd, good]
            assert [take() for _ in expected] == expected
        assert rx.stats().sent == sent
        rx.send(rig.frame(200))
        while take() != rig.frame(200):
            pass


def check_sending_to_nobody(rig: Rig, backend: str) -> None:
    """Sending never waits for a peer that does not read: `send` raises BlockingIOError, `send_batch` returns how many were sent."""
    with _far_end(rig) as take, rig.open(backend) as rx:
        if rig.device is not None:
            raise Inapplicable("a device sends frames at once")
        frames: list[bytes] = []
        taken = 0
        while taken == len(frames):
            assert taken < 100_000
            frames += [rig.frame(100, number) for number in range(taken, taken + 1000)]
            taken += rx.send_batch(frames[taken:])
        assert taken > 0
        assert rx.send_batch(frames[taken:]) == 0
        assert "its queue is full" in str(_refused(lambda: rx.send(frames[taken]), BlockingIOError))
        assert rx.stats().sent == taken
        assert take() == frames[0]
        rx.send(frames[taken])
        assert [take() for _ in range(taken)] == frames[1 : taken + 1]
        assert rx.stats().sent == taken + 1


def check_sending_over_flaps(rig: Rig, backend: str) -> None:
    """While the link is down, sending fails with ENETDOWN. When it is up, sending works again, and the receiver has counted the flap."""
    device = device_of(rig)
    if rig.far_end is None:
        raise Inapplicable("the source cannot send")
    frame = rig.frame(100, 1)
    with rig.open(backend, ignore) as rx:
        for turn in range(1, 3):
            device.set_down()
            for send in (partial(rx.send, frame), partial(rx.send_batch, [frame, frame])):
                error = _refused(send)
                assert isinstance(error, OSError)
                assert error.errno == errno.ENETDOWN
                assert "the link is down" in str(error)
            device.set_up()
            with rig.far_end() as take:
                rx.send(frame)
                assert rx.send_batch([frame]) == 1
                assert [take(), take()] == [frame, frame]
            assert rx.dispatch(0.05) is True
            assert rx.end is None
            assert rx.stats().link_downs == (turn if rx.capabilities.socket else None)
            assert rx.stats().sent == 2 * turn
            rig.send(frame)
            assert len(collect(rx, 1)) == 1


def check_sending_at_the_end(rig: Rig, backend: str) -> None:
    """Sending works after stop(). After close() and in a forked child it raises Closed, and on a deleted device OSError."""
    frame = rig.frame(100, 1)
    with _far_end(rig) as take, rig.open(backend) as rx:
        rx.stop()
        assert list(rx) == []
        rx.send(frame)
        assert take() == frame
        child = os.fork()
        if not child:  # pragma: no cover, another process
            os._exit(_refused(lambda: rx.send(frame), Closed) is None)
        assert os.waitpid(child, 0)[1] == 0
        if rig.device is not None:
            rig.device.delete()
            error = _refused(lambda: rx.send(frame))
            assert isinstance(error, OSError)
            assert error.errno == errno.ENODEV
        assert rx.stats().sent == 1
    assert _refused(lambda: rx.send(frame), Closed)
    assert _refused(lambda: rx.send_batch([frame]), Closed)


def check_sending_refused(rig: Rig, backend: str) -> None:
    """A source that cannot send raises UnsupportedSource with the reason. Reception goes on."""
    if rig.far_end is not None:
        raise Inapplicable("the source can send")
    with rig.open(backend) as rx:
        why = f"nothing can be sent: the {rx.capabilities.title} "
        assert why in str(_refused(lambda: rx.send(rig.frame(100)), UnsupportedSource))
        assert why in str(_refused(lambda: rx.send_batch([rig.frame(100)]), UnsupportedSource))
        assert rx.stats().sent == 0
        rig.send(rig.frame(100))
        assert bytes(rx.recv(PATIENCE)) == rig.frame(100)
