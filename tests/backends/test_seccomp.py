"""A seccomp filter that is set after open: linkrx works without the refused calls, on every backend and kind of source."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import platform
import select
import socket
import traceback
from collections.abc import Callable, Sequence

import pytest
from support.run import that_take
from support.seccomp import NUMBERS, deny

import linkrx
from linkrx import _core
from linkrx.testing import rigs
from linkrx.testing.rigs import Rig

pytestmark = [
    pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no system call numbers for this machine"),
]

needs_core = pytest.mark.skipif(_core.lib is None, reason="the C core was not built")

PATIENCE = 30.0  # seconds
SHORT = 0.05

TIMERS = ("timerfd_create", "timerfd_settime")
ALL = ("getsockopt", "epoll_ctl", *TIMERS)
# The refused calls: all, each alone, and epoll_ctl(2) with the calls that wait.
REFUSED = {
    "all": ALL,
    "getsockopt": ("getsockopt",),
    "epoll_ctl": ("epoll_ctl",),
    "timerfd": TIMERS,
    "epoll": ("epoll_ctl", "epoll_wait"),
    "preadv2": ("preadv2",),
    # The calls that Docker's filter refuses to a container without capabilities, of those that linkrx or its tests could use.
    "docker": ("unshare", "setns", "mount", "bpf", "perf_event_open"),
}

# Kinds of source, by their rigs.
KINDS = {
    "unix_dgram_ip": "unix_dgram",
    "unix_dgram_vnet": "unix_dgram",
    "pipe_nonblocking": "pipe",
    "tap_blocking": "tap",
    "tap_vnet": "tap",
    "tap_segment": "tap",
    "interface": "packet",
    "packet_segment": "packet",
}

# Without preadv2(2) the backend in Python polls before it reads.
READS = [("preadv2", code, "os_readv") for code in (errno.EPERM, errno.EACCES)]

Ask = Callable[[str], None]


def in_child(rig: Rig, work: Callable[[Ask], None]) -> None:
    """Run `work` in a forked child. The child requests actions on the rig: "down", "up", "delete" or "hang up"."""
    asks, asking = os.pipe()
    done, doing = os.pipe()
    failure_in, failure_out = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover, another process
        os.close(asks)
        os.close(doing)

        def ask(action: str) -> None:
            os.write(asking, action.encode().ljust(8))
            assert os.read(done, 1)

        status = 1
        try:
            work(ask)
            status = 0
        except BaseException:
            os.write(failure_out, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(status)
    for end in (asking, done, failure_out):
        os.close(end)
    try:
        while True:
            assert select.select([asks], [], [], PATIENCE)[0], "the child asks for nothing, and does not end"
            action = os.read(asks, 8).decode().strip()
            if not action:
                break
            if action == "hang up":
                assert rig.hang_up is not None
                rig.hang_up()
            else:
                assert rig.device is not None
                {"down": rig.device.set_down, "up": rig.device.set_up, "delete": rig.device.delete}[action]()
            os.write(doing, b".")
        said = os.read(failure_in, 4000).decode()
    finally:
        for end in (asks, doing, failure_in):
            os.close(end)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert (status, said) == (0, "")


def receive_to_the_end(rig: Rig, backend: str, ask: Ask, refused: Callable[[], None]) -> None:
    """Receive with every call, also after `refused` is set, over a link flap, and to the end of the source."""
    got: list[bytes] = []
    sent: list[bytes] = []

    def send(count: int) -> None:
        for _ in range(count):
            sent.append(rig.frame(100, len(sent)))
            rig.send(sent[-1])

    with rig.open(backend, lambda _r, _l, _p, packet: got.append(bytes(packet))) as rx:
        send(2)
        while len(got) < 2:
            assert rx.dispatch(PATIENCE)
        refused()
        assert rx.dispatch(SHORT)
        send(3)
        while len(got) < 5:
            assert rx.dispatch(PATIENCE)
        send(2)
        got += [bytes(rx.recv(PATIENCE)) for _ in range(2)]
        send(1)
        got += [bytes(packet) for batch in rx.batches(SHORT) for packet in batch]
        poll = select.poll()
        poll.register(rx.fileno(), select.POLLIN)
        send(2)
        while len(got) < 10:
            assert poll.poll(PATIENCE * 1000)
            rx.drain()
        assert rx.drain() == 0
        assert not poll.poll(0)
        rx.stats()
        if rig.device is not None:
            ask("down")
            assert rx.dispatch(SHORT)
            assert rx.dispatch(SHORT)
            ask("up")
            assert rx.dispatch(SHORT)
            send(2)
            while len(got) < 12:
                assert rx.dispatch(PATIENCE)
        assert rx.end is None
        assert rx.backend == backend
        send(1)
        if rig.device is not None:
            ask("delete")
            assert rx.run() is linkrx.End.LINK_GONE
        elif rig.hang_up is not None and rx.capabilities.kind != "unix_dgram":
            rig.hang_up()
            ask("hang up")
            assert rx.run() is linkrx.End.EOF
        else:
            rx.stop(flush=True)
            assert rx.run() is linkrx.End.STOPPED
        assert rx.drain() == 0
        stats = rx.stats()
        assert stats.packets + stats.undelivered == len(got)
    # The kernel may have dropped frames that were in transit when the device was deleted.
    assert got in (sent, sent[:-1] if rig.device is not None else sent)


def cells(makes: tuple[rigs.MakeRig, ...]) -> Sequence[object]:
    """Every backend on every kind of source that it accepts, with the first set of refused calls, and with --all the others."""
    found = []
    for make in makes:
        for backend in that_take(KINDS.get(make.__name__, make.__name__)):
            for what in REFUSED:
                for code in (errno.EPERM, errno.ENOSYS, errno.EACCES):
                    first = (what, code) == ("all", errno.EPERM) or (what, code, backend) in READS
                    name = f"{backend}-{make.__name__}-{what}-{errno.errorcode[code]}"
                    marks = [] if first else [pytest.mark.repeats]
                    found.append(pytest.param(backend, make, what, code, id=name, marks=marks))
    return found


def check_refused(backend: str, make: rigs.MakeRig, what: str, code: int) -> None:
    with make() as rig:
        in_child(rig, lambda ask: receive_to_the_end(rig, backend, ask, lambda: deny(code, *REFUSED[what])))


@pytest.mark.parametrize(("backend", "make", "what", "code"), cells(rigs.PLAIN_RIGS))
def test_refused_after_open(backend: str, make: rigs.MakeRig, what: str, code: int) -> None:
    """Without getsockopt, epoll_ctl and timers, reception continues on the same backend."""
    check_refused(backend, make, what, code)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("backend", "make", "what", "code"), cells(rigs.DEVICE_RIGS))
def test_refused_after_open_on_devices(backend: str, make: rigs.MakeRig, what: str, code: int) -> None:
    """Without these calls, reception survives a link flap, and ends after the device is deleted."""
    check_refused(backend, make, what, code)


class Log(logging.Handler):
    """A log handler that keeps linkrx's messages, except about a missing C core."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        logging.getLogger("linkrx").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        if "C core" not in record.getMessage():
            self.said.append(record.getMessage())


def test_an_event_loop_without_epoll_ctl() -> None:
    """Under asyncio without epoll_ctl packets are received, also after a task has paused, and one warning says that linkrx polls."""

    def work(_: Ask) -> None:
        log = Log()

        async def receive() -> None:
            with rig.open("auto") as rx:
                got = []
                rig.send(rig.frame(100, 0))
                async for packet in rx:
                    got.append(bytes(packet))
                    if len(got) == 1:
                        deny(errno.EPERM, "epoll_ctl")
                    if len(got) == 8:
                        rx.stop()
                    for _ in range(3):  # the event loop finds it readable while no task waits
                        rig.send(rig.frame(100, len(got)))
                        await asyncio.sleep(0)
                        await asyncio.sleep(0)
                assert got[0] == rig.frame(100, 0)
                assert len(got) == 8
                async for _ in rx.batches(0.05):
                    raise AssertionError("it was over")

        asyncio.run(receive())
        assert [
            line for line in log.said if "epoll_ctl(2). Change the filter to allow it" in line
        ] == log.said[:1]
        assert len(log.said) == 1

    with rigs.unix_dgram() as rig:
        in_child(rig, work)


def always_ready() -> tuple[socket.socket, socket.socket]:
    """A socket that poll(2) reports as readable without a packet: it is shut down for reading, and its peer is open."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.shutdown(socket.SHUT_RD)
    return receiver, sender


@pytest.mark.parametrize("refused", [("epoll_ctl",), TIMERS, ("epoll_ctl", *TIMERS)])
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_source_that_is_ready_for_nothing(refused: tuple[str, ...], before: bool) -> None:
    """If a source that is readable without a packet cannot leave the poll set, polling and waiting still work."""

    def work(_: Ask) -> None:
        log = Log()
        receiver, sender = always_ready()
        with linkrx.open(receiver, lambda *_: None) as rx:
            poll = select.poll()
            poll.register(rx.fileno(), select.POLLIN)
            if before:
                deny(errno.EPERM, *refused)
            for _turn in range(30):
                assert poll.poll(PATIENCE * 1000)
                assert rx.drain() == 0
            if not before:
                deny(errno.EPERM, *refused)
            assert rx.dispatch(SHORT)
            assert rx.dispatch(SHORT)
            waits = rx.stats().waits
            assert rx.dispatch(1)
            assert rx.stats().waits - waits < 500  # it sleeps for 10 ms in between
            rx.fileno()
            rx.stop()
            assert poll.poll(PATIENCE * 1000)
            assert rx.run() is linkrx.End.STOPPED
        for line in log.said:
            assert line.startswith(("epoll_ctl(2) is refused", "timerfd_settime(2) is refused"))
            assert line.endswith("Change the filter to allow it")
        assert 1 <= len(log.said) <= len(refused)
        sender.close()

    with rigs.unix_dgram() as rig:
        in_child(rig, work)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("make", [rigs.interface, rigs.packet])
def test_counters_filters_and_flush_without_getsockopt(make: rigs.MakeRig) -> None:
    """Without getsockopt, counters of the kernel are None, a filter is set or refused with a reason, and a flush ends."""

    def work(_: Ask) -> None:
        for backend in that_take("packet"):
            with rig.open(backend, lambda *_: None) as rx:
                assert rx.stats().kernel_drops == 0
                if backend == that_take("packet")[-1]:
                    deny(errno.EPERM, "getsockopt")
                    stats = rx.stats()
                    assert (stats.kernel_drops, stats.ring_freezes) == (None, None)
                    if rx.capabilities.owned:
                        rx.set_filter("arp")
                        rig.send(rig.frame(100))
                        assert rx.dispatch(SHORT)
                        assert rx.stats().packets == 0
                        rx.set_filter(None)
                    else:
                        with pytest.raises(
                            linkrx.UnsupportedOption, match="getsockopt: Operation not permitted"
                        ):
                            rx.set_filter("arp")
                    rig.send(rig.frame(100))
                    rx.stop(flush=True)
                    assert rx.run() is linkrx.End.STOPPED
                    assert rx.stats().packets == 1

    with make() as rig:
        in_child(rig, work)


@needs_core
@pytest.mark.usefixtures("devices")
def test_a_ring_whose_link_cannot_be_queried() -> None:
    """If neither getsockopt(2) nor recvfrom(2) reports the link, the next backend takes over after the ring's packets."""

    def work(_: Ask) -> None:
        log = Log()
        with rig.open("auto") as rx:
            deny(errno.EPERM, "getsockopt", "recvfrom")
            got = []
            for number in range(20):
                rig.send(rig.frame(100, number))
                got.append(bytes(rx.recv(PATIENCE)))
                if number == 9:
                    assert rx.backend == "packet_mmap"
                    assert list(rx.batches(SHORT)) == []
            assert got == [rig.frame(100, number) for number in range(20)]
            assert (rx.backend, rx.stats().demotions) == ("recvmmsg", 1)
        assert len(log.said) == 1

    with rigs.interface() as rig:
        in_child(rig, work)


@needs_core  # in plain Python, Python's own poll object sleeps
def test_where_nothing_can_sleep() -> None:
    """Without epoll_wait(2) and ppoll(2), a wait raises an error instead of spinning, and queued packets are received."""

    def work(_: Ask) -> None:
        with rig.open("auto") as rx:
            deny(errno.EPERM, "epoll_wait", "ppoll")
            with pytest.raises(
                PermissionError, match=r"ppoll\(2\), on which linkrx sleeps: Operation not permitted"
            ):
                rx.recv(PATIENCE)
            rig.send(rig.frame(100))
            assert bytes(rx.recv(0)) == rig.frame(100)

    with rigs.unix_dgram() as rig:
        in_child(rig, work)
