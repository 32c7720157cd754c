"""Checks of exceptions, signals, second threads, forks and garbage collection during reception."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from itertools import takewhile
from types import CodeType, FrameType

from linkrx.errors import Busy, Closed
from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.testing.packets import sample
from linkrx.testing.resources import descriptors
from linkrx.testing.rigs import Rig
from linkrx.testing.stops import alarmed, ignore
from linkrx.testing.waiting import PATIENCE, asleep, collect, flooded, number_of, patiently, running, until


class Interrupted(Exception):
    """The exception that the checks raise in deliver and in signal handlers."""


def check_raising(rig: Rig, backend: str) -> None:
    """An exception of deliver comes out of dispatch. No packet is lost or delivered twice."""
    sent = sample(rig, 12)
    for every in (1, 2, 3, len(sent)):
        got: list[bytes] = []

        def deliver(
            _remote: object,
            _local: object,
            _protocol: int,
            packet: Packet,
            into: list[bytes] = got,
            every: int = every,
        ) -> None:
            into.append(bytes(packet))
            if len(into) % every == 0:
                raise Interrupted

        raised = 0
        with rig.open(backend, deliver) as rx:
            for frame in sent:
                rig.send(frame)
            for _ in patiently(lambda got=got: len(got) >= len(sent)):  # type: ignore[misc]
                try:
                    rx.dispatch(PATIENCE)
                except Interrupted:
                    raised += 1
            assert rx.stats().packets == len(sent)
        assert got == sent
        assert raised == len(sent) // every


def check_interrupted_wait(rig: Rig, backend: str) -> None:
    """An exception of a signal handler ends a wait at once. Reception goes on after it."""

    def interrupt(frame: FrameType | None) -> None:
        if is_inside(rx, frame, ignore.__code__):
            raise Interrupted

    with rig.open(backend, ignore) as rx:
        for way in (rx.run, rx.recv, lambda: next(rx.batches()), lambda: next(iter(rx))):
            try:
                # Repeat the signal: the first may come just before the system call, when Python runs no handler before it.
                with alarmed(interrupt, first=0.002, interval=0.01):
                    way()
            except Interrupted:
                continue
            raise AssertionError("the signal handler's exception did not end the wait")
        sent = sample(rig, 3)
        for frame in sent:
            rig.send(frame)
        assert [bytes(packet) for packet in collect(rx, 3)] == sent


def check_interrupted_flood(rig: Rig, backend: str) -> None:
    """In a flood every exception of a signal handler is raised, and every packet comes once and in order."""
    got: list[int] = []
    raised = caught = 0

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(number_of(rig, packet))

    def interrupt(frame: FrameType | None) -> None:
        nonlocal raised
        if is_inside(rx, frame, deliver.__code__):
            raised += 1
            raise Interrupted

    with flooded(rig), rig.open(backend, deliver) as rx:
        with alarmed(interrupt, first=0.0005, interval=0.0005):
            for _ in patiently(lambda: raised >= 30 and len(got) >= 100):
                try:
                    rx.dispatch(PATIENCE)
                except Interrupted as error:
                    # An exception may be raised while another is handled.
                    while isinstance(error, Interrupted):
                        caught += 1
                        error = error.__context__  # type: ignore[assignment]
        assert caught == raised
        rx.stop()
        assert rx.dispatch() is False
        assert got == sorted(set(got))
        assert rx.stats().packets == len(got)


def is_inside(rx: Dispatcher, frame: FrameType | None, deliver: CodeType) -> bool:
    """Whether a signal handler runs inside linkrx, while this thread receives.

    False inside that deliver. False inside a generator, which may be closing, and inside `__del__`: Python prints exceptions that
    are raised there, and drops them.
    """
    # False inside code that is not linkrx's, such as callbacks of the garbage collector, which drop exceptions too.
    if (
        frame is None
        or not frame.f_globals.get("__name__", "").startswith("linkrx")
        or rx._thread != threading.get_ident()
        or frame.f_code.co_flags & inspect.CO_GENERATOR
    ):
        return False
    stack = [entry.f_code for entry, _ in traceback.walk_stack(frame)]
    # False inside another signal handler, which may run inside such a callback.
    handlers = {
        entry.f_code for entry in takewhile(lambda entry: entry is not frame, _frames(sys._getframe()))
    }
    return (
        deliver not in stack
        and handlers.isdisjoint(stack)
        and "__del__" not in [code.co_name for code in stack]
    )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def check_signals(rig: Rig, backend: str) -> None:
    """Signals whose handlers return end no wait and lose no packet."""
    hits: list[int] = []

    def send_later() -> None:
        until(lambda: asleep(rx))
        before = len(hits)
        until(lambda: len(hits) > before + 10)
        rig.send(rig.frame(100))

    with rig.open(backend, ignore) as rx, alarmed(lambda _: hits.append(1), first=0.0005, interval=0.0005):
        with running(send_later):
            assert rx.dispatch(PATIENCE) is True
        assert (rx.stats().packets, rx.stats().waits) == (1, 1)
        sent = sample(rig, 16)
        for _ in range(20):
            for frame in sent:
                rig.send(frame)
            assert [bytes(packet) for packet in collect(rx, len(sent))] == sent
        assert rx.end is None


def check_second_thread(rig: Rig, backend: str) -> None:
    """While one thread waits, a second one that receives gets Busy. The first one goes on."""
    got: list[bytes] = []
    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet))) as rx, running(rx.run):
        try:
            until(lambda: asleep(rx))
            for use in (
                lambda: rx.dispatch(0),
                rx.drain,
                lambda: rx.recv(0),
                lambda: next(rx.batches(0)),
            ):
                try:
                    use()
                except Busy:
                    continue
                raise AssertionError("a second thread could receive")
            rig.send(rig.frame(100))
            until(lambda: got)
        finally:
            rx.stop()
    assert got == [rig.frame(100)]


def check_fork(rig: Rig, backend: str) -> None:
    """A forked child can only close, and its kept packets stay valid. The parent goes on receiving."""
    with rig.open(backend, ignore) as rx:
        rig.send(rig.frame(100, 1))
        held = rx.recv(PATIENCE)
        child = os.fork()
        if child == 0:  # pragma: no cover, another process
            os._exit(_close_in_child(rx, held, rig.frame(100, 1)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert rx.end is None
        rig.send(rig.frame(100, 2))
        assert bytes(rx.recv(PATIENCE)) == rig.frame(100, 2)
        assert bytes(held) == rig.frame(100, 1)


def _close_in_child(rx: Dispatcher, held: Packet, frame: bytes) -> int:  # pragma: no cover, another process
    """The exit status of the child: 0 if the check holds."""
    for use in (rx.drain, rx.recv, rx.fileno, rx.stats):
        try:
            use()
        except Closed:
            continue
        except BaseException:
            return 1
        return 2
    rx.stop()
    rx.close()
    return 0 if bytes(held) == frame else 3


def check_collected(rig: Rig, backend: str) -> None:
    """An unclosed dispatcher that is collected gives a ResourceWarning and closes its descriptors. Packets stay valid."""
    before = descriptors()
    rx = rig.open(backend)
    rig.send(rig.frame(100))
    held = rx.recv(PATIENCE)
    shown = repr(rx)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del rx
        gc.collect()
    assert [str(one.message) for one in caught if one.category is ResourceWarning] == [f"unclosed {shown}"]
    assert descriptors() == before
    assert bytes(held) == rig.frame(100)
