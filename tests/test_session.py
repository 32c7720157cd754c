"""The test session itself: its counts add up over processes, and it leaves nothing, also if it is killed."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from linkrx.testing.waiting import PATIENCE

HERE = Path(__file__).parent
pytestmark = [pytest.mark.repeats, pytest.mark.usefixtures("devices")]

SESSION = 3  # proc(5): the field of /proc/PID/stat, counted from the state


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start pytest with two workers, in a new session."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *arguments],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if int(fields[SESSION]) == session and fields[0] != "Z":
            found.append(int(process.name))
    return found


def test_counts_add_up() -> None:
    """The summary counts the conformance cells of all processes, as many as tests passed."""
    cells = str(HERE / "backends" / "test_conformance.py")
    with start(cells, "-k", "os_readv-udp or os_readv-pipe") as session:
        output, _ = session.communicate(timeout=300)
    counts = re.search(r"^conformance cells: (.*)$", output, re.MULTILINE)
    passed = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert counts, output
    assert passed, output
    assert sum(map(int, re.findall(r"\d+", counts[1]))) == int(passed[1]) > 100


@pytest.mark.parametrize(
    "end",
    [
        lambda session: os.killpg(session, signal.SIGINT),
        lambda session: os.kill(session, signal.SIGINT),
        lambda session: os.kill(session, signal.SIGTERM),
        lambda session: os.kill(session, signal.SIGKILL),
    ],
    ids=["ctrl_c", "interrupted", "terminated", "killed"],
)
def test_nothing_is_left(end: Callable[[int], None]) -> None:
    """A session that is interrupted or killed leaves no process, and so no network namespace and no device."""
    with ExitStack() as stack:
        session = stack.enter_context(
            start(str(HERE / "backends" / "test_conformance.py"), str(HERE / "test_without_core.py"))
        )
        assert session.stdout is not None
        output = ""
        while not output.endswith("\n."):  # the first test has passed
            output += session.stdout.read(1)
            assert session.poll() is None, output
        poll = select.poll()
        waited = set()
        for process in members(session.pid):
            try:
                pidfd = os.pidfd_open(process)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfd)
            poll.register(pidfd, select.POLLIN)
            waited.add(pidfd)
        assert len(waited) >= 3
        end(session.pid)
        session.stdout.close()
        while waited:
            ended = poll.poll(PATIENCE * 1000)
            assert ended, f"these go on: {members(session.pid)}"
            for pidfd, _ in ended:
                poll.unregister(pidfd)
                waited.discard(pidfd)
        assert session.wait() != 0
        assert members(session.pid) == []
