"""Network namespaces: a private one for the demo, tests and benchmarks, and calls inside others."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from linkrx.errors import MissingPrivilege
from linkrx.kernel import libc, remedies, uapi
from linkrx.kernel.uapi import IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS

Result = TypeVar("Result")

# linux/sockios.h
IFREQ = struct.Struct("16sH22x")  # struct ifreq, of which this is the name and the flags

# The capabilities in a user namespace. The caller does not become root there, because some programs refuse root.
KEPT = (uapi.CAP_NET_BIND_SERVICE, uapi.CAP_NET_ADMIN, uapi.CAP_NET_RAW, uapi.CAP_SYS_ADMIN)


def enter_private_network() -> None:
    """Move this process into a new network namespace, in which `lo` is up. It must have one thread and no open sockets.

    Without CAP_SYS_ADMIN this makes a user namespace too. There the caller keeps its user, and it and its programs have the
    capabilities for networks, `KEPT`. IPv6 is off on new interfaces, so that the kernel sends nothing by itself. Other threads
    stay in the old namespace. Raises MissingPrivilege if neither namespace is allowed, and names the threads if they forbid it.
    """
    _enter(_unshare)


def enter_new_network() -> None:
    """Move this thread alone. Needs CAP_SYS_ADMIN. Other threads may run, and `go_to` leads back."""
    _enter(lambda: libc.unshare(uapi.CLONE_NEWNET))


def _enter(unshare: Callable[[], None]) -> None:
    try:
        unshare()
        _silence()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            bring_up("lo", control)
    except OSError as error:
        threads = _threads()
        if error.errno == errno.EINVAL and len(threads) > 1:
            raise MissingPrivilege(
                f"a network namespace of one's own, in a process of {len(threads)} threads ({', '.join(threads)}),",
                "CAP_SYS_ADMIN, or a user namespace, which only a process of one thread may enter",
                "call enter_private_network() before anything starts a thread",
                error.errno,
            ) from error
        raise MissingPrivilege(
            f"a network namespace of one's own ({error.strerror})",
            "CAP_SYS_ADMIN or a user namespace",
            remedies.user_namespace(),
            error.errno,
        ) from error


def bring_up(interface: str, control: socket.socket) -> None:
    """Set an interface up, in the network namespace of a socket of any kind."""
    name, flags = IFREQ.unpack(fcntl.ioctl(control, SIOCGIFFLAGS, IFREQ.pack(os.fsencode(interface), 0)))
    fcntl.ioctl(control, SIOCSIFFLAGS, IFREQ.pack(name, flags | IFF_UP))


def _threads() -> list[str]:
    """The names of the threads of this process: those of Python, or of the kernel for threads of other libraries."""
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    return [known.get(int(task.name)) or (task / "comm").read_text().strip() for task in tasks]


def _silence() -> None:
    quiet = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if quiet.exists():
        quiet.write_text("1")


def _unshare() -> None:
    try:
        libc.unshare(uapi.CLONE_NEWNET)
    except PermissionError:
        uid, gid = os.getuid(), os.getgid()
        libc.unshare(uapi.CLONE_NEWUSER | uapi.CLONE_NEWNET)
        own = Path("/proc/self")
        (own / "setgroups").write_text("deny")
        (own / "uid_map").write_text(f"{uid} {uid} 1")
        (own / "gid_map").write_text(f"{gid} {gid} 1")
        libc.keep_capabilities(KEPT)


def open_here() -> int:
    """A descriptor of the network namespace of this thread."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def go_to(namespace: int) -> None:
    """Move only this thread into the network namespace of a descriptor. Needs CAP_SYS_ADMIN."""
    libc.setns(namespace, uapi.CLONE_NEWNET)


def new_network() -> int:
    """A descriptor of a new network namespace without IPv6. The namespace is deleted when the descriptor is closed.

    Needs CAP_SYS_ADMIN.
    """

    def leave() -> int:
        libc.unshare(uapi.CLONE_NEWNET)
        _silence()
        return open_here()

    return _in_thread(leave)


def inside(namespace: int, work: Callable[[], Result]) -> Result:
    """Call `work` in a thread inside the network namespace of a descriptor, and return its result."""

    def enter() -> Result:
        go_to(namespace)
        return work()

    return _in_thread(enter)


def _in_thread(work: Callable[[], Result]) -> Result:
    """Run in a new thread, which ends then: a thread that has changed its namespace must not do other work."""
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="linkrx-namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
