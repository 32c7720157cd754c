"""Runs the command line in a process of its own, with pipes or a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from typing import Self

PATIENCE = 60.0  # seconds after which a process counts as hanging
ESCAPE = "\x1b"

WITHOUT_CORE = """
import sys
sys.modules["linkrx._core._native"] = None
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python` with these arguments, and its output in pipes."""
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
    """Run `python -m linkrx` with these arguments."""
    return run("-m", "linkrx", *arguments, **environment)


def in_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run `python -m linkrx` in a pseudo-terminal of COLUMNS columns. Returns exit code and output."""
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (24, int(environment.get("COLUMNS", "120"))))
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
    """A process of `linkrx dump`. The constructor returns when it captures. `messages` holds its first lines on standard error."""

    def __init__(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "linkrx"), **environment: str
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LINKRX_")}
        self.process = subprocess.Popen(
            [sys.executable, *program, "dump", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # bytes in a buffer of Python would be missing in end()
            env={**inherited, **environment},
        )
        self.messages: list[str] = []
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.messages.append(line.decode())
            if "listening on" in self.messages[-1]:
                return
        raise AssertionError(f"linkrx dump does not listen: {self.messages}")

    def line(self) -> str:
        """Wait for the next line of standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """End the process with the signal `number`, if given. Returns exit code, and the rest of standard output and standard error."""
        if number is not None:
            self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output.decode(), errors.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
