"""Runs commands without any privilege, on a host where every user may open /dev/net/tun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support.paths import ROOT

# Runs in its own mount namespace. It makes the needed paths readable, also in folders that other users may not enter, and
# makes /dev/net/tun.
AS_ROOT = """
hold=$1 needed=$2 blocked=$3; shift 3
number=0
for path in $needed; do
    number=$((number + 1)); mkdir -p "$hold/$number"; mount --bind "$path" "$hold/$number"
done
for path in $blocked; do mount -t tmpfs -o mode=755 none "$path"; done
number=0
for path in $needed; do
    number=$((number + 1)); mkdir -p "$path"; mount --bind "$hold/$number" "$path"
done
mount -t tmpfs -o mode=755 none /dev/net
mknod -m 666 /dev/net/tun c 10 200
exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --ambient-caps=-all --bounding-set=-all "$@"
"""

DROPPED = ("setpriv", "--inh-caps=-all", "--ambient-caps=-all")


def _blocked(path: Path) -> Path | None:
    """The first folder in a path that other users may not enter."""
    return next((folder for folder in (*reversed(path.parents),) if not folder.stat().st_mode & 1), None)


def as_unprivileged(hold: Path, command: list[str], *needed: Path) -> list[str]:
    """The command that runs `command` without privilege. `hold` is an empty folder; `needed` are the paths that it reads besides Python."""
    if os.getuid():
        return [*DROPPED, *command]
    hidden = {
        path: folder
        for path in (Path(sys.base_prefix), Path(sys.prefix), ROOT, *needed)
        if (folder := _blocked(path)) is not None
    }
    paths = " ".join(str(path) for path in hidden), " ".join(str(folder) for folder in set(hidden.values()))
    return ["unshare", "--mount", "bash", "-euc", AS_ROOT, "_", str(hold), *paths, *command]
