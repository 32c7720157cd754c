"""linkrx without the compiled core: the contract holds on os_readv, and errors say what is missing."""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.received import needs_core
from support.run import thorough

import linkrx

HERE = Path(__file__).parent

# Importing a module that is None in sys.modules raises ImportError.
SWITCH_OFF = "import sys; sys.modules['linkrx._core._native'] = None; "


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program without the core. Each test in it has its own guard against hanging."""
    faulthandler.cancel_dump_traceback_later()
    return subprocess.run(
        [sys.executable, "-c", SWITCH_OFF + program, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )


# The deletion of a device is noticed without the core, and one source of each kind is enough.
VARIANTS = (
    "seqpacket",
    "dgram_ip",
    "dgram_vnet",
    "pipe_nonblocking",
    "tap_blocking",
    "tap_vnet",
    "tap_segment",
    "packet_cooked",
    "packet_segment",
)
PART = f"not deleted_while and not ({' or '.join(VARIANTS)})"


@pytest.mark.long
@pytest.mark.samples
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "names",
    [
        ["backends/test_conformance.py"],
        [
            "receiving/test_loop.py",
            "receiving/test_always_ready.py",
            "receiving/test_sending.py",
            "receiving/test_ends.py",
            "receiving/test_reported_ends.py",
            "receiving/test_asyncio.py",
            "receiving/test_interruption.py::test_a_stop_counts_what_is_left[dgram-os_readv-recv]",
            "receiving/test_interruption.py::test_a_stop_counts_what_is_left[dgram-os_readv-batches]",
            "receiving/test_held_back.py",
            "receiving/test_held_back_asyncio.py",
            "receiving/test_held_back_interrupted.py",
            "sources/test_metadata.py",
            "test_choice.py",
        ],
    ],
    ids=["cells", "rest"],
)
def test_the_contract_holds(names: list[str]) -> None:
    """The conformance cells, the loop, its ends, sending, asyncio and choosing pass without the core. Interruptions hide no packet."""
    result = run(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",  # a worker process would use the core
        *([] if thorough() else ["-k", PART]),
        *(str(HERE / name) for name in names),
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    if "backends/test_conformance.py" in names:
        counts = r"conformance cells: \d+ unavailable, \d+ supported, \d+ refused, \d+ inapplicable\n"
        assert re.search(counts, result.stdout)
    assert " passed" in result.stdout


def test_every_other_backend_says_why_it_is_missing() -> None:
    """Without the core only os_readv is supported, and the others give a reason that says what to type."""
    result = run(
        "import linkrx, socket\n"
        "for info in linkrx.backends(): print(info.name, info.supported, info.reason)\n"
        "try: linkrx.open(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0], backend='readv')\n"
        "except linkrx.LinkrxError as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    *lines, error = result.stdout.splitlines()
    for line, name in zip(lines, [info.name for info in linkrx.backends()], strict=True):
        if name == "os_readv":
            assert line == "os_readv True None"
        else:
            assert line.startswith(f"{name} False the C core cannot be loaded")
            assert "pip install -e ." in line
    assert error.startswith("readv is not available here: the C core cannot be loaded")


def test_a_python_without_rwf_nowait(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Python was built with headers without RWF_NOWAIT, os_readv polls before it reads, and does not block on a blocking source."""
    monkeypatch.delattr(os, "RWF_NOWAIT")
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver, backend="os_readv") as rx:
        assert receiver.getblocking()
        assert list(rx.batches(timeout=0)) == []
        for number in range(3):
            sender.send(bytes(14) + bytes([number]))
        assert [bytes(packet.data) for batch in rx.batches(timeout=0) for packet in batch] == [
            b"\0",
            b"\1",
            b"\2",
        ]


IN_AN_INTERPRETER = """
import logging, os, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import linkrx
reading, writing = os.pipe2(os.O_DIRECT)
with linkrx.open(reading) as rx:
    os.write(writing, bytes(60))
    print(rx.backend, len(rx.recv(10)), flush=True)
"""
ISOLATED = """
import _interpreters, sys
failed = _interpreters.exec(_interpreters.create("isolated"), sys.argv[1])
sys.exit(failed and failed.formatted)
"""


@needs_core
@pytest.mark.since(3, 13)
def test_in_an_isolated_subinterpreter() -> None:
    """An isolated subinterpreter, which cannot load the core, receives with os_readv, and the log has the reason.

    In CPython 3.12 it cannot load ctypes, which linkrx imports.
    """
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, IN_AN_INTERPRETER],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logged, received = done.stdout.splitlines()
    assert "isolated subinterpreters cannot load the C core" in logged
    assert logged.endswith("use linkrx in the main interpreter")
    assert received == "os_readv 60"
