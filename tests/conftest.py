"""Options, fixtures and hooks of the tests. Each process of a run enters a private network namespace.

Tests run in several processes of pytest-xdist, unless `-n` gives another number.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support import run
from support.pairs import Pair, pair

import linkrx
from linkrx.kernel import namespace
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import veth

# CI sets this variable. Then a device test that cannot run fails.
DEVICES_REQUIRED = os.environ.get("LINKRX_REQUIRE_DEVICES") == "1"

# A shell without job control starts background processes with SIGINT ignored, and every process of a test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Whether this is the machine's root. Root of a user namespace may not load eBPF programs, make device files or force socket buffers.
SUPERUSER = os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]

# Holds the reason if the parent process cannot make devices. A worker has two threads, so it cannot enter a user namespace itself.
PARENTS_REASON = "LINKRX_TESTS_NO_DEVICES"

# A separate project: a test runs its tests in another process.
collect_ignore = ["downstream"]

# Ports to other programs (docs/ports.md) are tested if these programs are installed: `pip install linkrx[ports]`.
for _program in ("aiodhcpwatcher", "asyncssh", "ptf", "pytcp"):
    if find_spec(_program) is None:
        collect_ignore.append(f"adapters/test_port_{_program}.py")

# Examples have no deadline, because a machine under load may be slow.
hypothesis.settings.register_profile(
    "linkrx", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("linkrx")


def _enter() -> str | None:
    """Enter a private network namespace. Returns the reason if device tests cannot run, or None."""
    if PARENTS_REASON in os.environ:
        return os.environ[PARENTS_REASON]
    try:
        namespace.enter_private_network()
        linkrx.TunTap().close()
    except (linkrx.LinkrxError, OSError) as error:
        os.environ[PARENTS_REASON] = str(error)
        return str(error)
    return None


# Called at import, not in a fixture: only a process with one thread can enter a user namespace.
NO_DEVICES = _enter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all."""
    parser.addoption(
        "--all",
        action="store_true",
        help="also run tests marked repeats: walks through every instruction, thousands of opens, inputs found by fuzzing",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use several processes, unless the command line gives a number or names single tests."""
    undecided = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if undecided and not any("::" in argument for argument in config.args):
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Start two workers for each processor: tests wait half of the time for the kernel to delete a device."""
    return 2 * min(len(os.sched_getaffinity(0)), 8)


def pytest_configure(config: pytest.Config) -> None:
    """Read --all, before tests are collected."""
    run.everything = config.getoption("--all")


def pytest_collection_finish() -> None:
    """Except the modules and the list of tests from garbage collection: many tests collect, and it would take 0.1 s each time."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Say which tests run."""
    return "tests: all" if run.everything else "tests: the quick ones; --all runs every one"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked `repeats`, unless --all is given. Start with the longest tests."""

    def is_wanted(item: pytest.Item) -> bool:
        since, only = item.get_closest_marker("since"), item.get_closest_marker("only")
        if item.get_closest_marker("superuser") and not SUPERUSER:
            return False
        if (since and sys.version_info < since.args) or (only and sys.version_info[:2] != only.args):
            return False
        return run.everything or not item.get_closest_marker("repeats")

    left_out = [item for item in items if not is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_wanted(item)]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def devices() -> None:
    """Skip the test if it cannot make devices, or fail it if devices are required."""
    if NO_DEVICES is not None:
        if DEVICES_REQUIRED:
            pytest.fail(f"device tests are required here, and cannot run: {NO_DEVICES}")
        pytest.skip(f"needs to make network devices: {NO_DEVICES}")


@pytest.fixture
def datagram() -> Iterator[socket.socket]:
    """One end of an AF_UNIX datagram pair."""
    with pair() as (receiver, _):
        yield receiver


@pytest.fixture
def seqpacket() -> Iterator[Pair]:
    """Receiver and sender of an AF_UNIX seqpacket pair."""
    with pair(socket.SOCK_SEQPACKET) as ends:
        yield ends


@pytest.fixture
def wire(devices: None) -> Iterator[tuple[str, str, socket.socket]]:
    """Both ends of a veth pair, and a socket that sends from the second."""
    with veth() as (near, far), injector_on(far) as injector:
        yield near, far, injector


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record the test that runs, for `thorough`."""
    run.running = item


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """Fail a test that leaves a file descriptor open."""

    def opened() -> dict[str, str]:
        found = {}
        for link in Path("/proc/self/fd").iterdir():
            try:
                found[link.name] = str(link.readlink())
            except FileNotFoundError:  # the descriptor that lists the folder
                continue
        return found

    before = opened()
    yield
    left = {number: what for number, what in opened().items() if number not in before}
    assert not left, f"left open: {left}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the counts of a worker to the process that prints the summary."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["counts"] = [dict(run.cell_outcomes), dict(run.segmented)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker. A worker that crashed has none; its current test has failed."""
    for counter, counts in zip(
        (run.cell_outcomes, run.segmented), getattr(node, "workeroutput", {}).get("counts", ()), strict=False
    ):
        counter.update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of conformance cells by outcome, and of frames that equal the kernel's."""
    if run.cell_outcomes:
        counts = ", ".join(
            f"{number} {outcome}" for outcome, number in sorted(run.cell_outcomes.items(), reverse=True)
        )
        terminalreporter.write_line(f"conformance cells: {counts}")
    if run.segmented:
        counts = ", ".join(f"{number} {what}" for what, number in run.segmented.items())
        terminalreporter.write_line(f"the same as the kernel's: {counts}")
