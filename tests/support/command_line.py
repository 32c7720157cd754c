"""The command line, run as a user runs it: in a process of its own, with pipes or a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from typing import Self

PATIENCE = 60.0  # seconds until a process that should have ended hangs
ESCAPE = "\x1b"

WITHOUT_CORE = """
import sys
sys.modules["linkrx._core._native"] = None
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments, its output in pipes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LINKRX_")}
    return subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**inherited, **environment},
        check=False,
    )


def linkrx_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m linkrx` with these arguments."""
    return run("-m", "linkrx", *arguments, **environment)


def in_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of `python -m linkrx` under a pseudo-terminal."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "linkrx", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
        )
        os.close(theirs)
        output = b""
        deadline = time.monotonic() + PATIENCE
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                output += os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
        else:
            process.kill()
        return process.wait(PATIENCE), output.decode()
    finally:
        os.close(ours)


class Capture:
    """`linkrx dump` while it captures: made once it listens."""

    def __init__(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "linkrx"), **environment: str
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LINKRX_")}
        self.process = subprocess.Popen(
            [sys.executable, *program, "dump", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # what is read of a line more than that would be missing in end()
            env={**inherited, **environment},
        )
        self.told: list[str] = []
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.told.append(line.decode())
            if "listening on" in self.told[-1]:
                return
        raise AssertionError(f"linkrx dump does not listen: {self.told}")

    def line(self) -> str:
        """The next line of standard output, when it comes."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Exit code, the rest of standard output, and of standard error. `number`: of a signal that ends it."""
        if number is not None:
            self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output.decode(), errors.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
