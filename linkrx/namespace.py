"""Network namespaces: a private one for the demo, tests and benches, and work inside others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from linkrx import libc
from linkrx.errors import MissingPrivilege

Result = TypeVar("Result")


def enter_private_network() -> None:
    """Move this process (one thread, nothing open on the network) into a new network namespace.

    Without CAP_SYS_ADMIN a user namespace comes with it, in which the caller is root. IPv6 is off on interfaces made
    from now on, so that the kernel sends nothing of its own. Raises MissingPrivilege where neither is allowed.
    """
    try:
        _unshare()
    except OSError as error:
        raise MissingPrivilege(
            f"a network namespace of one's own ({error.strerror})",
            "CAP_SYS_ADMIN, or user namespaces for everyone",
            "run with sudo, or `sudo sysctl kernel.unprivileged_userns_clone=1 "
            "kernel.apparmor_restrict_unprivileged_userns=0` where these exist",
            error.errno,
        ) from error
    _silence()


def _silence() -> None:
    quiet = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if quiet.exists():
        quiet.write_text("1")


def _unshare() -> None:
    try:
        libc.unshare(libc.CLONE_NEWNET)
    except PermissionError:
        uid, gid = os.getuid(), os.getgid()
        libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNET)
        own = Path("/proc/self")
        (own / "setgroups").write_text("deny")
        (own / "uid_map").write_text(f"0 {uid} 1")
        (own / "gid_map").write_text(f"0 {gid} 1")


def new_network() -> int:
    """A descriptor that refers to a new network namespace without IPv6, which lives until it is closed.

    Needs CAP_SYS_ADMIN.
    """

    def leave() -> int:
        libc.unshare(libc.CLONE_NEWNET)
        _silence()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(leave)


def inside(namespace: int, work: Callable[[], Result]) -> Result:
    """What `work` returns in a thread inside the network namespace that a descriptor refers to."""

    def enter() -> Result:
        libc.setns(namespace, libc.CLONE_NEWNET)
        return work()

    return _in_thread(enter)


def _in_thread(work: Callable[[], Result]) -> Result:
    """A namespace is a thread's: one that changes it must end, not go on with other work."""
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
