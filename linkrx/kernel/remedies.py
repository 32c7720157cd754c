"""The advice for a missing privilege: the narrowest remedy first, and what it allows. The README says more."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MORE = 'linkrx\'s README, "Privileges", has other ways'


def capability(name: str) -> str:
    """The advice for a missing capability, named as in capabilities(7)."""
    flag = "+" + name.removeprefix("CAP_").lower()
    return (
        f"`sudo setpriv --reuid=$(id -u) --regid=$(id -g) --init-groups --inh-caps={flag} --ambient-caps={flag} COMMAND` "
        f"gives it to that command alone, and `unshare -Urn COMMAND` has it in a network of its own; {MORE}"
    )


def device_file(path: str) -> str:
    """The advice for missing access to a device file."""
    return (
        f"`sudo chgrp GROUP {path} && sudo chmod 660 {path}` opens it to one group, until the next start. Its members can then "
        f"use their own devices, and make devices where they have CAP_NET_ADMIN; {MORE}"
    )


def user_namespace(settings: Path = Path("/proc/sys")) -> str:
    """The advice for a missing user namespace. `settings` is the folder of the kernel's settings."""

    def number(name: str) -> int | None:
        try:
            return int((settings / name).read_text())
        except (OSError, ValueError):
            return None

    interpreter = os.path.realpath(sys.executable)
    if number("kernel/apparmor_restrict_unprivileged_userns") == 1:
        return (
            "AppArmor refuses user namespaces to programs without a profile: `echo 'abi <abi/4.0>, profile linkrx "
            f"{interpreter} flags=(unconfined) {{ userns, }}' | sudo tee /etc/apparmor.d/linkrx && sudo apparmor_parser -r "
            f"/etc/apparmor.d/linkrx` allows them to programs of this interpreter only; {MORE}"
        )
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):
        if number(name) == 0:
            return (
                f"{name.replace('/', '.')} is 0, which allows user namespaces to root only: run this one command with sudo, or "
                f"allow them to everyone, which opens parts of the kernel that only root can use otherwise; {MORE}"
            )
    return f"run this one command with sudo; in a container, add `--cap-add SYS_ADMIN` to its start; {MORE}"
