"""A private network namespace for every process of a run, and the rule that a skipped device test is no passed test.

Tests run in several processes, of pytest-xdist, unless `-n` says otherwise. Each has a network namespace of its own.
"""

from __future__ import annotations

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

# CI sets this: there a device test that cannot run is a failure.
DEVICES_REQUIRED = os.environ.get("LINKRX_REQUIRE_DEVICES") == "1"

# A shell without job control has what it starts in the background ignore Ctrl-C, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Not root in a user namespace, who may load no eBPF program, make no device file and force no socket buffer.
SUPERUSER = os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]

# Why this process's parent could make no devices: a worker has two threads, and may enter no user namespace by itself.
PARENTS_REASON = "LINKRX_TESTS_NO_DEVICES"

# A project of its own, which tests run in processes of their own.
collect_ignore = ["downstream"]

# Ports to other programs (docs/ports.md) are tested where these are installed: `pip install linkrx[ports]`.
for _program in ("aiodhcpwatcher", "asyncssh", "ptf", "pytcp"):
    if find_spec(_program) is None:
        collect_ignore.append(f"adapters/test_port_{_program}.py")

# Examples are not timed: a machine under load takes as long as it takes.
hypothesis.settings.register_profile(
    "linkrx", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("linkrx")


def _enter() -> str | None:
    """Why device tests cannot run here; None when they can."""
    if PARENTS_REASON in os.environ:
        return os.environ[PARENTS_REASON]
    try:
        namespace.enter_private_network()
        linkrx.TunTap().close()
    except (linkrx.LinkrxError, OSError) as error:
        os.environ[PARENTS_REASON] = str(error)
        return str(error)
    return None


# When conftest is read, not in a fixture: entering a user namespace takes a process of one thread.
NO_DEVICES = _enter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is left out by default."""
    parser.addoption(
        "--all",
        action="store_true",
        help="also what repeats: walks through every instruction, thousands of opens, the inputs that fuzzing kept",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Several processes unless the command line says how many, or names single tests."""
    undecided = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if undecided and not any("::" in argument for argument in config.args):
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor: half of the time a test waits for the kernel to take a device away."""
    return 2 * min(len(os.sched_getaffinity(0)), 8)


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected and opened."""
    run.everything = config.getoption("--all")


def pytest_report_header() -> str:
    """What is run."""
    return "tests: all" if run.everything else "tests: the quick ones; --all runs every one"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what repeats, unless --all is given; begin with what takes longest."""

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
    """For tests that make devices."""
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
    """For `thorough`."""
    run.running = item


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """No test leaves a file descriptor open."""

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
    """A worker hands its counts to the process that prints the summary."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["counts"] = [dict(run.cell_outcomes), dict(run.segmented)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """That process adds them up. A worker that crashed has none; the test that it was at has failed."""
    for counter, counts in zip(
        (run.cell_outcomes, run.segmented), getattr(node, "workeroutput", {}).get("counts", ()), strict=False
    ):
        counter.update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cells of backend x source x check there were."""
    if run.cell_outcomes:
        counts = ", ".join(
            f"{number} {outcome}" for outcome, number in sorted(run.cell_outcomes.items(), reverse=True)
        )
        terminalreporter.write_line(f"conformance cells: {counts}")
    if run.segmented:
        counts = ", ".join(f"{number} {what}" for what, number in run.segmented.items())
        terminalreporter.write_line(f"the same as the kernel's: {counts}")
