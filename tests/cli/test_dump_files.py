"""`linkrx dump -r`: capture files as lines and as JSON, without any privilege."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import captures
from support.captures import Interface, Recorded
from support.command_line import ESCAPE, PATIENCE, in_terminal, linkrx_command, run
from support.protocols import BAD, GOOD

import linkrx
from linkrx import _core
from linkrx.cli.main import main

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)

START = 1_700_000_000_123_456_789


def recorded(frames: list[bytes]) -> list[Recorded]:
    """A pcap file of these frames, with a second between them."""
    return [Recorded(frame, len(frame), START + n * 10**9) for n, frame in enumerate(frames)]


@dataclass
class Done:
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def dump(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs `linkrx dump` in this process, because that is faster than a process of its own."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    def run_here(*arguments: str) -> Done:
        capfdbinary.readouterr()
        try:
            code = main(["dump", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        output, errors = capfdbinary.readouterr()
        return Done(code, output.decode(), errors.decode())

    yield run_here
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def every_protocol(tmp_path: Path) -> str:
    """A file with a packet of every protocol."""
    path = tmp_path / "every.pcap"
    path.write_bytes(captures.pcap(recorded(list(GOOD.values())), magic=captures.NANOSECONDS))
    return str(path)


@pytest.fixture
def two_interfaces(tmp_path: Path) -> str:
    """A pcapng file of two named interfaces, with one packet in and one out."""
    made = captures.section() + b"".join(
        Interface(name=name, resolution=9).block() for name in ("eth7", "br\x1b\n0")
    )
    for number, title in enumerate(("udp", "tcp syn")):
        options = captures.option("<", 2, struct.pack("<I", 1 + number)) + captures.option("<", 0, b"")
        frame = GOOD[title]
        made += captures.enhanced("<", number, START + number, frame, len(frame) + 100, options)
    path = tmp_path / "two.pcapng"
    path.write_bytes(made)
    return str(path)


def test_a_line_for_each_packet(every_protocol: str) -> None:
    """Into a pipe, dump prints a line for each packet, without escape codes, and nothing on standard error."""
    done = linkrx_command("dump", "-r", every_protocol, TZ="UTC")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(GOOD)
    assert ESCAPE not in done.stdout
    assert lines[0] == (
        "22:13:20.123456 IP 10.0.0.1.1000 > 10.0.0.2.80: Flags [S], seq 1, win 500, "
        "options [mss 1460,sackOK,TS val 1 ecr 2,nop,wscale 7], length 0"
    )
    assert lines[1].startswith("22:13:21.123456 IP 10.0.0.1.80 > 10.0.0.2.1000: Flags [S.]")


def test_from_standard_input(every_protocol: str) -> None:
    """`-r -` reads a file from standard input."""
    with open(every_protocol, "rb") as file:  # noqa: PTH123 - a descriptor for the child
        done = subprocess.run(
            [sys.executable, "-m", "linkrx", "dump", "-r", "-"],
            stdin=file,
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == len(GOOD)


def test_ctrl_c_while_a_pipe_has_no_more(every_protocol: str) -> None:
    """Ctrl-C ends a wait for a pipe, with a summary and exit code 0."""
    with subprocess.Popen(
        [sys.executable, "-m", "linkrx", "dump", "-r", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(Path(every_protocol).read_bytes())
        for _ in GOOD:
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        assert process.wait(PATIENCE) == 0
    assert errors.startswith(f"{len(GOOD)} packets captured\n")


def test_count_and_expression(every_protocol: str) -> None:
    """-c ends after that many packets that the expression accepts. The words of the expression are joined."""
    done = linkrx_command(
        "dump", "-r", every_protocol, "-t", "-c", "2", "udp", "port", "53", "and", "src 10.0.0.1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "IP 10.0.0.1.1234 > 10.0.0.2.53: 4321+ A? example.com. (29)",
        "IP 10.0.0.1.53 > 10.0.0.2.1234: 4321 2/0/0 A 1.2.3.4, A 5.6.7.8 (61)",
    ]


def test_expressions_that_look_at_the_link_header(dump: Run, every_protocol: str) -> None:
    """On a file of Ethernet frames an expression can use link addresses and VLANs, as on an interface."""
    done = dump("-r", every_protocol, "-t", "ether src 02:00:00:00:00:02 and vlan 5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "vlan 5, p 1, IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5\n"


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        ("-t", ["IP 10", "IP 10"]),
        ("-tt", ["1700000000.123456 IP", "1700000001.123456 IP"]),
        ("-ttt", [" 00:00:00.000000 IP", " 00:00:01.000000 IP"]),
        ("-tttt", ["2023-11-14 22:13:20.123456 IP", "2023-11-14 22:13:21.123456 IP"]),
        ("-te", ["02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype IPv4 (0x0800), length 74: 10"] * 1),
        ("-tv", ["IP (tos 0x0, ttl 64, id 7, offset 0, flags [DF], proto TCP (6), length 60) 10"]),
        ("-tnl", ["IP 10", "IP 10"]),
    ],
)
def test_options_of_tcpdump(dump: Run, every_protocol: str, option: str, lines: list[str]) -> None:
    """-t, -e, -v, -n and -l work as in tcpdump, also combined behind one dash."""
    done = dump("-r", every_protocol, "-c", "2", option)
    assert (done.returncode, done.stderr) == (0, "")
    for line, start in zip(done.stdout.splitlines(), lines, strict=False):
        assert line.startswith(start)


def test_bytes(dump: Run, every_protocol: str) -> None:
    """-x prints the bytes behind the link header, -X also as characters, and each given twice prints the header too."""
    frame = GOOD["udp"]
    for option, data in (("-x", frame[14:]), ("-xx", frame), ("-X", frame[14:]), ("-XX", frame)):
        done = dump("-r", every_protocol, "-t", "-c", "1", option, "udp port 2000 and ip")
        head, *rows = done.stdout.splitlines()
        assert head == "IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5"
        shown = [row.partition(":  ")[2].split("  ")[0] for row in rows]
        assert bytes.fromhex("".join(shown)) == data
        assert rows[-1].endswith("hello"[-(len(data) % 16) :]) == (option in ("-X", "-XX"))


def test_interfaces_of_a_file(dump: Run, two_interfaces: str) -> None:
    """For a file with several interfaces each line has the interface's name, with escaped control characters, and marks outgoing packets."""
    done = dump("-t", "-r", two_interfaces)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("eth7 IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5")
    assert lines[1].startswith(r"br\x1b\n0 Out IP 10.0.0.1.1000 > 10.0.0.2.80: Flags [S]")
    for direction, count in (("in", 1), ("out", 1), ("inout", 2)):
        done = dump("-t", "-r", two_interfaces, "-Q", direction)
        assert len(done.stdout.splitlines()) == count


def test_json(dump: Run, two_interfaces: str) -> None:
    """--json prints one object per line, with the names in docs/dump.md."""
    done = dump("--json", "-x", "-r", two_interfaces)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "time": "2023-11-14T22:13:20.123456789Z",
        "interface": "eth7",
        "length": 147,
        "captured": 47,
        "ethernet": {"source": "02:00:00:00:00:02", "destination": "02:00:00:00:00:01", "type": 0x0800},
        "ipv4": {
            "source": "10.0.0.1",
            "destination": "10.0.0.2",
            "protocol": 17,
            "length": 33,
            "ttl": 64,
            "tos": 0,
            "id": 7,
            "dont_fragment": True,
        },
        "udp": {"source_port": 1000, "destination_port": 2000, "length": 5},
        "frame": GOOD["udp"].hex(),
    }
    assert second["direction"] == "out"
    assert second["interface"] == "br\x1b\n0"
    assert second["tcp"]["flags"] == "S"
    assert second["tcp"]["options"] == ["mss 1460", "sackOK", "TS val 1 ecr 2", "nop", "wscale 7"]


def test_json_of_every_protocol(dump: Run, every_protocol: str) -> None:
    """Every protocol has its object, and -v adds the state of checksums."""
    objects = [json.loads(line) for line in dump("--json", "-v", "-r", every_protocol).stdout.splitlines()]
    assert len(objects) == len(GOOD)
    by_title = dict(zip(GOOD, objects, strict=True))
    assert by_title["udp"]["udp"]["checksum_state"] == "ok"
    assert by_title["dns answer"]["dns"]["answers"][0] == {
        "name": "example.com.",
        "type": "A",
        "ttl": 300,
        "data": "1.2.3.4",
    }
    assert by_title["icmp port unreachable"]["icmp"]["quoted"]["destination_port"] == 53
    assert [tag["id"] for tag in by_title["two vlans"]["vlan"]] == [9, 7]
    assert by_title["dhcp discover"]["dhcp"]["message"] == "Discover"
    assert by_title["arp request"]["arp"]["target_ip"] == "10.0.0.2"


@pytest.mark.parametrize("form", ["pcap", "cap", "pcapng", "other"])
def test_recording_packets_of_a_file(dump: Run, every_protocol: str, tmp_path: Path, form: str) -> None:
    """-w records the packets that the expression accepts, as pcap if the file's name says so, else as pcapng."""
    out = tmp_path / f"out.{form}"
    done = dump("-r", every_protocol, "-w", str(out), "-c", "3", "arp")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [one.data for one in captures.read(out)] == [
        GOOD["arp request"],
        GOOD["arp reply"],
        GOOD["padding"],
    ]
    pcapng = out.read_bytes().startswith(b"\x0a\x0d\x0d\x0a")
    assert pcapng == (form not in ("pcap", "cap"))


def test_recording_to_a_pipe(every_protocol: str) -> None:
    """`-w -` writes a capture file to standard output, which `linkrx dump -r -` reads."""
    with subprocess.Popen(
        [sys.executable, "-m", "linkrx", "dump", "-r", every_protocol, "-w", "-"], stdout=subprocess.PIPE
    ) as writer:
        done = subprocess.run(
            [sys.executable, "-m", "linkrx", "dump", "-r", "-"],
            stdin=writer.stdout,
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
    assert (writer.returncode, done.returncode, done.stderr) == (0, 0, b"")
    assert done.stdout.count(b"\n") == len(GOOD)


def test_a_damaged_file(dump: Run, every_protocol: str, tmp_path: Path) -> None:
    """For a file that is cut, dump prints the whole packets and the position of the damage, and exits with 1."""
    path = tmp_path / "cut.pcap"
    path.write_bytes(Path(every_protocol).read_bytes()[:-1])
    done = dump("-r", str(path))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(GOOD) - 1
    assert re.fullmatch(r"linkrx: .*cut\.pcap is damaged at byte \d+: .*\n", done.stderr)


def test_frames_that_are_no_packets(dump: Run, tmp_path: Path) -> None:
    """Frames shorter than the link header are omitted, and standard error has their number."""
    path = tmp_path / "runts.pcap"
    path.write_bytes(captures.pcap(recorded([bytes(13), GOOD["udp"], bytes(5)])))
    done = dump("-t", "-r", str(path))
    assert (done.returncode, done.stdout) == (0, "IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5\n")
    assert done.stderr == "linkrx: 2 frames were shorter than a link header, and are left out\n"


def test_without_any_privilege(every_protocol: str) -> None:
    """A process without capabilities reads a file."""
    done = run("-c", UNPRIVILEGED, "dump", "-r", every_protocol)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(GOOD)


# capset(2) with the third version of its header (linux/capability.h): the process drops all capabilities.
UNPRIVILEGED = """
import ctypes, struct, sys
header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
assert ctypes.CDLL(None).capset(header, none) == 0
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("-r", "nowhere.pcap"), 1, "nowhere.pcap': No such file or directory"),
        (("-r", "/dev/null/x"), 1, "Not a directory"),
        (("-r", __file__), 1, "is no capture file"),
        (("-r", "EVERY", "udp port"), 2, "udp port"),
        (("-r", "EVERY", "-i", "lo"), 2, "-i INTERFACE and -r FILE exclude each other"),
        (("-r", "EVERY", "-s", "96"), 2, "-s is for capturing"),
        (("-r", "EVERY", "-p"), 2, "-p is for capturing"),
        (("-r", "EVERY", "-ttttt"), 2, "-t is given 5 times"),
        (("-r", "EVERY", "-w", "/dev/null", "--json"), 2, "-w FILE records packets and prints none"),
        (("-r", "EVERY", "-w", "/nowhere/x"), 1, "'/nowhere/x': No such file or directory"),
        (("-r", "EVERY", "-w", "/dev/full"), 1, "No space left on device"),
        (("-r", "EVERY", "-c", "0"), 2, "'0' is not a number of 1 or more"),
        (("-r", "EVERY", "--duration", "nan"), 2, "'nan' is not a number of seconds"),
        (("-r", "EVERY", "--backend", "carrier_pigeon"), 2, "there is no backend 'carrier_pigeon'"),
        (("-r", "EVERY", "--backend", "readv"), 1, "readv does not take this source"),
        (("-Q", "sideways"), 2, "invalid choice"),
        (("-w", "x"), 2, "give -i INTERFACE or -r FILE"),
        (("-i", "nowhere0"), 1, "nowhere0"),
    ],
)
def test_exit_codes(
    dump: Run, every_protocol: str, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    """The exit code is 1 if a file or the kernel refuses, and 2 for wrong usage, with an error and no traceback."""
    done = dump(*(every_protocol if word == "EVERY" else word for word in arguments))
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away(every_protocol: str, tmp_path: Path) -> None:
    """If the reader closes the pipe, dump ends without an error and with exit code 0, for lines and for a recording."""
    many = tmp_path / "many.pcap"
    many.write_bytes(captures.pcap(recorded(list(GOOD.values()) * 200)))
    for option in ((), ("--json",), ("-w", "-")):
        with subprocess.Popen(
            [sys.executable, "-m", "linkrx", "dump", "-r", str(many), *option],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert os.read(process.stdout.fileno(), 100)
            process.stdout.close()
            errors = process.stderr.read()
            assert (process.wait(PATIENCE), errors) == (0, b"")


def test_in_a_terminal(every_protocol: str) -> None:
    """In a terminal the lines are coloured if rich is installed. Without rich or with NO_COLOR they are as in a pipe."""
    plain = linkrx_command("dump", "-r", every_protocol).stdout.splitlines()
    code, output = in_terminal("dump", "-r", every_protocol, NO_COLOR="")
    assert code == 0
    assert (ESCAPE in output) == (find_spec("rich") is not None)
    assert re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() == plain
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, output = in_terminal("dump", "-r", every_protocol, **setting)
        assert (code, output.splitlines()) == (0, plain)


def test_no_capture_file_into_a_terminal(every_protocol: str) -> None:
    """`-w -` is refused if standard output is a terminal."""
    code, output = in_terminal("dump", "-r", every_protocol, "-w", "-")
    assert code == 2
    assert "which is a terminal" in output


def test_hostile_packets(dump: Run, tmp_path: Path) -> None:
    """Control characters in packets are not printed to a terminal or a file, and no packet causes a traceback."""
    path = tmp_path / "bad.pcap"
    path.write_bytes(captures.pcap(recorded(list(BAD.values()))))
    for options in ((), ("-v", "-e"), ("-X",), ("--json", "-v")):
        done = dump("-r", str(path), *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(line.expandtabs().isprintable() for line in done.stdout.splitlines())
    code, output = in_terminal("dump", "-r", str(path), NO_COLOR="1")
    assert code == 0
    assert ESCAPE not in output


def any_link_type() -> list[tuple[str, bytes]]:
    """Files of other link types."""
    frame = GOOD["udp"]
    one = [Recorded(frame[14:], len(frame) - 14, START)]
    cooked = struct.pack("!HHH8sH", 0, 1, 6, frame[6:12] + bytes(2), 0x0800)
    cooked2 = struct.pack("!HHIHBB8s", 0x0800, 0, 7, 1, 0, 6, frame[6:12] + bytes(2))
    null = [Recorded(struct.pack("<I", 2) + frame[14:], len(frame) - 10, START)]
    return [
        ("raw", captures.pcap(one, link_type=captures.RAW)),
        ("cooked", captures.pcap([Recorded(cooked + frame[14:], len(frame) + 2, START)], link_type=113)),
        ("cooked 2", captures.pcap([Recorded(cooked2 + frame[14:], len(frame) + 6, START)], link_type=276)),
        ("loopback", captures.pcap(null, link_type=0)),
    ]


@pytest.mark.parametrize(
    ("title", "data"), any_link_type(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_other_link_types(dump: Run, tmp_path: Path, title: str, data: bytes) -> None:
    """Packets without an Ethernet header, or of a cooked capture, have the same line. -e prints the sender if it is known."""
    path = tmp_path / "other.pcap"
    path.write_bytes(data)
    done = dump("-t", "-r", str(path))
    assert (done.stdout, done.stderr) == ("IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5\n", "")
    done = dump("-t", "-e", "-r", str(path))
    sender = "02:00:00:00:00:02, " if "cooked" in title else ""
    assert done.stdout == f"{sender}length 33: IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5\n"


def test_an_unknown_link_type(dump: Run, tmp_path: Path) -> None:
    """Packets of an unknown link type are printed as bytes."""
    path = tmp_path / "unknown.pcap"
    path.write_bytes(captures.pcap([Recorded(bytes(range(20)), 20, START)], link_type=147))
    done = dump("-t", "-r", str(path))
    assert done.stdout == "length 20: 0001 0203 0405 0607 0809 0a0b 0c0d 0e0f ...\n"
    with linkrx.open(linkrx.CaptureFile(io.BytesIO(path.read_bytes()))) as rx:
        assert [len(packet) for packet in rx] == [20]
