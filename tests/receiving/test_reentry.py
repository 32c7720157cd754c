"""Calls from signal handlers, other threads and forked children while a dispatcher receives."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from support.children import child
from support.pairs import BACKENDS, Pair, frame, number_of, pair

import linkrx
from linkrx.testing.waiting import asleep, running


@contextmanager
def alarms(handler: Callable[[], object], interval: float) -> Iterator[None]:
    """Call `handler` in a signal handler, periodically."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def ends() -> Iterator[Pair]:
    """A datagram pair."""
    with pair() as found:
        yield found


@pytest.mark.parametrize("backend", BACKENDS)
def test_receiving_from_a_signal_handler(backend: str) -> None:
    """A signal handler that drains gets Busy while its thread receives, and every packet is delivered once, in order."""
    total = 20_000
    got: list[int] = []
    refused = 0
    with pair(socket.SOCK_SEQPACKET) as (receiver, sender):

        def send() -> None:
            for number in range(total):
                sender.send(frame(number))

        with (
            linkrx.open(receiver, lambda *call: got.append(number_of(call[3])), backend=backend) as rx,
            running(send),
        ):

            def drain() -> None:
                nonlocal refused
                try:
                    rx.drain()
                except linkrx.Busy:
                    refused += 1

            with alarms(drain, 0.0003):
                while len(got) < total:
                    rx.dispatch(0.01)
    assert got == list(range(total))
    assert refused > 0


def test_recv_passes_every_interrupt_on(ends: Pair) -> None:
    """Each exception that a signal handler raises inside recv propagates out of recv."""

    class Interrupt(Exception):
        pass

    raised = seen = 0

    def interrupt() -> None:
        nonlocal raised
        raised += 1
        raise Interrupt

    def receive() -> None:
        # Not in the try below: CPython 3.13.0 does not cover the jump back of a loop in there.
        while raised == seen:
            # A signal just before the system call that waits is handled after the wait.
            with suppress(TimeoutError):
                rx.recv(0.01)

    with linkrx.open(ends[0]) as rx:
        for _ in range(300):
            for number in range(20):
                ends[1].send(frame(number))
            with alarms(lambda: None, 10):
                before = signal.signal(signal.SIGALRM, lambda *_: interrupt())
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.00005)
                    receive()
                except Interrupt:
                    seen += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, before)
            with suppress(TimeoutError):
                while True:
                    rx.recv(0)
    assert raised == seen == 300


def test_two_threads_that_both_receive_share_without_a_repeat(ends: Pair) -> None:
    """Threads that call recv at once get Busy, or packets that no other thread gets."""
    total = 5_000
    got: list[int] = []
    done = threading.Event()

    def send() -> None:
        for number in range(total):
            ends[1].send(frame(number))

    with linkrx.open(ends[0]) as rx:

        def receive() -> None:
            while not done.is_set():
                with suppress(linkrx.Busy, TimeoutError):
                    got.append(number_of(rx.recv(0.01)))
                if len(got) >= total:
                    done.set()

        with running(send), running(receive), running(receive):
            assert done.wait(30)
    assert sorted(got) == list(range(total))


def test_a_stop_during_the_receive_is_seen_before_the_first_deliver(ends: Pair) -> None:
    """After a stop() during a receive, none of the received packets is delivered."""
    got: list[object] = []
    with linkrx.open(ends[0], lambda *call: got.append(call), backend="os_readv") as rx:
        mechanism = rx._mechanism
        fill = mechanism.fill

        def stopped_meanwhile(*arguments: object) -> int:
            count = fill(*arguments)  # type: ignore[arg-type]
            with running(rx.stop):
                return count

        mechanism.fill = stopped_meanwhile  # type: ignore[method-assign, assignment]
        for number in range(3):
            ends[1].send(frame(number))
        assert rx.run() is linkrx.End.STOPPED
        assert got == []
        counted = rx.stats()
        assert (counted.packets, counted.undelivered) == (0, 3)


def test_close_from_a_signal_handler_in_a_wait(ends: Pair) -> None:
    """A signal handler that closes during a wait ends the wait: dispatch returns False, and everything is released."""
    before = len(os.listdir("/proc/self/fd"))
    rx = linkrx.open(ends[0], lambda *_: None)

    def close() -> None:
        if not rx._closed and asleep(rx):  # not before the wait has begun, in which it is to be closed
            rx.close()

    with alarms(close, 0.02):
        assert rx.dispatch(30) is False
    with pytest.raises(linkrx.Closed):
        rx.drain()
    assert len(os.listdir("/proc/self/fd")) == before


def test_undelivered_counts_what_a_backend_still_holds() -> None:
    """After a stop from deliver, every packet that was received from the kernel is delivered or counted."""
    with pair() as (receiver, sender):
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 20)
        receiver.setblocking(False)
        with linkrx.open(receiver, lambda *_: rx.stop()) as rx:
            sent = 0
            sender.setblocking(False)
            with suppress(BlockingIOError):
                while sent < 30:
                    sender.send(bytes(100_000))
                    sent += 1
            rx.run()
            counted = rx.stats()
            left = 0
            with suppress(BlockingIOError):
                while receiver.recv(1):
                    left += 1
            assert counted.packets + counted.undelivered + left == sent > 8


def test_fork_inside_deliver_and_close_in_the_child(ends: Pair) -> None:
    """After a forked child closes, the parent still waits, and the child does not wake it."""

    def deliver(*_: object) -> None:
        with child() as forked:
            if forked:
                rx.close()

    with linkrx.open(ends[0], deliver) as rx:
        ends[1].send(frame(1))
        assert rx.dispatch(10)
        waits = rx.stats().waits
        assert rx.dispatch(0.05)
        assert rx.stats().waits == waits + 1
        assert rx.end is None


def test_a_child_cannot_go_on_with_an_iteration(ends: Pair) -> None:
    """A forked child that continues `for packet in rx` gets Closed, and the parent gets the packets."""
    with linkrx.open(ends[0]) as rx:
        for number in range(3):
            ends[1].send(frame(number))
        packets = iter(rx)
        assert number_of(next(packets)) == 0
        with child() as forked:
            if forked:
                with pytest.raises(linkrx.Closed):
                    next(packets)
        assert [number_of(next(packets)) for _ in range(2)] == [1, 2]


def test_options_are_not_restored_on_a_reused_descriptor() -> None:
    """If the owner has closed its socket and another socket reuses the number, close does not change the other socket."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender:
        usual = receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        with (
            linkrx.open(receiver, receive_buffer=4 * usual),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
        ):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 3 * usual)
            number = receiver.fileno()
            receiver.close()
            os.dup2(other.fileno(), number)
        with socket.socket(fileno=number) as reused:
            assert reused.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > usual


def test_packets_taken_one_by_one_leave_nothing_to_poll(ends: Pair) -> None:
    """fileno() is readable while packets of a batch wait inside linkrx, and not after they are received."""
    with linkrx.open(ends[0], lambda *_: None) as rx:
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        for number in range(3):
            ends[1].send(frame(number))
        assert number_of(rx.recv(0)) == 0
        assert poll.poll(0)
        assert [number_of(rx.recv(0)) for _ in range(2)] == [1, 2]
        assert rx.drain() == 0
        assert not poll.poll(0)


def test_a_wait_sleeps_after_someone_polled(ends: Pair) -> None:
    """After fileno() was called, a blocking recv with an empty queue sleeps once, and does not spin."""
    with linkrx.open(ends[0]) as rx:
        rx.fileno()
        ends[1].send(frame(1))
        assert number_of(rx.recv(1)) == 1
        waits = rx.stats().waits
        with pytest.raises(TimeoutError):
            rx.recv(0.05)
        assert rx.stats().waits == waits + 1
