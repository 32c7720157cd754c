"""`linkrx doctor`: which backends can work on this host and on one interface, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import fields
from pathlib import Path

import linkrx
from linkrx import _core
from linkrx.backend import BackendInfo
from linkrx.cli.terminal import Terminal
from linkrx.errors import MissingPrivilege
from linkrx.factory import decided, from_environment
from linkrx.kernel import remedies
from linkrx.kernel.uapi import CAP_NET_ADMIN, CAP_NET_RAW
from linkrx.registry import backends
from linkrx.sources.options import Options
from linkrx.sources.tuntap import DEVICE


def run(terminal: Terminal, source: str | None = None, protocol: int | None = None) -> bool:
    """Print the findings. True if a backend can work: on this host or, with `source`, on that interface with that `protocol`.

    Raises UnsupportedSource, UnsupportedOption, BackendUnavailable or MissingPrivilege if `linkrx.open(source)` would.
    """
    infos = backends()
    terminal.heading("host")
    terminal.table((), _host())
    terminal.line()
    terminal.table(
        ("backend", "verdict", "reason"),
        [
            (info.name, "supported" if info.supported else "unavailable", info.reason or _purpose(info))
            for info in infos
        ],
    )
    failure = _core.build_failure()
    if _core.reason is not None and failure is not None:
        terminal.line()
        terminal.heading("output of the compiler when the build of the C core failed")
        for line in failure.splitlines():
            terminal.line(f"  {line}")
    if source is not None:
        _explain(terminal, source, protocol)
    return any(info.supported for info in infos)


def _host() -> list[tuple[str, str]]:
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    return [
        ("linkrx", linkrx.__version__),
        ("Python", python),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("C core", "yes" if _core.reason is None else f"no: {_core.reason}"),
        ("CAP_NET_RAW", _privilege("CAP_NET_RAW", CAP_NET_RAW, "no interface can be opened by name")),
        (
            "CAP_NET_ADMIN",
            _privilege(
                "CAP_NET_ADMIN",
                CAP_NET_ADMIN,
                "no TAP or TUN device can be made, and net.core.rmem_max bounds receive buffers",
            ),
        ),
        ("user namespace", _user_namespace()),
        (DEVICE, _device()),
    ]


def _has(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def _privilege(name: str, capability: int, cost: str) -> str:
    return "yes" if _has(capability) else f"no: {cost}; {remedies.capability(name)}"


def _user_namespace() -> str:
    # The first user namespace maps every user to itself: user_namespaces(7).
    if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
        return "the first"
    return "not the first: capabilities count only in network namespaces that were made from within it"


def _device() -> str:
    # Open it: the device rules of a container may forbid that whatever the permissions of the file are. Without TUNSETIFF the
    # descriptor makes no device.
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"no: load the driver with `sudo modprobe tun`; in a container add `--device {DEVICE}`"
    except OSError as error:
        return f"no: {error.strerror}; {remedies.device_file(DEVICE)}"
    return "yes"


def _purpose(info: BackendInfo) -> str:
    """The first line of the backend's docstring; Python drops docstrings under -OO."""
    return (info.backend.__doc__ or "").strip().partition("\n")[0]


def _explain(terminal: Terminal, source: str, protocol: int | None) -> None:
    asked = repr(source) if protocol is None else f"{source!r}, protocol=0x{protocol:04x}"
    found = linkrx.probe(source)
    terminal.line()
    terminal.heading(f"capabilities of {source}")
    terminal.table((), [(field.name, str(getattr(found, field.name))) for field in fields(found)])
    terminal.line()
    terminal.heading(f"what linkrx.open({asked}) would take, and why")
    backend, avoid = from_environment()
    if backend != "auto":
        terminal.line(f"LINKRX_BACKEND={backend} is set, and replaces 'auto'")
    if avoid:
        terminal.line(f"LINKRX_AVOID={','.join(avoid)} is set")
    _, choice = decided(found, Options(protocol=protocol))
    for line in choice.explain().splitlines():
        terminal.line(line, "green" if line.split()[1] == "chosen" else "")
    if not _has(CAP_NET_RAW):
        raise MissingPrivilege(
            f"opening a packet socket on {source!r}", "CAP_NET_RAW", remedies.capability("CAP_NET_RAW")
        )
