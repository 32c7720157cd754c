"""close() in several threads, in a forked child, and on a dispatcher that was never opened."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.captures import pcap
from support.interruptions import Acting
from support.pairs import frame, pair
from support.received import needs_core
from support.run import points

import linkrx


def test_threads_that_close_at_once() -> None:
    """Each of two close() calls at once returns after everything is released, while another thread receives."""
    for _ in range(200):
        with pair() as (receiver, _):
            rx = linkrx.open(receiver, lambda *_: None)
            together = threading.Barrier(3)
            released: list[bool] = []

            def close(
                rx: linkrx.Dispatcher = rx,
                together: threading.Barrier = together,
                released: list[bool] = released,
            ) -> None:
                together.wait()
                rx.close()
                released.append(rx._released)

            def dispatch(rx: linkrx.Dispatcher = rx, together: threading.Barrier = together) -> None:
                together.wait()
                try:
                    rx.dispatch(0)
                except (linkrx.Closed, linkrx.Busy):
                    return

            threads = [threading.Thread(target=step, daemon=True) for step in (close, close, dispatch)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert released == [True, True]


def test_a_dispatcher_that_was_never_opened() -> None:
    """Every member of a dispatcher that was never opened raises a Python exception or returns; none crashes the process."""
    arguments: tuple[tuple[Any, ...], ...] = ((), (0,), (b"",), (0, None), (b"", False, -1.0))
    for name in dir(linkrx.Dispatcher):
        if name.startswith("__"):
            continue
        for given in arguments:
            made = linkrx.Dispatcher.__new__(linkrx.Dispatcher)
            try:
                member = getattr(made, name)
                if callable(member):
                    member(*given)
            except (TypeError, ValueError, AttributeError, IndexError, linkrx.LinkrxError):
                continue


def test_a_child_that_closes_inside_deliver_leaves_other_files_alone(tmp_path: Path) -> None:
    """After a child forked inside deliver has closed its dispatcher, linkrx does not write to files that reuse its descriptors."""
    forked = False
    files: list[int] = []
    with pair() as (receiver, sender):

        def deliver(*_: object) -> None:
            nonlocal forked
            forked = os.fork() == 0
            if forked:
                rx.close()
                files.extend(os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(8))

        rx = linkrx.open(receiver, deliver)
        rx.fileno()
        sender.send(frame(0))
        try:
            rx.dispatch()
        finally:
            if forked:
                os._exit(any(os.fstat(file).st_size for file in files))
        _, status = os.wait()
        rx.close()
    assert os.waitstatus_to_exitcode(status) == 0


def a_ring() -> linkrx.Dispatcher:
    """A dispatcher whose C state close() frees."""
    return linkrx.open("lo", backend="packet_mmap", receive_buffer=1 << 18)


def a_file() -> linkrx.Dispatcher:
    """Another one, with names of interfaces."""
    return linkrx.open(linkrx.CaptureFile(io.BytesIO(pcap([]))))


CALLS: dict[str, Callable[[linkrx.Dispatcher], object]] = {
    "stats": lambda rx: rx.stats(),
    "fileno": lambda rx: rx.fileno(),
    "interface_name": lambda rx: rx.interface_name(1),
    "set_filter": lambda rx: rx.set_filter("ip"),
    "repr": repr,
    "stop": lambda rx: rx.stop(flush=True),
}


@needs_core
@pytest.mark.samples
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [a_ring, a_file])
def test_close_in_the_middle_of_another_call(make: Callable[[], linkrx.Dispatcher], call: str) -> None:
    """If close() comes at any point of a call that receives nothing, the call returns or raises Closed."""
    for point in points(5000):
        rx = make()
        acting = Acting(point, rx.close)
        try:
            with acting:
                CALLS[call](rx)
        except linkrx.Closed:
            assert acting.raised
        rx.close()
        if not acting.raised:
            break
    assert not acting.raised


@needs_core
@pytest.mark.samples
@pytest.mark.usefixtures("devices")
def test_a_ring_is_replaced_in_the_middle_of_stats() -> None:
    """If another thread replaces a ring by the next backend at any point of stats(), it returns the counters."""
    for point in points(5000):
        with linkrx.open("lo", receive_buffer=1 << 18) as rx:
            assert rx.backend == "packet_mmap"
            acting = Acting(point, lambda rx=rx: rx._demote(OSError(errno.ENOSYS, "refused")))  # type: ignore[misc]
            with acting:
                assert rx.stats().kernel_drops == 0
        if not acting.raised:
            break
    assert not acting.raised
