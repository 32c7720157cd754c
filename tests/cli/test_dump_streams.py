"""`linkrx dump` with standard streams that are closed, full, pipes or of another encoding, and with names that hold control characters."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support import captures
from support.captures import Interface, Recorded
from support.command_line import ESCAPE, PATIENCE, Capture, in_terminal, linkrx_command
from support.protocols import GOOD

import linkrx
from linkrx import _core
from linkrx.cli.dump import ending_on_signals
from linkrx.testing import rigs
from linkrx.testing.devices import injector_on

needs_core = pytest.mark.skipif(_core.reason is not None, reason=f"takes the C core: {_core.reason}")

START = 1_700_000_000_000_000_000
FRAME = GOOD["udp"]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A file with one packet."""
    path = tmp_path / "one.pcap"
    path.write_bytes(captures.pcap([Recorded(FRAME, len(FRAME), START)]))
    return path


def pcapng(interfaces: list[Interface], frames: list[bytes]) -> bytes:
    """A file with one frame of each interface."""
    return b"".join(
        (
            captures.section(),
            *(interface.block() for interface in interfaces),
            *(captures.enhanced("<", n, 0, frame, len(frame)) for n, frame in enumerate(frames)),
        )
    )


def shell(*arguments: str, redirect: str) -> tuple[int, bytes, str]:
    """Run `linkrx dump` from a shell that redirects its streams. Returns exit code, standard output and standard error."""
    command = shlex.join([sys.executable, "-m", "linkrx", "dump", *arguments])
    done = subprocess.run(
        ["sh", "-c", f"exec {command} {redirect}"], capture_output=True, timeout=PATIENCE, check=False
    )
    return done.returncode, done.stdout, done.stderr.decode()


@needs_core
@pytest.mark.parametrize(
    ("arguments", "redirect"),
    [
        (("-r", "ONE"), ">&-"),
        (("-r", "ONE", "--json"), ">&-"),
        (("-r", "ONE", "-w", "-"), ">&-"),
        (("-r", "-"), "<&-"),
        ((), ">&-"),
        (("-r", "ONE"), "<&- >&-"),
    ],
)
def test_closed_streams(one: Path, arguments: tuple[str, ...], redirect: str) -> None:
    """If a standard stream that dump needs is closed, dump prints one error and exits with 1."""
    code, output, errors = shell(
        *(str(one) if word == "ONE" else word for word in arguments), redirect=redirect
    )
    assert (code, output) == (1, b"")
    assert errors.startswith("linkrx: ")
    assert "Bad file descriptor" in errors
    assert errors.count("\n") == 1


@needs_core
def test_closed_streams_that_are_not_needed(one: Path, tmp_path: Path) -> None:
    """A recording to a file works with all standard streams closed, and none of its descriptors becomes a standard stream."""
    out = tmp_path / "out.pcap"
    assert shell("-r", str(one), "-w", str(out), redirect="<&- >&- 2>&-") == (0, b"", "")
    assert [one.data for one in captures.read(out)] == [FRAME]


@needs_core
@pytest.mark.usefixtures("devices")
def test_a_recording_without_standard_error(tmp_path: Path) -> None:
    """With standard error closed, `-w -` has no sentences between its packets."""
    out = tmp_path / "out.pcapng"
    code, output, errors = shell("-i", "lo", "--duration", "0.1", "-w", "-", redirect="2>&-")
    assert (code, errors) == (0, "")
    out.write_bytes(output)
    assert list(captures.read(out)) == []
    assert shell("-r", str(tmp_path / "nowhere"), redirect="2>&-") == (1, b"", "")


@needs_core
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_full_disk(one: Path, option: tuple[str, ...]) -> None:
    """If standard output is full, dump prints an error about it and exits with 1."""
    code, _, errors = shell("-r", str(one), *option, redirect=">/dev/full")
    assert (code, errors) == (1, "linkrx: '<stdout>': No space left on device\n")


@needs_core
@pytest.mark.usefixtures("devices")
def test_the_reader_of_a_recording_that_goes_away() -> None:
    """If the reader of `-w -` closes the pipe, dump ends with exit code 0, even if no more packet comes."""
    with rigs.veth() as (near, _), Capture("-i", near, "-w", "-", "udp port 7") as capture:
        assert capture.process.stdout is not None
        assert os.read(capture.process.stdout.fileno(), 4) == struct.pack("=I", 0x0A0D0D0A)
        capture.process.stdout.close()
        assert capture.process.wait(PATIENCE) == 0


@needs_core
def test_encodings(tmp_path: Path) -> None:
    """A name in the encoding of standard output is printed as it is. A character that the encoding does not have is an escape."""
    path = tmp_path / "named.pcapng"
    name = "é→ě"
    path.write_bytes(pcapng([Interface(name=name), Interface(name="b")], [FRAME]))
    for encoding in ("utf-8", "latin-1", "ascii"):
        done = subprocess.run(
            [sys.executable, "-m", "linkrx", "dump", "-t", "-r", str(path)],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(name.encode(encoding, "backslashreplace") + b" IP ")
        assert encoding == "utf-8" or ESCAPE not in done.stdout.decode(encoding)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_lists_in_another_encoding(encoding: str) -> None:
    """The list of interfaces, and doctor, print a name in every encoding of standard output, and never a control character."""
    with rigs.interface("é→\x1b[31m"):
        for arguments in (("dump",), ("doctor", "é→\x1b[31m")):
            done = subprocess.run(
                [sys.executable, "-m", "linkrx", *arguments],
                env={**os.environ, "PYTHONIOENCODING": encoding},
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, b"")
            assert "é→".encode(encoding, "backslashreplace") in done.stdout
            assert ESCAPE.encode() not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("-r", "\x1b[31m"),
        ("-i", "\x1b[31m"),
        ("-r", "ONE", "-w", "nowhere/\x1b[31m"),
        ("-r", "ONE", "udp\x1b[31m"),
        ("-r", "DAMAGED"),
    ],
)
def test_control_characters_in_arguments(one: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """An error escapes the control characters in names of files and interfaces."""
    damaged = tmp_path / "\x1b[31m\x9b31m\u202e.pcap"
    damaged.write_bytes(one.read_bytes()[:-1])
    named = {"ONE": str(one), "DAMAGED": str(damaged)}
    done = linkrx_command("dump", *(named.get(word, word) for word in arguments))
    assert done.returncode in (1, 2)
    assert "\\x1b[31m" in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


@needs_core
def test_overwriting_what_is_read(one: Path, tmp_path: Path) -> None:
    """-w refuses the file that -r reads, under each of its names, and leaves it as it is."""
    before = one.read_bytes()
    (tmp_path / "hard.pcap").hardlink_to(one)
    (tmp_path / "soft.pcap").symlink_to(one)
    for name in (one, tmp_path / "hard.pcap", tmp_path / "soft.pcap"):
        done = linkrx_command("dump", "-r", str(one), "-w", str(name))
        assert done.returncode == 2, done.stderr
        assert "is the file that -r reads" in done.stderr
    for arguments, redirect in (
        (("-r", "-", "-w", str(one)), f"<{one}"),
        (("-r", str(one), "-w", "-"), f">>{one}"),
    ):
        code, _, errors = shell(*arguments, redirect=redirect)
        assert code == 2
        assert "is the file that -r reads" in errors
    assert one.read_bytes() == before


@needs_core
def test_packets_that_the_recording_cannot_have(tmp_path: Path) -> None:
    """A packet that the file cannot have ends the recording with a sentence and exit code 1. The packets before it are recorded."""
    path, out = tmp_path / "two.pcapng", tmp_path / "out.pcap"
    path.write_bytes(pcapng([Interface(), Interface(link_type=captures.RAW)], [FRAME, FRAME[14:]]))
    done = linkrx_command("dump", "-r", str(path), "-w", str(out))
    assert done.returncode == 1
    assert "format='pcapng', which takes both; 1 packets are whole" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [one.data for one in captures.read(out)] == [FRAME]


@needs_core
def test_words_between_options(one: Path) -> None:
    """The words of the expression may stand before, between and after the options, as with tcpdump."""
    for line in (
        f"udp port 2000 -r {one} -c 1",
        f"-r {one} udp -c 1 port 2000",
        f"udp -r {one} port -c1 2000 -n",
    ):
        done = linkrx_command("dump", *line.split())
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("UDP") == 1
    for line in (f"-r {one} udp --nonsense port 2000", f"-r {one} udp -c 1 port 2000 -z"):
        done = linkrx_command("dump", *line.split())
        assert done.returncode == 2
        assert "unrecognized arguments" in done.stderr
    assert linkrx_command("doctor", "lo", "lo").returncode == 2


@needs_core
@pytest.mark.parametrize("name", ["-r", "-w"])
def test_empty_names(one: Path, name: str) -> None:
    """An empty file name gives an error that shows it."""
    done = linkrx_command("dump", *(("-r", str(one)) if name == "-w" else ()), name, "")
    assert done.returncode == 1
    assert "''" in done.stderr
    assert "No such file or directory" in done.stderr


@needs_core
@pytest.mark.usefixtures("devices")
def test_a_narrow_terminal(tmp_path: Path) -> None:
    """The line of progress is never wider than the terminal, so that it stays one line."""
    code, output = in_terminal(
        "dump", "-i", "lo", "-w", str(tmp_path / "out.pcap"), "--duration", "0.1", COLUMNS="20"
    )
    assert code == 0
    shown = [part for part in output.replace("\n", "\r").split("\r") if part.startswith("0 packets, ")]
    assert shown
    assert all(len(part) < 20 for part in shown)


def test_signals_that_come_twice() -> None:
    """SIGTERM and SIGHUP may come twice, as timeout(1) and shells send them. A later SIGINT ends at once. nohup(1) is respected."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, linkrx.open(ours) as rx, ending_on_signals(rx, live=True) as came:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
        assert len(came) == 4
        assert list(rx) == []
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs, linkrx.open(ours) as rx, ending_on_signals(rx, live=True) as came:
            signal.raise_signal(signal.SIGHUP)
            assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_core
@pytest.mark.usefixtures("devices")
def test_a_terminal_that_closes(tmp_path: Path) -> None:
    """SIGHUP ends a recording as Ctrl-C does: all packets that came before are in the file."""
    out = tmp_path / "out.pcapng"
    with (
        rigs.veth() as (near, far),
        injector_on(far) as incoming,
        Capture("-i", near, "-w", str(out), "udp port 2000") as capture,
    ):
        for _ in range(100):
            incoming.send(FRAME)
        code, _, errors = capture.end(signal.SIGHUP)
    assert code == 0
    assert "100 packets captured" in errors
    assert len(list(captures.read(out))) == 100
