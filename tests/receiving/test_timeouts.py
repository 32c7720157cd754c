"""Timeouts of receiving calls, and the waits of `latency`."""

from __future__ import annotations

import signal
import threading

import pytest
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timeout", [1e-9, 5e-324])
def test_a_tiny_timeout_returns_a_queued_packet(backend: str, timeout: float) -> None:
    """A queued packet is received with any positive timeout, however often the source was empty before."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend) as rx:
        for number in range(50):
            for _ in range(number):
                with pytest.raises(TimeoutError):
                    rx.recv(0.000_01)
            sender.send(frame(number))
            assert number_of(rx.recv(timeout)) == number


@pytest.mark.parametrize("backend", BACKENDS)
def test_latency_waits_no_longer_than_the_timeout(backend: str) -> None:
    """A packet that comes while recv waits is returned at recv's timeout, even if `latency` is longer."""
    with pair() as (receiver, sender), linkrx.open(receiver, backend=backend, latency=1e9) as rx:
        for number in range(3):
            later = threading.Timer(0.02, sender.send, (frame(number),))
            later.start()
            assert number_of(rx.recv(0.2)) == number
            later.join()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_and_a_handler_end_the_wait_of_latency(backend: str) -> None:
    """stop() and an exception of a signal handler end the wait of `latency`, however long `latency` is."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    with (
        pair() as (receiver, sender),
        linkrx.open(receiver, lambda *_: None, backend=backend, latency=1e9) as rx,
    ):
        for _ in range(60):  # linkrx then waits before it reads
            rx.dispatch(0.000_01)
        sender.send(frame(0))
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                for _ in range(2):
                    rx.dispatch()
                    sender.send(frame(1))
        finally:
            signal.signal(signal.SIGALRM, before)
        later = threading.Timer(0.1, rx.stop)
        later.start()
        assert rx.run() is linkrx.End.STOPPED
        later.join()
