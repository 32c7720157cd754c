"""One private network namespace for the whole run, and the rule that a skipped device test is no passed test."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import linkrx
from linkrx import arena, namespace
from linkrx.capabilities import Capabilities

# CI sets this: there a device test that cannot run is a failure.
DEVICES_REQUIRED = os.environ.get("LINKRX_REQUIRE_DEVICES") == "1"

# Outcomes of conformance cells: supported, refused, inapplicable or unavailable.
cell_outcomes: Counter[str] = Counter()
# What was compared with the kernel's own segmentation.
segmented: Counter[str] = Counter()


def _enter() -> str | None:
    """Why device tests cannot run here; None when they can."""
    try:
        namespace.enter_private_network()
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("set", index=1, state="up")  # lo, for UDP
        linkrx.TunTap().close()
    except (linkrx.LinkrxError, OSError) as error:
        return str(error)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The path of free-threaded builds and of PyPy, on this interpreter."""
    parser.addoption(
        "--distrust-counts",
        action="store_true",
        help="take reference counts for inexact: no arena is used twice",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is opened."""
    if config.getoption("--distrust-counts"):
        arena.REFERENCE_COUNTS_ARE_EXACT = False


# When conftest is read, not in a fixture: entering a user namespace takes a process of one thread.
NO_DEVICES = _enter()


def that_take(kind: str) -> list[str]:
    """The backends of this host that take sources of a kind. That the others refuse them is for conformance cells."""
    source = Capabilities(kind, socket=kind not in ("tap", "tun", "pipe"), largest_frame=65_536)
    return [
        info.name for info in linkrx.backends() if info.supported and info.backend.refuses(source) is None
    ]


@pytest.fixture
def devices() -> None:
    """For tests that make devices."""
    if NO_DEVICES is not None:
        if DEVICES_REQUIRED:
            pytest.fail(f"device tests are required here, and cannot run: {NO_DEVICES}")
        pytest.skip(f"needs to make network devices: {NO_DEVICES}")


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cells of backend x source x check there were."""
    if cell_outcomes:
        counts = ", ".join(
            f"{number} {outcome}" for outcome, number in sorted(cell_outcomes.items(), reverse=True)
        )
        terminalreporter.write_line(f"conformance cells: {counts}")
    if segmented:
        counts = ", ".join(f"{number} {what}" for what, number in segmented.items())
        terminalreporter.write_line(f"the same as the kernel's: {counts}")
