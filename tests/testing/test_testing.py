"""linkrx.testing for authors of plug-ins, and the private network that its checks need."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import linkrx
from linkrx import testing
from linkrx.kernel import remedies
from linkrx.testing.capture_rigs import CAPTURE_RIGS

# A plug-in backend that is os_readv under another name.
PLUG_IN = """
from linkrx.backends.os_readv import OsReadv

class Mine(OsReadv):
    name = "mine"
"""

# The caller is root in a user namespace, and has the rights of an ordinary user on the machine.
AS_ANYONE = """
import os
from pathlib import Path
from linkrx.kernel import libc, uapi
uid, gid = os.getuid(), os.getgid()
libc.unshare(uapi.CLONE_NEWUSER)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
"""

# Drop all capabilities: capset(2), linux/capability.h.
AS_NOBODY = """
import ctypes, struct
assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0
"""

ENTER = """
import threading
import linkrx
from linkrx.kernel import namespace
try:
    namespace.enter_private_network()
except linkrx.MissingPrivilege as error:
    print(error)
"""


def run(program: str, path: Path | None = None) -> str:
    """Run a program in its own process. Returns its output. `path` is searched for modules and distributions."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **({} if path is None else {"PYTHONPATH": str(path)})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documented() -> str:
    """The program in the docstring of linkrx.testing."""
    described = inspect.getdoc(testing) or ""
    return textwrap.dedent("\n".join(line for line in described.splitlines() if line.startswith("    ")))


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("who", ["", AS_ANYONE], ids=["as_caller", "in_a_user_namespace"])
def test_the_documented_program(who: str, tmp_path: Path) -> None:
    """The program in the docstring of linkrx.testing checks a plug-in backend on every kind of source, also without root."""
    (tmp_path / "mine.py").write_text(PLUG_IN)
    described = tmp_path / "mine-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[linkrx.backends]\nmine = mine:Mine\n")
    program = documented()
    assert 'testing.cells("mine")' in program
    few = "from linkrx import testing\ntesting.CHECKS = testing.CHECKS[:1]\n"
    output = run(who + few + program, tmp_path)
    kinds = [make.__name__ for make in linkrx.testing.rigs.PLAIN_RIGS + linkrx.testing.rigs.DEVICE_RIGS]
    expected = [f"mine-{kind}-delivery supported" for kind in kinds]
    assert output.splitlines() == expected + [
        f"mine-{make.__name__}-delivery refused" for make in CAPTURE_RIGS
    ]


def test_a_backend_that_does_not_exist() -> None:
    """An unknown name raises an error that lists the backends and says how to add another."""
    for use in (
        lambda: testing.cells("carrier_pigeon"),
        testing.Cell("carrier_pigeon", linkrx.testing.rigs.udp, testing.CHECKS[0]).run,
    ):
        with pytest.raises(linkrx.BackendUnavailable) as caught:
            use()
        assert str(caught.value).startswith(
            "there is no backend 'carrier_pigeon': there are packet_mmap, recvmmsg, readv, os_readv, capture_file. "
        )
        assert "the group linkrx.backends" in str(caught.value)


@pytest.mark.usefixtures("devices")
def test_the_private_network_has_its_loopback_interface() -> None:
    """After enter_private_network UDP reaches 127.0.0.1, and there is no other interface than lo."""
    output = run(
        ENTER + "import socket\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "one.bind(('127.0.0.1', 0))\n"
        "one.sendto(b'here', one.getsockname())\n"
        "print(one.recv(10), socket.if_nameindex())\n"
    )
    assert output == "b'here' [(1, 'lo')]\n"


@pytest.mark.usefixtures("devices")
def test_threads_that_prevent_a_user_namespace_are_named() -> None:
    """If threads prevent a user namespace, the error names them and says what to do."""
    before, after = ENTER.split("try:")
    output = run(
        AS_NOBODY
        + before
        + "done = threading.Event()\n"
        + "threading.Thread(target=done.wait, name='the one that waits').start()\n"
        + "try:"
        + after
        + "done.set()\n"
    )
    assert output == (
        "[Errno 22] a network namespace of one's own, in a process of 2 threads (MainThread, the one that waits), needs "
        "CAP_SYS_ADMIN, or a user namespace, which only a process of one thread may enter; call "
        "enter_private_network() before anything starts a thread\n"
    )


@pytest.mark.parametrize(
    ("settings", "output"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": "1\n"}, "sudo tee /etc/apparmor.d/linkrx"),
        ({"kernel/unprivileged_userns_clone": "0\n"}, "kernel.unprivileged_userns_clone is 0"),
        ({"user/max_user_namespaces": "0\n"}, "user.max_user_namespaces is 0"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "0\n"}, "--cap-add SYS_ADMIN"),
        ({}, "--cap-add SYS_ADMIN"),
    ],
)
def test_the_narrowest_remedy_for_user_namespaces(
    settings: dict[str, str], output: str, tmp_path: Path
) -> None:
    """The remedy for a refused user namespace depends on the cause, and grants no more than needed."""
    for name, value in settings.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value)
    remedy = remedies.user_namespace(tmp_path)
    assert output in remedy
    assert "sysctl" not in remedy
    assert "chmod 666" not in remedies.device_file("/dev/net/tun")


def test_a_refusal_says_what_to_type() -> None:
    """If the kernel allows neither namespace, the error has its reason, the missing privilege and what to type."""
    output = run(
        AS_NOBODY
        + "from linkrx.kernel import libc, uapi\n"
        + "def refuse(flags): raise PermissionError(1, 'Operation not permitted')\n"
        + "libc.unshare = refuse\n"
        + ENTER
    )
    assert output == (
        "[Errno 1] a network namespace of one's own (Operation not permitted) needs CAP_SYS_ADMIN or a user "
        f"namespace; {remedies.user_namespace()}\n"
    )


def test_threads_of_other_libraries_have_names_too() -> None:
    """A thread that Python did not start is listed with the kernel's name for it, after the main thread."""
    output = run(
        "import _thread\n"
        "from linkrx.kernel import namespace\n"
        "lock = _thread.allocate_lock()\n"
        "lock.acquire()\n"
        "_thread.start_new_thread(lock.acquire, ())\n"
        "print(namespace._threads())\n"
    )
    assert re.fullmatch(r"\['MainThread', 'python.*'\]\n", output)


CHECKED = """
import sys
from linkrx import LinkrxError
from linkrx.testing import __main__ as checks

def enter():
    raise LinkrxError("no namespaces here")

class Failing:
    name = "failing-cell"
    def run(self):
        raise AssertionError("what does not hold")

checks.enter_private_network = enter
cells = checks.cells
if sys.argv[2:]:
    checks.cells = lambda *arguments: [*cells(*arguments)[:3], Failing()]
sys.exit(checks.main(sys.argv[1:2]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [
        (
            ["capture_file"],
            0,
            [
                "without the sources that need network devices: no namespaces here",
                r"capture_file: \d+ refused",
            ],
        ),
        (
            ["capture_file", "failing"],
            1,
            ["failing-cell failed:", "AssertionError: what does not hold", "1 failed"],
        ),
        (["nonesuch"], 2, ["error: there is no backend 'nonesuch': there are "]),
    ],
    ids=["all", "failing", "unknown"],
)
def test_the_checks_as_a_command(arguments: list[str], status: int, lines: list[str]) -> None:
    """`python -m linkrx.testing NAME` counts the outcomes, shows failures, and runs without devices if it cannot make any."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout
    for line in lines:
        assert re.search(line, done.stdout), done.stdout
