"""Valid and invalid filters: expressions compiled by libpcap, instructions, and the error for each mistake."""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support.frames import any_expression, any_frame, tagged
from support.programs import in_core

import linkrx
from linkrx import _core
from linkrx.kernel import bpf
from linkrx.kernel.bpf import Filtered
from linkrx.memory.framing import OF_FILE
from linkrx.sources import filters, libpcap
from linkrx.sources.capabilities import Capabilities

ACCEPT = (6, 0, 0, 262144)
ETHERNET = Capabilities("tap", socket=False, largest_frame=65_664, ethernet=True, interface="tap0")
RAW = Capabilities("tun", socket=False, largest_frame=65_664, ethernet=False, interface="tun0")
UNBOUND = Capabilities("packet", socket=True, largest_frame=65_664)

needs_libpcap = pytest.mark.skipif(
    isinstance(libpcap._library(), str), reason=f"compiles expressions: {libpcap._library()}"
)
needs_tcpdump = pytest.mark.skipif(shutil.which("tcpdump") is None, reason="compares with tcpdump: not here")

DDD = "4\n40 0 0 12\n21 0 1 2048\n6 0 0 262144\n6 0 0 0\n"


def test_ddd() -> None:
    """parse_ddd() makes instructions from the output of `tcpdump -ddd`, and `filter=` accepts them."""
    parsed = linkrx.parse_ddd(DDD)
    assert parsed == [(40, 0, 0, 12), (21, 0, 1, 2048), (6, 0, 0, 262144), (6, 0, 0, 0)]
    assert filters.compiled(parsed, ETHERNET, ethernet=True).instructions == tuple(parsed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the first line says nothing, but 0 instructions follow"),
        ("2\n6 0 0 1\n", "the first line says 2, but 1 instructions follow"),
        ("(000) ldh [12]\n", "line 1 is '(000) ldh [12]'"),
        ("1\n6 0 0\n", "line 2 is '6 0 0'"),
        ("1\n{ 0x6, 0, 0, 0x00040000 },\n", "line 2 is"),
    ],
)
def test_ddd_of_another_form(text: str, says: str) -> None:
    """parse_ddd() raises an error that shows the line for text that `tcpdump -ddd` does not print."""
    with pytest.raises(ValueError, match=re.escape(says)):
        linkrx.parse_ddd(text)


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ([], ValueError, "there is no instruction"),
        ([(6, 0, 0)], TypeError, "instruction 0 of the filter is (6, 0, 0): give four ints"),
        ([ACCEPT, "ret"], TypeError, "instruction 1 of the filter is 'ret'"),
        ([(6, 0, 0, 1.0)], TypeError, "give four ints"),
        ([(6, 256, 0, 1)], ValueError, "jt is from 0 to 255"),
        ([(6, 0, 0, -1)], ValueError, "k is from 0 to 4294967295"),
        ([(2**16, 0, 0, 0)], ValueError, "code is from 0 to 65535"),
        (
            [(5, 0, 0, 2**32 - 1), ACCEPT],
            ValueError,
            "instruction 0 of the filter (5, 0, 0, 4294967295): it jumps",
        ),
        ([(21, 0, 9, 0), ACCEPT], ValueError, "it jumps 9 instructions on, and 1 follow"),
        ([ACCEPT] * 5000, ValueError, "the kernel takes 4096 instructions at most"),
        ([(0x34, 0, 0, 0), ACCEPT], ValueError, "it divides by zero"),
        ([(0, 0, 0, 0)], ValueError, "the last instruction is no return"),
        (b"udp", TypeError, "give an expression such as 'udp port 53'"),
        (53, TypeError, "give an expression such as 'udp port 53'"),
        ("udp\0port", ValueError, "printable characters only"),
        ("udp\nport", ValueError, "printable characters only"),
    ],
)
def test_wrong_filters(given: object, kind: type[Exception], says: str) -> None:
    """`open` and `choose` refuse each invalid filter with an error that shows the position."""
    with pytest.raises(kind, match=re.escape(says)):
        linkrx.choose("lo", filter=given)  # type: ignore[arg-type]


@needs_libpcap
@pytest.mark.parametrize("expression", ["ip6 protochain 58", "ip protochain 6", "udp or ip6 protochain 17"])
@pytest.mark.parametrize("link_type", [1, 101, 113, 276])
def test_expressions_with_a_loop(expression: str, link_type: int) -> None:
    """libpcap compiles `protochain` to a program with a loop. Every source refuses it, and no such program runs."""
    for source in (ETHERNET, RAW, UNBOUND):
        with pytest.raises(linkrx.UnsupportedOption, match=r"`protochain` needs a loop.* backwards"):
            filters.compiled(expression, source, ethernet=source is ETHERNET)
    with pytest.raises(linkrx.UnsupportedOption, match=r"`protochain` needs a loop.* backwards"):
        filters.for_file(expression, OF_FILE | link_type)


@needs_libpcap
def test_expressions_that_compile_to_many_instructions() -> None:
    """A program that is too long for the kernel is refused with its length. A capture file takes it, as tcpdump does."""
    expression = " or ".join(f"ip[{at}] = {value}" for at in range(40) for value in range(60))
    with pytest.raises(
        linkrx.UnsupportedOption, match="the kernel takes 4096 instructions at most"
    ) as caught:
        filters.compiled(expression, ETHERNET, ethernet=True)
    assert len(str(caught.value)) < 600
    assert len(filters.for_file(expression, OF_FILE | 1).instructions) > bpf.INSTRUCTIONS_MOST


@needs_libpcap
@pytest.mark.parametrize(
    ("expression", "says", "place"),
    [
        ("udp port port", "syntax error, at character 10", 9),
        ("udp and and tcp", "syntax error, at character 9", 8),
        ("ip and (tcp or", "syntax error, at its end", 14),
        ("tcp[13 and udp", "syntax error, at character 8", 7),
        ("udp port nosuch", "unknown port 'nosuch', at character 10", 9),
        ("port 70000", "illegal port number 70000 > 65535, at character 6", 5),
        ("net 1.2.3.4/8", "at character 5", 4),
    ],
)
def test_mistakes_in_expressions(expression: str, says: str, place: int) -> None:
    """The error for an invalid expression has the expression, libpcap's message, the position, and a line that points to it."""
    with pytest.raises(ValueError, match="libpcap says: ") as caught:
        filters.compiled(expression, ETHERNET, ethernet=True)
    lines = str(caught.value).splitlines()
    assert repr(expression) in lines[0]
    assert says in lines[0]
    assert lines[1:] == [f"  {expression}", f"  {' ' * place}^"]


@needs_libpcap
def test_an_expression_for_another_link_type() -> None:
    """An expression with Ethernet addresses on a source without them raises an error that names the link type."""
    with pytest.raises(
        ValueError, match="on frames of link type IP without a link header: libpcap says: ethernet"
    ):
        filters.compiled("ether host 02:00:00:00:00:01", RAW, ethernet=False)
    with pytest.raises(ValueError, match="no VLAN support for"):
        filters.compiled("vlan 5", UNBOUND, ethernet=True)


def test_without_libpcap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libpcap the error names Debian's package, and instructions still work."""
    monkeypatch.setattr(libpcap, "_NAMES", ("libpcap-that-is-nowhere.so",))
    libpcap._library.cache_clear()
    try:
        with pytest.raises(
            linkrx.UnsupportedOption, match=r"apt install libpcap0\.8.*Instructions need no libpcap"
        ):
            filters.compiled("udp", ETHERNET, ethernet=True)
        assert filters.compiled([ACCEPT], ETHERNET, ethernet=True).instructions == (ACCEPT,)
    finally:
        libpcap._library.cache_clear()


@needs_libpcap
def test_relocated() -> None:
    """On a socket of several devices, an expression reads relative to the network header, and gets protocol and packet type by
    ancillary loads. An expression that reads the link header is refused.
    """
    program = filters.compiled("udp port 53 and inbound", UNBOUND, ethernet=True)
    operands = [
        k for code, _, _, k in program.instructions if code & 7 < 2 and code & 0xE0 in (0x20, 0x40, 0xA0)
    ]
    assert bpf.AD_PROTOCOL in operands
    assert bpf.AD_PKTTYPE in operands
    assert all(k >= bpf.NET_OFF % 2**32 for k in operands)
    with pytest.raises(linkrx.UnsupportedOption, match=r"reads the link header \(offset 6 of Linux cooked\)"):
        filters.compiled("link[6] = 2", UNBOUND, ethernet=True)


def _pcap(frames: list[bytes]) -> bytes:
    header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
    return header + b"".join(
        struct.pack("=IIII", number, 0, len(frame), len(frame)) + frame for number, frame in enumerate(frames)
    )


def _numbers(pcap: bytes) -> set[int]:
    at, found = 24, set()
    while at < len(pcap):
        number, _, size, _ = struct.unpack_from("=IIII", pcap, at)
        found.add(number)
        at += 16 + size
    return found


@needs_libpcap
@needs_tcpdump
@pytest.mark.parametrize("seed", range(2))
def test_tcpdump_agrees(seed: int, tmp_path: Path) -> None:
    """For thirty expressions and 300 frames, tcpdump on a file, Python and the core accept the same frames.

    Expressions with tags are applied to frames whose tag was taken out, as by the kernel.
    """
    chosen = random.Random(seed)
    frames = [any_frame(chosen) for _ in range(300)]
    tags = [chosen.choice((None, 5, 6, 0x2005)) for _ in frames]
    whole = [frame if tci is None else tagged(frame, tci) for frame, tci in zip(frames, tags, strict=True)]
    path = tmp_path / "frames.pcap"
    took = 0
    for number in range(30):
        speaks = number % 3 == 0
        expression = any_expression(chosen)
        expression = f"vlan {chosen.choice((5, 6))} and ({expression})" if speaks else expression
        path.write_bytes(_pcap(whole if speaks else frames))
        ran = subprocess.run(
            ["tcpdump", "-r", str(path), "-w", "-", expression], capture_output=True, check=True
        )
        program = filters.compiled(expression, ETHERNET, ethernet=True)
        assert program.tags == speaks
        expected = _numbers(ran.stdout)
        took += len(expected)
        for index, (frame, tci) in enumerate(zip(frames, tags, strict=True)):
            vlan = (0x8100, tci) if speaks and tci is not None else None
            packet = Filtered(frame, len(frame), vlan=vlan)
            for kept in (bpf.kept, in_core) if _core.lib is not None else (bpf.kept,):
                verdict = kept(program.instructions, packet, tags=program.tags)
                assert verdict == (len(frame) if index in expected else 0), (expression, frame.hex(), tci)
    assert took > 500
