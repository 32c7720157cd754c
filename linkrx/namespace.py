"""A network namespace of one's own, for what must not touch the machine's interfaces: the demo, tests, benches."""

from __future__ import annotations

import os
from pathlib import Path

from linkrx import libc
from linkrx.errors import MissingPrivilege


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
