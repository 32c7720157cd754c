"""`linkrx dump -r` and `tcpdump -n -r` print the same addresses, ports, flags and lengths, packet for packet."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import captures
from support.captures import KUZNETZOV, NANOSECONDS, Interface, Recorded
from support.command_line import PATIENCE, linkrx_command
from support.frames import any_frame
from support.protocols import BAD, GOOD, tcp

from linkrx import _core

pytestmark = [
    pytest.mark.skipif(_core.reason is not None, reason=f"capture files take the C core: {_core.reason}"),
    pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump: apt install tcpdump"),
]

# tcpdump prints these differently. It dissects SCTP, LLDP and LLC. After an extension header it prints the ports without their
# addresses. For a later fragment it prints the offset, and no length.
OTHERWISE = {"sctp", "ipv6 extension", "later fragment", "ipv6 fragment", "lldp", "llc"}

# For an unknown EtherType tcpdump prints the length of the whole frame, and linkrx the length behind the link header. linkrx also
# prints the word "length" for DHCPv6 and for unknown IP protocols.
LENGTH_OTHERWISE = {"unknown ethertype", "unknown protocol", "dhcpv6"}

Facts = tuple[list[tuple[str, str]], list[str], list[str]]


def facts(line: str) -> Facts:
    """The addresses with ports, the flags, and the lengths in a line."""
    addresses = re.findall(r"([0-9a-f.:]+) > ([0-9a-f.:]+?)(?=[:,])", line)
    lengths = re.findall(r"\blength (\d+)|\((\d+)\)", line)
    # Newer versions of tcpdump show AE, the ninth flag (RFC 9768), as "e", like linkrx.
    flags = [found.removesuffix("e") or "non" for found in re.findall(r"Flags \[([^\]]*)\]", line)]
    return addresses, flags, [one or other for one, other in lengths]


def lines_of_tcpdump(path: Path, *options: str) -> list[str]:
    """tcpdump's line for each packet."""
    # A sanitizer's runtime is for this process only. Other programs may hang if it is preloaded.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = ["tcpdump", "-n", "-tt", "-r", str(path), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        env=environment,
        errors="replace",
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return without_times(done.stdout)


def lines_of_linkrx(path: Path, *options: str) -> list[str]:
    """linkrx's line for each packet."""
    done = linkrx_command("dump", "-tt", "-r", str(path), *options)
    assert (done.returncode, done.stderr) == (0, "")
    return without_times(done.stdout)


def without_times(output: str) -> list[str]:
    """The lines without times, and without the rows of bytes that tcpdump prints for some packets."""
    packets = re.split(r"^\d+\.\d{6} ", output, flags=re.MULTILINE)[1:]
    return [packet.split("\n\t")[0].removesuffix("\n") for packet in packets]


def recorded(frames: list[bytes], wire: Callable[[bytes], int] = len) -> list[Recorded]:
    """A pcap file of these frames, with times."""
    return [Recorded(frame, wire(frame), 1_700_000_000_000_000_000 + n) for n, frame in enumerate(frames)]


def both(tmp_path: Path, frames: list[bytes], lengths: Callable[[bytes], int] = len) -> list[tuple[str, str]]:
    """The lines of both programs for each frame."""
    path = tmp_path / "both.pcap"
    path.write_bytes(captures.pcap(recorded(frames, lengths)))
    return list(zip(lines_of_linkrx(path), lines_of_tcpdump(path), strict=True))


def test_every_protocol(tmp_path: Path) -> None:
    """For each protocol, the lines have the same addresses, ports, flags and lengths. Lines of TCP are equal except for a service name."""
    lines = both(tmp_path, list(GOOD.values()))
    for name, (ours, theirs) in zip(GOOD, lines, strict=True):
        if name in OTHERWISE:
            continue
        kept = slice(2) if name in LENGTH_OTHERWISE else slice(3)
        assert facts(ours)[kept] == facts(theirs)[kept], (name, ours, theirs)
        if name.startswith(("tcp", "icmp", "arp", "dns")) and name != "dns over tcp":
            assert theirs.removesuffix(": HTTP") == ours


def test_cut_everywhere(tmp_path: Path) -> None:
    """For frames cut at any place, linkrx's line has the addresses, ports and flags of tcpdump's line."""
    whole = [
        GOOD[name]
        for name in ("tcp syn", "dns answer", "icmp port unreachable", "arp request", "tcp over ipv6")
    ]
    frames = [(frame, size) for frame in whole for size in range(14, len(frame))]
    path = tmp_path / "cut.pcap"
    cut = [Recorded(frame[:size], len(frame), 10**18) for frame, size in frames]
    path.write_bytes(captures.pcap(cut))
    seen = 0
    for one, ours, theirs in zip(cut, lines_of_linkrx(path), lines_of_tcpdump(path), strict=True):
        addresses, flags, _ = facts(theirs)
        seen += bool(addresses)
        # linkrx prints the ports of a header that is cut after them.
        found = facts(ours)[0]
        assert not addresses or (found and all(map(str.startswith, found[0], addresses[0]))), (
            one,
            ours,
            theirs,
        )
        assert not flags or facts(ours)[1] == flags, (one, ours, theirs)
    assert seen > 100


def test_what_cannot_be(tmp_path: Path) -> None:
    """Each malformed header gets a marked line, without other addresses, ports or flags than tcpdump's."""
    for name, (ours, theirs) in zip(BAD, both(tmp_path, list(BAD.values())), strict=True):
        addresses, flags, _ = facts(theirs)
        if addresses:
            assert facts(ours)[0] == addresses, (name, ours, theirs)
        if flags:
            assert facts(ours)[1] == flags, (name, ours, theirs)
        assert "[" in ours or "missing!" in ours or name in ("ipv4 length zero", "terminal escapes"), (
            name,
            ours,
        )
        assert ours.isprintable()


@pytest.mark.samples
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_frames(tmp_path: Path, seed: int) -> None:
    """For random frames, some of them cut, the lines have the same addresses, ports and flags if tcpdump prints any."""
    chosen = random.Random(seed)
    frames = [any_frame(chosen) for _ in range(2000)]
    seen = 0
    for frame, (ours, theirs) in zip(frames, both(tmp_path, frames), strict=True):
        addresses, flags, _ = facts(theirs)
        # tcpdump dissects SCTP and LLC.
        if not addresses or "sctp" in theirs or frame[12:14] < b"\x06\x00":
            continue
        seen += 1
        assert facts(ours)[0][:1] == addresses[:1], (frame, ours, theirs)
        assert not flags or facts(ours)[1] == flags, (frame, ours, theirs)
    assert seen > 1000


@pytest.mark.parametrize("options", [(), ("-S",)])
def test_connections(tmp_path: Path, options: tuple[str, ...]) -> None:
    """For segments of several connections, in any order and with any numbers, the lines equal tcpdump's, with and without -S."""
    chosen = random.Random(5)
    edges = (0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 1000, 70_000)
    frames = []
    for _ in range(600):
        ports = chosen.choice([(40_000, 40_001), (40_001, 40_000), (40_000, 40_002), (40_002, 40_000)])
        blocks = struct.pack("!II", chosen.choice(edges), chosen.choice(edges)) * chosen.choice(
            (0, 0, 0, 1, 3)
        )
        options_of_tcp = b"\1\1\5" + bytes([2 + len(blocks)]) + blocks if blocks else b""
        frames.append(
            tcp(
                chosen.choice((0x10, 0x10, 0x18, 0x18, 0x18, 0x02, 0x12, 0x11, 0x04, 0x14)),
                bytes(chosen.choice((0, 0, 5, 700))),
                ports=ports,
                numbers=(chosen.choice(edges), chosen.choice(edges)),
                options=options_of_tcp,
                six=chosen.random() < 0.2,
            )
        )
    path = tmp_path / "connections.pcap"
    path.write_bytes(captures.pcap(recorded(frames)))
    assert lines_of_linkrx(path, *options) == lines_of_tcpdump(path, *options)


def in_every_form(frames: list[bytes]) -> dict[str, bytes]:
    """Capture files of every form that tcpdump reads."""
    packets = recorded(frames)
    only_ip = [frame[14:] for frame in frames if frame[12:14] in (b"\x08\x00", b"\x86\xdd")]
    cooked = [struct.pack("!HHH8sH", 0, 1, 6, frame[6:12] + bytes(2), 0x0800) for frame in frames]
    forms = {
        "microseconds": captures.pcap(packets),
        "nanoseconds": captures.pcap(packets, magic=NANOSECONDS),
        "kuznetzov": captures.pcap(packets, magic=KUZNETZOV),
        "big-endian": captures.pcap(packets, order=">"),
        "raw": captures.pcap(recorded(only_ip), link_type=captures.RAW),
        "cooked": captures.pcap(
            [
                Recorded(head[:14] + frame[12:], len(frame) + 2, 10**18)
                for head, frame in zip(cooked, frames, strict=True)
            ],
            link_type=113,
        ),
    }
    for order in "<>":
        forms["pcapng " + order] = (
            captures.section(order)
            + Interface(name="eth7").block(order)
            + b"".join(
                captures.enhanced(order, 0, 1_700_000_000_000_000 + n, frame, len(frame))
                for n, frame in enumerate(frames)
            )
        )
    return forms


@pytest.mark.parametrize("form", sorted(in_every_form([])))
def test_every_form_of_file(tmp_path: Path, form: str) -> None:
    """In files of every form and link type, addresses, ports, flags and lengths equal tcpdump's."""
    # tcpdump does not dissect an outer IEEE 802.1ad tag behind a cooked header.
    left_out = OTHERWISE | LENGTH_OTHERWISE | ({"two vlans"} if form == "cooked" else set())
    frames = [frame for name, frame in GOOD.items() if name not in left_out]
    path = tmp_path / "file"
    path.write_bytes(in_every_form(frames)[form])
    lines = list(zip(lines_of_linkrx(path), lines_of_tcpdump(path), strict=True))
    assert len(lines) > 30
    for ours, theirs in lines:
        assert facts(ours) == facts(theirs), (ours, theirs)
