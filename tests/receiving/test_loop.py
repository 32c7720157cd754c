"""The receive loop on AF_UNIX pairs: timeouts, stops, errors, and calls from deliver."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from support.pairs import BACKENDS, HEADER, Pair, frame, number_of, pair

import linkrx
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import PATIENCE, asleep, patiently, running, until


@pytest.fixture
def ends() -> Iterator[Pair]:
    """A datagram pair."""
    with pair() as found:
        yield found


# Timeouts.


def test_dispatch_returns_true_after_a_timeout_with_nothing(ends: Pair) -> None:
    """After a timeout dispatch returns True, and nothing was delivered."""
    with linkrx.open(ends[0], ignore) as rx:
        assert rx.dispatch(0.01) is True
        assert rx.dispatch(0) is True
        assert rx.end is None
        assert rx.stats().packets == 0


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_any_timeout_can_be_waited(ends: Pair, timeout: float) -> None:
    """A timeout longer than the kernel supports waits until stop."""
    with linkrx.open(ends[0], ignore) as rx, running(lambda: rx.dispatch(timeout)):
        until(lambda: asleep(rx))
        rx.stop()


def test_recv_raises_timeouterror(ends: Pair) -> None:
    """recv raises TimeoutError if no packet comes, and returns a packet that comes."""
    with linkrx.open(ends[0]) as rx:
        with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
            rx.recv(0.01)
        ends[1].send(frame(7))
        assert number_of(rx.recv(0.01)) == 7


def test_batches_end_after_the_timeout(ends: Pair) -> None:
    """batches(timeout) returns batches and ends after that many seconds without a packet. Runts do not count as packets."""
    with linkrx.open(ends[0]) as rx:
        ends[1].send(frame(1))
        ends[1].send(b"runt")
        assert [len(batch) for batch in rx.batches(0.01)] == [1]
        assert list(rx.batches(0)) == []
        assert rx.end is None


def test_a_flood_of_runts_does_not_stop_the_clock(ends: Pair) -> None:
    """recv(timeout) times out while only runts arrive."""
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                ends[1].send(b"runt", socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()

    with linkrx.open(ends[0]) as rx, running(flood):
        try:
            # The thread that sends may get no turn in so short a time.
            for _ in patiently(lambda: rx.stats().runts > 0):
                with pytest.raises(TimeoutError):
                    rx.recv(0.05)
        finally:
            stop.set()


def test_it_sleeps_once_per_wait_and_never_while_packets_flow(ends: Pair) -> None:
    """Receiving queued packets takes no wait, and an empty queue takes one."""
    with linkrx.open(ends[0], ignore, batch_size=4) as rx:
        for number in range(12):
            ends[1].send(frame(number))
        for _ in range(3):
            assert rx.dispatch(1)
        assert rx.stats().waits == 0
        assert rx.dispatch(0.001)
        assert rx.stats().waits == 1


def test_what_is_no_timeout(ends: Pair) -> None:
    """A negative timeout raises ValueError and a string TypeError. Both messages say what is valid."""
    with linkrx.open(ends[0], ignore) as rx:
        for wait in (rx.recv, rx.dispatch, lambda timeout: next(rx.batches(timeout))):
            with pytest.raises(ValueError, match="timeout=-1: give seconds, or None"):
                wait(-1)
            with pytest.raises(TypeError, match="timeout='1': give seconds, or None"):
                wait("1")  # type: ignore[arg-type]


def test_deliver_must_be_callable(ends: Pair) -> None:
    """open refuses a deliver that is not callable."""
    with pytest.raises(TypeError, match="deliver=5: give a callable"):
        linkrx.open(ends[0], 5)  # type: ignore[arg-type]


# Stopping.


def test_stop_before_the_first_dispatch(ends: Pair) -> None:
    """After a stop before the first dispatch, queued packets are not delivered."""
    got: list[object] = []
    with linkrx.open(ends[0], lambda *call: got.append(call)) as rx:
        ends[1].send(frame(1))
        rx.stop()
        rx.stop()
        assert rx.end is linkrx.End.STOPPED
        assert rx.dispatch() is False
        assert rx.dispatch(0) is False
        assert rx.run() is linkrx.End.STOPPED
        assert list(rx) == []
        assert list(rx.batches()) == []
        with pytest.raises(EOFError, match="stop"):
            rx.recv()
    assert got == []


def test_ctrl_c_in_a_wait_raises_at_once() -> None:
    """SIGINT during a wait raises KeyboardInterrupt in the program, and the dispatcher still closes cleanly."""
    program = """
import os, signal, socket, threading, linkrx
receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
# A parent that ignores SIGINT, as a shell does for background jobs, hands that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
with linkrx.open(receiver) as rx:
    def press(*_):
        # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
        if rx.stats().waits:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        rx.recv()
    except KeyboardInterrupt:
        print("interrupted", rx.end)
"""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "interrupted None\n"
    assert result.returncode == 0


# Calls from deliver, mixed calls, and close.


def test_receiving_from_inside_deliver_is_refused(ends: Pair) -> None:
    """A deliver that receives from its own dispatcher raises Busy out of dispatch, and later packets are not lost."""
    got: list[int] = []

    def deliver(_r: object, _l: object, _p: int, packet: linkrx.Packet) -> None:
        got.append(number_of(packet))
        if len(got) == 1:
            rx.drain()

    with linkrx.open(ends[0], deliver) as rx:
        for number in range(3):
            ends[1].send(frame(number))
        with pytest.raises(linkrx.Busy, match="inside deliver"):
            rx.dispatch()
        assert rx.drain() == 2
    assert got == [0, 1, 2]


def test_calls_inside_deliver(ends: Pair) -> None:
    """Inside deliver the calls that the message of Busy names work, and every call that receives raises it."""
    calls: dict[str, Callable[[], object]] = {
        "send": lambda: rx.send(frame(1)),
        "send_batch": lambda: rx.send_batch([frame(1)]),
        "set_filter": lambda: rx.set_filter(None),
        "stats": lambda: rx.stats(),
        "stop": lambda: rx.stop(flush=True),
        "close": lambda: rx.close(),
    }
    named: set[str] = set()

    def deliver(*_: object) -> None:
        for receive in (rx.dispatch, rx.drain, rx.run, rx.recv, rx.__next__, rx.batches().__next__):
            with pytest.raises(linkrx.Busy) as caught:
                receive()
            named.update(re.findall(r"(\w+)\(\)", str(caught.value)))
        for call in calls.values():
            call()

    rx = linkrx.open(ends[0], deliver)
    ends[1].send(frame(0))
    assert rx.dispatch(PATIENCE) is False
    assert named == set(calls)


def test_ways_to_receive_can_be_mixed(ends: Pair) -> None:
    """recv, iteration, batches and dispatch can be mixed, and receive one stream in order."""
    got: list[int] = []
    with linkrx.open(ends[0], lambda *call: got.append(number_of(call[3]))) as rx:
        for number in range(20):
            ends[1].send(frame(number))
        got.append(number_of(rx.recv()))
        for packet in rx:
            got.append(number_of(packet))
            if len(got) == 5:
                break
        got += [number_of(packet) for packet in next(rx.batches())][:15]
        for number in range(20, 25):
            ends[1].send(frame(number))
        got.append(number_of(rx.recv()))
        assert rx.dispatch()
    assert got == list(range(25))


def test_without_deliver_dispatch_says_what_to_do(ends: Pair) -> None:
    """Without a deliver, dispatch, drain and run raise an error that says so."""
    with linkrx.open(ends[0]) as rx:
        for method in (rx.dispatch, rx.drain, rx.run):
            with pytest.raises(linkrx.LinkrxError, match="pass deliver="):
                method()


def test_closing_is_final_and_idempotent(ends: Pair) -> None:
    """After close every method raises Closed, stop and close do nothing, and attributes stay readable."""
    rx = linkrx.open(ends[0], ignore)
    ends[1].send(frame(1))
    kept = rx.recv()
    rx.close()
    rx.close()
    rx.stop()
    for use in (
        rx.dispatch,
        rx.drain,
        rx.run,
        rx.recv,
        rx.batches,
        rx.fileno,
        rx.stats,
        rx.__enter__,
        lambda: next(iter(rx)),
    ):
        with pytest.raises(linkrx.Closed):
            use()
    assert number_of(kept) == 1
    assert rx.backend in BACKENDS
    assert rx.choice.backend == rx.backend
    assert rx.capabilities.kind == "unix_dgram"
    assert ends[0].fileno() >= 0
    assert "closed" in repr(rx)


def test_close_inside_an_iteration(ends: Pair) -> None:
    """If the body of an iteration closes the dispatcher, the next step raises Closed, also if a packet was received."""
    rx = linkrx.open(ends[0])
    for number in range(3):
        ends[1].send(frame(number))
    got = []
    with pytest.raises(linkrx.Closed):
        for packet in rx:
            got.append(number_of(packet))
            rx.close()
    assert got == [0]


def test_close_from_inside_deliver(ends: Pair) -> None:
    """If deliver closes its dispatcher, dispatch returns False and nothing more is delivered."""
    got: list[object] = []

    def deliver(*call: object) -> None:
        got.append(call)
        rx.close()

    rx = linkrx.open(ends[0], deliver)
    for number in range(3):
        ends[1].send(frame(number))
    assert rx.dispatch() is False
    assert len(got) == 1


def test_the_source_object_is_kept_alive() -> None:
    """A socket that only linkrx refers to is not closed while linkrx receives from it."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, linkrx.open(receiver) as rx:
        held = receiver
        del receiver
        gc.collect()
        sender.send(frame(3))
        assert number_of(rx.recv(10)) == 3
        held.close()


def test_a_borrowed_socket_gets_its_options_back(ends: Pair) -> None:
    """close restores the options of a borrowed socket. linkrx never changes O_NONBLOCK."""
    receiver = ends[0]
    size = receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    with linkrx.open(receiver, receive_buffer=3 * size) as rx:
        assert receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > size
        assert os.get_blocking(receiver.fileno())
        with pytest.raises(TimeoutError):
            rx.recv(0)
    assert receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == size


def test_a_closed_descriptor_is_an_error_that_names_the_source() -> None:
    """Receiving from a descriptor that its owner closed raises OSError, which names source and backend."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, linkrx.open(receiver, ignore) as rx:
        receiver.close()
        with pytest.raises(OSError, match=f"AF_UNIX datagram socket with {rx.backend}: Bad file descriptor"):
            rx.dispatch(1)


def test_open_that_fails_leaves_nothing_behind(ends: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step of open fails, the earlier steps are undone."""
    receiver = ends[0]
    size = receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    before = sorted(os.listdir("/proc/self/fd"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    for target in (
        "linkrx.receiving.wakeup.EventFd.__init__",
        "select.epoll",
        "linkrx.receiving.reception.Reception._prepare",
        "linkrx.receiving.reception.Reception._use",
        "linkrx.receiving.reception.Reception._build",
        "linkrx.sources.source.Source.link_state",
        "linkrx.factory.decide",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            with pytest.raises(OSError, match="Too many open files"):
                linkrx.open(receiver, receive_buffer=3 * size)
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == size


# Delivery.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ethernet", [True, False])
@pytest.mark.parametrize("size", [100, 1000])
def test_upstream_delivery(backend: str, ethernet: bool, size: int) -> None:
    """A packet of random bytes is delivered once, with the fields of its Ethernet header, or as IPv4 without one."""
    payload = b"\x40" + os.urandom(size - 1)
    calls: list[tuple[bytes | None, bytes | None, int, linkrx.Packet]] = []
    with pair() as (receiver, sender):
        with linkrx.open(receiver, lambda *c: calls.append(c), backend=backend, ethernet=ethernet) as rx:
            sender.send((LOCAL + REMOTE + b"\x86\xdd" if ethernet else b"") + payload)
            assert rx.dispatch() is True
        ((remote, local, protocol, packet),) = calls
        assert (remote, local, protocol) == ((REMOTE, LOCAL, 0x86DD) if ethernet else (None, None, 0x0800))
        assert len(packet.link_header) == (14 if ethernet else 0)
        assert bytes(packet.data) == payload


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_short_body(backend: str) -> None:
    """A datagram of an Ethernet header and four bytes is delivered once, with a payload of four bytes."""
    calls: list[tuple[object, object, int, linkrx.Packet]] = []
    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, lambda *c: calls.append(c), backend=backend) as rx,
    ):
        sender.send(HEADER + b"body")
        assert rx.dispatch() is True
        ((_, _, _, packet),) = calls
        assert (len(packet.link_header), bytes(packet.data)) == (14, b"body")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ip_packets_with_almost_nothing_behind_the_header(backend: str) -> None:
    """Without Ethernet a packet of at least one byte is delivered if its first nibble is 4 or 6."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, ethernet=False) as rx:
        for size in range(1, 25):
            for version, protocol in ((0x45, 0x0800), (0x60, 0x86DD)):
                sender.send(bytes([version]) + bytes(size - 1))
                packet = rx.recv(10)
                assert (packet.protocol, len(packet), packet.remote, packet.local) == (
                    protocol,
                    size,
                    None,
                    None,
                )


@pytest.mark.parametrize("backend", BACKENDS)
def test_virtio_net_header_is_kept(backend: str) -> None:
    """packet.vnet is the header that was stripped. A message that is not longer than the header counts as empty."""
    header = bytes([1, 4]) + b"".join(n.to_bytes(2, "little") for n in (66, 1448, 34, 16)) + b"\x00\x00"
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, vnet_header=12) as rx:
        sender.send(header)
        sender.send(header[:5])
        sender.send(header + frame(5))
        packet = rx.recv(10)
        assert number_of(packet) == 5
        assert packet.vnet == linkrx.VnetHeader(1, 4, 66, 1448, 34, 16)
        assert packet.vnet.needs_checksum
        assert packet.vnet.super_packet
        assert rx.stats().empty == 2
        assert packet.copy().vnet == packet.vnet


def test_interpreter_exit_with_a_thread_inside_run() -> None:
    """A program that ends while a daemon thread is inside run() exits at once, with its own status."""
    program = """
import socket, threading, linkrx
receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
rx = linkrx.open(receiver, lambda *_: None)
threading.Thread(target=rx.run, daemon=True).start()
while not rx.stats().waits:
    pass
raise SystemExit(7)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (7, "")
