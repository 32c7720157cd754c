"""Checks of what interrupts reception without ending it: exceptions, signals, other threads, forks, collection."""

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
    """What a deliver or a signal handler raises."""


def check_raising(rig: Rig, backend: str) -> None:
    """What deliver raises comes out of dispatch, on whichever packet; none is lost or delivered twice for it."""
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
    """A signal handler that raises ends a wait with its exception, at once, and reception goes on behind it."""

    def interrupt(frame: FrameType | None) -> None:
        if is_inside(rx, frame, ignore.__code__):
            raise Interrupted

    with rig.open(backend, ignore) as rx:
        for way in (rx.run, rx.recv, lambda: next(rx.batches()), lambda: next(iter(rx))):
            try:
                # Again and again: the first may come just before the system call that waits, where Python runs no
                # handlers any more, or upon something else.
                with alarmed(interrupt, first=0.002, interval=0.01):
                    way()
            except Interrupted:
                continue
            raise AssertionError("the exception did not come out")
        sent = sample(rig, 3)
        for frame in sent:
            rig.send(frame)
        assert [bytes(packet) for packet in collect(rx, 3)] == sent


def check_interrupted_flood(rig: Rig, backend: str) -> None:
    """In a flood exceptions from a signal handler come out every time, and every packet comes once and in order."""
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
                    # One may come upon the handling of another.
                    while isinstance(error, Interrupted):
                        caught += 1
                        error = error.__context__  # type: ignore[assignment]
        assert caught == raised
        rx.stop()
        assert rx.dispatch() is False
        assert got == sorted(set(got))
        assert rx.stats().packets == len(got)


def is_inside(rx: Dispatcher, frame: FrameType | None, deliver: CodeType) -> bool:
    """Whether a signal came upon a call of this thread that receives.

    Not upon that deliver: what that raises is another matter. Not upon a generator, which may be being closed, nor upon a
    `__del__`: exceptions in those are reported by Python, and lost.
    """
    # Nor upon what others have the interpreter call, as the collector's callbacks are: those swallow exceptions.
    if (
        frame is None
        or not frame.f_globals.get("__name__", "").startswith("linkrx")
        or rx._thread != threading.get_ident()
        or frame.f_code.co_flags & inspect.CO_GENERATOR
    ):
        return False
    stack = [entry.f_code for entry, _ in traceback.walk_stack(frame)]
    # Nor upon another signal's handler, which may have come upon such a callback.
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
    """Signals whose handlers return end no wait and cost no packet, however many come."""
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
    """While one thread waits, another that wants to receive gets Busy, and the first goes on undisturbed."""
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
                raise AssertionError("a second thread came in")
            rig.send(rig.frame(100))
            until(lambda: got)
        finally:
            rx.stop()
    assert got == [rig.frame(100)]


def check_fork(rig: Rig, backend: str) -> None:
    """A forked child may only close, and still sees what it holds; the parent goes on undisturbed, also while it waits."""
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
    """The exit status: 0 when all is as it should be."""
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
    """A dispatcher that nobody closed warns when it is collected, releases everything, and leaves packets valid."""
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
