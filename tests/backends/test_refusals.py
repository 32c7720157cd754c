"""Calls that the kernel or a seccomp filter refuses lead to a demotion that is logged and visible, or to a clear error."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
from support.paths import TESTS
from support.seccomp import NUMBERS

from linkrx import _core
from linkrx.testing.rigs import veth

pytestmark = [
    pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no system call numbers for this machine"),
]

needs_core = pytest.mark.skipif(_core.lib is None, reason="the C core was not built")

PREAMBLE = """
import errno, logging, os, socket, sys
import linkrx
from linkrx.testing.rigs import LOCAL, REMOTE
from support.seccomp import deny
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
def send(*numbers):
    for number in numbers:
        sender.send(LOCAL + REMOTE + b"\\x08\\x00" + bytes([number]))
def numbers(batch):
    return [packet.data[0] for packet in batch]
"""


def run(program: str, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
    """Run a program, and return its output lines. It must not fail. `meanwhile` is called before its standard input is closed."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + program],
            cwd=TESTS,
            env={**os.environ, "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        first = process.stdout.readline()
        meanwhile()
        process.stdin.close()
        printed = first + process.stdout.read()
        status = process.wait(60)
        errors.seek(0)
        assert (status, errors.read()) == (0, "")
    return printed.splitlines()


@needs_core
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_recvmmsg_refused_at_run_time(code: int) -> None:
    """If recvmmsg is refused at run time, readv takes over, no packet is lost, one warning is logged, and `rx.choice` shows it."""
    lines = run(f"""
with linkrx.open(receiver) as rx:
    send(1, 2)
    batches = rx.batches(0.01)
    print(rx.backend, *numbers(next(batches)))
    send(3, 4)
    deny({code}, "recvmmsg")
    send(5)
    for batch in batches:
        print(rx.backend, *numbers(batch))
    print(rx.choice.explain())
    print(rx.stats().demotions, rx.choice.backend)
""")
    said = os.strerror(code)
    assert lines == [
        "recvmmsg 1 2",
        f"WARNING linkrx recvmmsg on the AF_UNIX datagram socket: the kernel answers {said}; going on with readv",
        "readv 3 4 5",
        "packet_mmap   refused   packet_mmap puts a ring on AF_PACKET sockets only, and the source is an AF_UNIX "
        "datagram socket",
        f"recvmmsg      refused   refused at run time: {said}",
        "readv         chosen    took over from recvmmsg",
        "os_readv      accepted  would do, but recvmmsg is better",
        "capture_file  refused   capture_file reads linkrx.CaptureFile only, and the source is an AF_UNIX datagram socket",
        "1 readv",
    ]


@needs_core
@pytest.mark.parametrize("take", ["rx.drain()", "got.append(rx.recv(0))", "got.extend(next(rx.batches(0)))"])
def test_a_call_that_does_not_wait_gets_queued_packets(take: str) -> None:
    """A call that does not wait returns the queued packets, even if the mechanism is refused in that call."""
    lines = run(f"""
got = []
with linkrx.open(receiver, lambda remote, local, protocol, packet: got.append(packet)) as rx:
    send(3, 4)
    deny(errno.EPERM, "recvmmsg", "recvfrom")
    {take}
    print(rx.backend, numbers(got)[0])
""")
    assert lines[-1] == "os_readv 3"


@needs_core
def test_two_refusals_in_a_row() -> None:
    """If the next backend is refused too, the one after it takes over, and no packet is lost."""
    lines = run("""
with linkrx.open(receiver) as rx:
    send(1, 2, 3)
    deny(errno.ENOSYS, "recvmmsg", "recvfrom")
    print(*numbers(next(rx.batches(1))), rx.backend, rx.stats().demotions)
""")
    assert [line.split()[-1] for line in lines[:2]] == ["readv", "os_readv"]
    assert lines[2] == "1 2 3 os_readv 2"


@needs_core
def test_a_named_backend_is_never_replaced() -> None:
    """A named backend that the kernel refuses raises BackendUnavailable with the kernel's reason."""
    lines = run("""
with linkrx.open(receiver, backend="recvmmsg") as rx:
    send(1)
    deny(errno.ENOSYS, "recvmmsg")
    try:
        rx.recv(1)
    except linkrx.BackendUnavailable as error:
        print(error)
""")
    assert lines == [
        "recvmmsg on the AF_UNIX datagram socket: the kernel answers Function not implemented (ENOSYS), and there is "
        "no other backend to take over"
    ]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_the_last_backend_is_refused(code: int) -> None:
    """If recvmsg(2) and readv(2) are refused, the error has the kernel's reason, and says that no other backend is left."""
    lines = run(f"""
os.environ["LINKRX_AVOID"] = "recvmmsg,readv"
with linkrx.open(receiver) as rx:
    send(1)
    deny({code}, "recvmsg", "readv", "preadv2")
    try:
        rx.recv(1)
    except linkrx.BackendUnavailable as error:
        print(error)
    print(rx.end, receiver.recv(100)[-1])
""")
    assert lines == [
        f"os_readv on the AF_UNIX datagram socket: the kernel answers {os.strerror(code)} ({errno.errorcode[code]}), "
        "and there is no other backend to take over",
        "None 1",
    ]


@needs_core
def test_readv_stays_where_only_scattering_is_refused() -> None:
    """A filter that refuses readv(2) and preadv2(2) does not affect the C backend on a non-blocking source."""
    lines = run("""
reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
with linkrx.open(reader) as rx:
    deny(errno.EPERM, "readv", "preadv2")
    os.write(writer, LOCAL + REMOTE + b"\\x08\\x00" + b"\\x07")
    print(rx.recv(1).data[0], rx.backend, rx.stats().demotions)
""")
    assert lines == ["7 readv 0"]


@needs_core
def test_held_packets_survive_a_demotion() -> None:
    """Packets, batches and views from before a demotion do not change when the next backend receives."""
    lines = run("""
with linkrx.open(receiver) as rx:
    send(1, 2, 3)
    held = next(rx.batches(1))
    packets, view = list(held), memoryview(held.memory)[held.starts[1]:][:15]
    deny(errno.ENOSYS, "recvmmsg")
    for turn in range(50):
        send(*range(60))
        for batch in rx.batches(0):
            pass
    print(numbers(held), numbers(packets), view[-1], rx.backend)
""")
    assert lines[-1] == "[1, 2, 3] [1, 2, 3] 2 readv"


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
def test_probing_does_without_getsockname(code: str) -> None:
    """linkrx receives from a socket although a filter refuses getsockname(2)."""
    lines = run(f"""
deny(errno.{code}, "getsockname")
with linkrx.open(receiver) as rx:
    send(1)
    print(rx.capabilities.kind, *numbers([rx.recv(1)]))
""")
    assert lines == ["unix_dgram 1"]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("eventfd2", "eventfd(2), with which stop() ends a wait"),
        ("timerfd_create", "timerfd_create"),
        ("epoll_create1", "epoll_create1(2), on which a wait sleeps"),
    ],
)
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_without_what_a_wait_needs_open_says_so(code: int, call: str, what: str) -> None:
    """If a filter refuses a call that waiting needs, open raises an error that names the call, and leaves no descriptor."""
    lines = run(f"""
before = os.listdir("/proc/self/fd")
deny({code}, "{call}")
try:
    linkrx.open(receiver)
except OSError as error:
    print(error)
print(os.listdir("/proc/self/fd") == before)
""")
    assert lines == [f"[Errno {code}] {what}: {os.strerror(code)}", "True"]


@pytest.mark.usefixtures("devices")
def test_without_the_tun_driver() -> None:
    """If /dev/net/tun does not exist, as in a container, the error says what to type."""
    lines = run("""
import ctypes
from linkrx.kernel import libc
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # linux/sched.h, linux/mount.h
libc.unshare(CLONE_NEWNS)
mount = ctypes.CDLL(None, use_errno=True).mount
assert mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
assert mount(b"none", b"/dev/net", b"tmpfs", 0, None) == 0
try:
    linkrx.TunTap()
except linkrx.LinkrxError as error:
    print(error)
""")
    assert lines == [
        "/dev/net/tun does not exist: load the driver with `sudo modprobe tun`; in a container add "
        "`--device /dev/net/tun`"
    ]


@needs_core
def test_nothing_of_the_refused_backend_shows_later() -> None:
    """After a demotion packets have their own lengths, not values that the previous backend left in the columns."""
    lines = run("""
with linkrx.open(receiver) as rx:
    sender.send(LOCAL + REMOTE + b"\\x08\\x00" + bytes(1000))
    rx.recv(1)
    deny(errno.ENOSYS, "recvmmsg", "recvfrom")
    send(1)
    packet = rx.recv(1)
    print(rx.backend, len(packet), packet.wire_length, packet.truncated, rx.stats().truncated)
""")
    assert lines[-1] == "os_readv 15 15 False 0"


@pytest.mark.usefixtures("devices")
def test_an_interface_without_getsockname() -> None:
    """If getsockname(2) is refused, an interface that is up or down is received from, and does not count as deleted."""
    from pyroute2 import IPRoute

    with veth() as (near, _), IPRoute() as route:
        lines = run(
            f"""
with linkrx.open({near!r}, lambda *_: None) as rx:
    deny(errno.EPERM, "getsockname")
    print("open", flush=True)
    sys.stdin.readline()
    print(rx.dispatch(0.05), rx.end, rx.stats().link_downs)
""",
            lambda: route.link("set", index=socket.if_nametoindex(near), state="down"),
        )
    assert lines == ["open", "True None 1"]
