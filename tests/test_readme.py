"""What the README says runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import linkrx
from linkrx.device import injector_on
from linkrx.rigs import LOCAL, REMOTE, veth

README = (Path(__file__).parent.parent / "README.md").read_text()


def programs() -> list[str]:
    """Every Python program in it."""
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("devices")
def test_the_ten_line_program() -> None:
    """The first program has ten lines, and receives ten packets from an interface and ends."""
    program = programs()[0]
    assert len(program.splitlines()) == 10
    with veth() as (near, far), injector_on(far) as injector:
        assert program.count('"eth0"') == 1
        with subprocess.Popen(
            [sys.executable, "-u", "-c", program.replace('"eth0"', repr(near))],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LINKRX_BACKEND": "", "LINKRX_AVOID": ""},
        ) as process:
            assert process.stdout is not None
            # It explains the choice once it receives; only then is anything sent.
            explained = [process.stdout.readline() for _ in linkrx.backends()]
            for number in range(10):
                injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50 + number))
            rest = process.stdout.read().splitlines()
            assert process.wait(30) == 0
    assert any(" chosen " in line for line in explained)
    assert rest[:10] == [
        f"0x0800 02:00:00:00:00:02 > 02:00:00:00:00:01 {64 + number} bytes" for number in range(10)
    ]
    assert rest[10].startswith("stop() was called; dropped by the kernel: 0")


@pytest.mark.usefixtures("devices")
def test_the_other_programs() -> None:
    """Every other program runs to its end on an interface that frames come in on."""
    others = programs()[1:]
    assert others
    with veth() as (near, far), injector_on(far) as injector:
        for program in others:
            assert '"eth0"' in program
            with subprocess.Popen(
                [sys.executable, "-c", program.replace('"eth0"', repr(near))],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                while process.poll() is None:
                    injector.send(LOCAL + REMOTE + b"\x08\x00" + bytes(50))
                assert process.stdout is not None
                assert process.returncode == 0, process.stdout.read()
