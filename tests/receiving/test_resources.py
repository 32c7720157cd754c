"""Resources: thousands of cycles leak nothing, and an open that fails at any step leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

import pytest
from pyroute2 import IPRoute
from support.run import points, that_take

import linkrx
from linkrx.kernel import libc
from linkrx.sources.settings import Undo
from linkrx.testing import rigs
from linkrx.testing.resources import descriptors, settings_of

BACKENDS = that_take("unix_dgram")
CYCLES = 3000
PACKET_VERSION = 10  # linux/if_packet.h


class Failed(Exception):
    """The exception that a step of open is made to raise."""


THROUGH_CTYPES = [
    function.__code__
    for function in (libc.SocketOptions.get, libc.SocketOptions.set, libc.timerfd, libc.set_timerfd)
]


class FailingStep:
    """Inside `with`, the n-th call into C raises Failed instead of running.

    Calls that close, and calls that register a cleanup, cannot fail.
    """

    def __init__(self, step: int) -> None:
        self.left = step
        self.reached = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        # The profiler does not see ctypes' calls into C. The Python function around such a call fails instead.
        if event == "call" and frame.f_code in THROUGH_CTYPES:
            event = "c_call"
        if event != "c_call" or getattr(argument, "__name__", "") in ("setprofile", "close"):
            return
        if frame.f_code.co_filename == contextlib.__file__ or frame.f_code is Undo.add.__code__:
            return
        if not self.left:
            self.reached = True
            raise Failed
        self.left -= 1

    def __enter__(self) -> Self:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


@contextmanager
def collected() -> Iterator[None]:
    """Collect before, and disable collection inside, so that no unrelated `__del__` fails."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


KINDS = [rigs.unix_dgram, rigs.tap, rigs.interface, rigs.packet, rigs.packet_segment]


@pytest.mark.samples
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        pytest.param(backend, kind, id=f"{backend}-{kind.__name__}")
        for kind in KINDS
        for backend in that_take(kind.__name__.replace("interface", "packet").removesuffix("_segment"))
    ],
)
def test_a_failed_open_leaves_nothing(backend: str, kind: rigs.MakeRig) -> None:
    """If any call of open fails, no descriptor, thread, ring, membership or option is left."""
    options = {} if kind is rigs.tap else {"receive_buffer": 123_456}
    if kind in (rigs.interface, rigs.packet, rigs.packet_segment):
        options |= {"promiscuous": True}
    with kind() as rig, IPRoute() as route, collected():
        settings = settings_of(rig.source)
        rig.open(backend, **options).close()  # imports modules and fills caches
        before, threads = descriptors(), threading.active_count()
        for step in points(5000):
            with FailingStep(step) as failing:
                try:
                    opened = rig.open(backend, **options)
                except Failed:
                    opened = None
            if opened is not None:
                opened.close()
            assert descriptors() == before, f"step {step} leaks"
            assert threading.active_count() == threads
            assert settings_of(rig.source) == settings, f"step {step} changed an option for good"
            assert "socket:[" not in Path("/proc/self/maps").read_text(), f"step {step} leaves a ring mapped"
            if "promiscuous" in options:
                assert rig.device is not None
                assert route.get_links(rig.device.index)[0].get("promiscuity") == 0
            if not failing.reached:
                break
        assert step > 50
        assert not failing.reached, "open never ends"


def resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.repeats
@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_dispatchers(backend: str) -> None:
    """Opening, receiving and closing thousands of times leaks no descriptor, thread or memory."""
    with rigs.unix_dgram() as rig:

        def cycle() -> None:
            with rig.open(backend) as rx:
                rig.send(rig.frame(100))
                assert len(rx.recv(0)) == 100

        for _ in range(300):
            cycle()
        before, threads, memory = descriptors(), threading.active_count(), resident()
        for _ in range(CYCLES):
            cycle()
        gc.collect()
        assert descriptors() == before
        assert threading.active_count() == threads
        # A leak of a small object each would be 8 MB, of an arena each 1.5 GB.
        assert resident() - memory < 2_000_000


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        (backend, kind)
        for kind in KINDS
        for backend in that_take(kind.__name__.replace("interface", "packet").removesuffix("_segment"))
    ],
)
def test_a_dispatcher_refers_to_nothing_that_refers_to_it(backend: str, kind: rigs.MakeRig) -> None:
    """A closed dispatcher without references is freed at once, with its arenas, without a collection."""
    with kind() as rig, collected():
        with rig.open(backend) as rx:
            rig.send(rig.frame(100))
            assert len(rx.recv(10)) == 100
        alive = weakref.ref(rx)
        del rx
        assert alive() is None


@pytest.mark.repeats
@pytest.mark.usefixtures("devices")
def test_hundreds_of_queues() -> None:
    """Opening, receiving from and closing TAP queues hundreds of times leaks no descriptor or memory."""

    def cycle(name: str) -> None:
        with linkrx.TunTap(name) as queue, linkrx.open(queue) as rx:
            assert list(rx.batches(0)) == []

    for number in range(50):
        cycle(f"cyc{number % 2}")
    before, memory = descriptors(), resident()
    for number in range(300):
        cycle(f"cyc{number % 2}")
    assert descriptors() == before
    assert resident() - memory < 2_000_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_descriptors_left(backend: str) -> None:
    """If any descriptor of open exceeds the limit, open raises EMFILE and leaves nothing. It works after the limit is raised."""
    with rigs.unix_dgram() as rig:
        rig.open(backend).close()
        before = descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.dup(0))
        failures: list[int | None] = []
        try:
            for more in range(6):
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
                try:
                    rig.open(backend).close()
                except OSError as error:
                    failures.append(error.errno)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # The source's duplicate, the eventfd, the epoll instance and the timer.
        assert failures == [errno.EMFILE] * 4
        assert descriptors() == before
        with rig.open(backend) as rx:
            rig.send(rig.frame(100))
            assert len(rx.recv(0)) == 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory_may_be_locked(backend: str) -> None:
    """linkrx locks no memory, so RLIMIT_MEMLOCK, which applies to all users but root, has no effect."""
    with rigs.unix_dgram() as rig, rig.open(backend) as rx:
        rig.send(rig.frame(100))
        assert len(rx.recv(0)) == 100
        assert "VmLck:\t       0 kB" in Path("/proc/self/status").read_text()
