"""Enters a network namespace for all benchmarks, ties the process to one processor, and prints the ratios."""

from __future__ import annotations

import ctypes
import os

import pytest

from linkrx.kernel.namespace import enter_private_network

enter_private_network()
# The queue is filled and drained on one processor. test_live.py measures with two, and enables all processors again.
PROCESSORS = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {PROCESSORS[-1]})
# Whether malloc() returns free memory to the kernel depends on the blocks behind it and on earlier calls of free(). So a
# benchmark that keeps packets or makes large blocks would have page faults by chance. With these settings malloc() returns
# nothing. (Both are set, because setting one of them stops malloc() from adapting the other.)
MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2**30), "M_MMAP_THRESHOLD": (-3, 32 * 2**20)}  # malloc.h
if hasattr(ctypes.CDLL(None), "mallopt"):
    for parameter, value in MALLOPT.values():
        assert ctypes.CDLL(None).mallopt(parameter, value) == 1


@pytest.fixture(scope="session")
def processors() -> list[int]:
    """The processors that this process could use before it was tied to the last of them."""
    return PROCESSORS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a line for each reader: nanoseconds per packet, the floor's, and the ratio; or milliseconds and the target."""
    session = getattr(config, "_benchmarksession", None)
    measured = [one for one in session.benchmarks if "readers" in one.extra_info] if session else []
    if measured:
        terminalreporter.write_line(f"{'ns per packet':<66} {'reader':>8} {'C floor':>8} {'ratio':>6}")
    for one in measured:
        facts = one.extra_info
        for name, figures in facts["readers"].items():
            if name == "C floor":
                continue
            title = one.name if len(facts["readers"]) == 2 else f"{one.name} {name}"
            terminalreporter.write_line(
                f"{title:<66} {figures['ns']:>8} {facts['floor_ns']:>8} {figures['ratio']:>6}"
            )
    live = [one for one in session.benchmarks if "flood" in one.extra_info] if session else []
    if live:
        terminalreporter.write_line(
            f"{'thousands of packets per second, % of those sent, CPU ns per packet':<72}"
            f"{'received':>9} {'dropped':>8} {'%':>5} {'sender':>7} {'receiver':>8}"
        )
    for one in live:
        facts = one.extra_info["flood"]
        terminalreporter.write_line(
            f"{one.name:<72}{facts['delivered_pps'] / 1000:>9.0f} {facts['dropped_pps'] / 1000:>8.0f} "
            f"{facts['delivered_share']:>5.1f} {facts['sender_ns']:>7.0f} {facts['receiver_ns']:>8.0f}"
        )
    timed = [one for one in session.benchmarks if "max_ms" in one.extra_info] if session else []
    if timed:
        terminalreporter.write_line(f"{'milliseconds':<58} {'median':>8} {'max':>8} {'target':>6}")
    for one in timed:
        facts = one.extra_info
        terminalreporter.write_line(
            f"{one.name:<58} {facts['median_ms']:>8} {facts['max_ms']:>8} {facts['target_ms']:>6}"
        )
    streams = [one for one in session.benchmarks if "streams" in one.extra_info] if session else []
    if streams:
        terminalreporter.write_line(
            f"{'MB/s; CPU us per MB: receiver in user space, in the kernel, both ends':<72}"
            f"{'MB/s':>8} {'user':>8} {'kernel':>8} {'both':>8}"
        )
    for one in streams:
        for mode, figures in one.extra_info["streams"].items():
            columns = " ".join(f"{value:>8}" for value in figures.values())
            terminalreporter.write_line(f"{one.name + ' ' + mode:<72}{columns}")
    cut = [one for one in session.benchmarks if "targets" in one.extra_info] if session else []
    for one in cut:
        for what, figure in one.extra_info["targets"].items():
            terminalreporter.write_line(f"{one.name:<32}{what:<52} {figure:>8}")
