"""Timeouts of receiving calls, and the waits of `latency`."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx
from linkrx.testing.stops import alarmed
from linkrx.testing.waiting import running, until


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timeout", [1e-9, 5e-324])
def test_a_tiny_timeout_returns_a_queued_packet(backend: str, timeout: float) -> None:
    """A queued packet is received with any positive timeout, however often the source was empty before."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend) as rx:
        for number in (*range(6), 31, 32, 49):  # MOST_HOLD of _core/types/types.h is 31
            for _ in range(number):
                with pytest.raises(TimeoutError):
                    rx.recv(0.000_01)
            sender.send(frame(number))
            assert number_of(rx.recv(timeout)) == number


@pytest.mark.parametrize("backend", BACKENDS)
def test_latency_waits_no_longer_than_the_timeout(backend: str) -> None:
    """A packet that comes while recv waits is returned at recv's timeout, even if `latency` is longer."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e9) as rx:
        sent: list[float] = []

        def send(number: int, waits: int) -> None:
            until(lambda: rx.stats().waits > waits)
            sender.send(frame(number))
            sent.append(time.monotonic())

        for number in range(3):
            sent.clear()
            got: list[int] = []
            with running(partial(send, number, rx.stats().waits)):
                while not got:
                    end = time.monotonic() + 0.2
                    try:
                        got.append(number_of(rx.recv(0.2)))
                    except TimeoutError:  # the other thread may have got no turn in that time
                        assert not sent or sent[0] >= end
            assert got == [number]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_and_a_handler_end_the_wait_of_latency(backend: str) -> None:
    """stop() and an exception of a signal handler end the wait of `latency`, however long `latency` is."""

    class Interrupt(Exception):
        pass

    interrupted: list[bool] = []

    def interrupt(_: object) -> None:
        if not interrupted:
            interrupted.append(True)
            raise Interrupt

    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, lambda *_: None, backend=backend, latency=1e9) as rx,
    ):
        for _ in range(60):  # linkrx then waits before it reads
            rx.dispatch(0.000_01)
        sender.send(frame(0))
        # Repeated, because Python handles a signal that comes just before the waiting system call only when that returns.
        with pytest.raises(Interrupt), alarmed(interrupt, first=0.1, interval=0.1):
            for _ in range(2):
                rx.dispatch()
                sender.send(frame(1))
        later = threading.Timer(0.1, rx.stop)
        later.start()
        assert rx.run() is linkrx.End.STOPPED
        later.join()
