"""The lines of `linkrx dump`: a packet with any bytes gets a line, without control characters."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.protocols import BAD, GOOD, dns, ethernet, icmp, ipv4, name, tcp, udp, vlan

from linkrx.cli.dissection import ALL, CHECKED, LINE, dissect
from linkrx.cli.lines import Sequences, hexadecimal, line, sequences, times

DEPTHS = (LINE, ALL, CHECKED)
PROTOCOLS = (0, 0x0800, 0x0806, 0x86DD, 0x8100, 0x88B5)


def shown(frame: bytes, wire_length: int | None = None, *, verbose: bool = False, **known: Any) -> str:
    """The line of a frame."""
    length = len(frame) if wire_length is None else wire_length
    depth = CHECKED if verbose else LINE
    return line(
        dissect(frame, length, **{"ethernet": True, "depth": depth, **known}), length, verbose=verbose
    )


def check(frame: bytes, wire_length: int, **known: Any) -> None:
    """Assert that a frame gives one line of printable characters and a JSON object, at every depth."""
    for depth in DEPTHS:
        fields = dissect(frame, wire_length, depth=depth, **known)
        for verbose in {depth == CHECKED, False}:
            for link in {depth != LINE, False}:
                text = line(fields, wire_length, link=link, verbose=verbose)
                assert text.isprintable(), text
                assert text
        assert json.loads(json.dumps(fields)) == fields


def every_frame() -> Iterator[bytes]:
    """Frames of every protocol, valid and invalid."""
    yield from GOOD.values()
    yield from BAD.values()


def test_cut_at_every_place() -> None:
    """Each frame, cut at every place, gets a line, both as a short frame and as a longer frame that was cut."""
    for frame in every_frame():
        for size in range(len(frame) + 1):
            check(frame[:size], len(frame), ethernet=True)
            check(frame[:size], size, ethernet=True)


def test_without_a_link_header() -> None:
    """Each packet without a link header, cut at every place, gets a line if the kernel reports its protocol."""
    for frame in every_frame():
        protocol = int.from_bytes(frame[12:14], "big")
        for size in range(0, len(frame) - 13, 3):
            check(
                frame[14 : 14 + size], len(frame) - 14, ethernet=False, protocol=protocol, sender=frame[6:12]
            )


@given(st.binary(max_size=300), st.sampled_from(PROTOCOLS), st.integers(0, 70_000))
def test_any_bytes(data: bytes, protocol: int, longer: int) -> None:
    """Random bytes get a line, with and without a link header in front."""
    check(data, len(data) + longer, ethernet=True, tag=(0x8100, protocol))
    check(data, len(data) + longer, ethernet=False, protocol=protocol)
    check(bytes(12) + protocol.to_bytes(2, "big") + data, 14 + len(data) + longer, ethernet=True)


@given(st.data())
def test_any_bytes_in_a_good_frame(data: st.DataObject) -> None:
    """Frames of every protocol get a line after random bytes were changed, inserted and removed."""
    frame = bytearray(data.draw(st.sampled_from(sorted(GOOD.values()))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(12, len(frame) - 1))
        new = data.draw(st.binary(max_size=4))
        frame[at : at + data.draw(st.integers(0, 4))] = new
        if len(frame) < 14:
            frame += bytes(14)
    check(bytes(frame), data.draw(st.sampled_from((len(frame), len(frame) + 1, 70_000))), ethernet=True)


def test_checksums() -> None:
    """-v reports a correct checksum for every valid TCP, UDP, ICMP and ICMPv6 message, and a wrong one after a byte was changed."""
    right = {"tcp": "(correct)", "udp": "[udp sum ok]", "dns": "[udp sum ok]"}
    tried = 0
    for title, frame in GOOD.items():
        kind = title.split()[0]
        if kind not in ("tcp", "udp", "dns", "icmp", "icmpv6") or title == "dns over tcp":
            continue
        tried += 1
        text = shown(frame, verbose=True)
        assert "incorrect" not in text
        assert right.get(kind, "") in text
        wrong = frame[:-1] + bytes([frame[-1] ^ 0xFF])
        changed = shown(wrong, verbose=True)
        assert "incorrect" in changed, changed
        # The checksum of a cut packet cannot be verified.
        assert "incorrect" not in shown(frame[:-1], len(frame), verbose=True)
    assert tried > 20


def test_checksum_of_the_ipv4_header() -> None:
    """-v reports a wrong checksum of the IPv4 header."""
    frame = GOOD["udp"]
    assert "bad cksum" not in shown(frame, verbose=True)
    assert ", bad cksum)" in shown(frame[:22] + b"\x11" + frame[23:], verbose=True)


MACS = "02:00:00:00:00:02 > 02:00:00:00:00:01"
UNKNOWN = "ethertype Unknown (0x88b5)"


@pytest.mark.parametrize(
    ("frame", "known", "without", "with_header"),
    [
        (b"", {}, "length 4: 0102 0304", "length 4: 0102 0304"),
        (
            b"",
            {"protocol": 0x88B5, "sender": b"\2\0\0\0\0\1"},
            f"{UNKNOWN}, length 4: 0102 0304",
            f"02:00:00:00:00:01, length 4: {UNKNOWN}: 0102 0304",
        ),
        (
            ethernet(0x88B5, b""),
            {},
            f"{MACS}, {UNKNOWN}, length 4: 0102 0304",
            f"{MACS}, {UNKNOWN}, length 18: 0102 0304",
        ),
        (
            vlan(ethernet(0x88B5, b""), 5),
            {},
            f"vlan 5, p 0, {MACS}, {UNKNOWN}, length 4: 0102 0304",
            f"{MACS}, ethertype 802.1Q (0x8100), length 22: vlan 5, p 0, {UNKNOWN}: 0102 0304",
        ),
    ],
    ids=["no header", "sender", "ethernet", "vlan"],
)
def test_an_unknown_protocol(frame: bytes, known: dict[str, Any], without: str, with_header: str) -> None:
    """The line of an unknown protocol has its addresses, EtherType, length and first bytes once, with and without -e."""
    fields = dissect(frame + b"\1\2\3\4", len(frame) + 4, ethernet=bool(frame), depth=ALL, **known)
    assert line(fields, len(frame) + 4) == without
    assert line(fields, len(frame) + 4, link=True) == with_header


def test_no_checksum() -> None:
    """-v reports no wrong checksum for a datagram without checksum."""
    frame = GOOD["ipv4 options"]
    assert "[no cksum] UDP, length 5" in shown(frame, verbose=True)


def test_vlan_tags() -> None:
    """Tags in the frame, and the tag that the kernel took out, are printed from the outside in."""
    frame = vlan(tcp(0x02), 7)
    assert shown(frame, tag=(0x88A8, 0x2009)).startswith("vlan 9, p 1, vlan 7, p 0, IP 10.0.0.1.1000 >")
    assert shown(vlan(tcp(0x02), 0x1007)).startswith("vlan 7, p 0, DEI, IP ")


def test_link_header() -> None:
    """-e prints the addresses, the EtherType and the length, and does not repeat the protocol."""
    frame = GOOD["udp"]
    text = line(dissect(frame, 47, ethernet=True), 47, link=True)
    assert text == (
        "02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype IPv4 (0x0800), length 47: "
        "10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5"
    )
    cooked = dissect(frame[14:], 33, ethernet=False, protocol=0x0800, sender=frame[6:12])
    assert line(cooked, 33, link=True) == (
        "02:00:00:00:00:02, length 33: IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5"
    )


def test_header_fields() -> None:
    """-v prints the fields of the IP header in front of the addresses, in the same line."""
    assert shown(GOOD["udp"], verbose=True) == (
        "IP (tos 0x0, ttl 64, id 7, offset 0, flags [DF], proto UDP (17), length 33) "
        "10.0.0.1.1000 > 10.0.0.2.2000: [udp sum ok] UDP, length 5"
    )
    assert shown(GOOD["udp over ipv6"], verbose=True) == (
        "IP6 (hlim 64, next-header UDP (17) payload length: 13) "
        "fd00::1.1000 > fd00::2.2000: [udp sum ok] UDP, length 5"
    )


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("vlan", "vlan 5, p 1, IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 5"),
        ("first fragment", "IP 10.0.0.1.1000 > 10.0.0.2.2000: UDP, length 1000"),
        ("later fragment", "IP 10.0.0.1 > 10.0.0.2: UDP, fragment at 80, length 80"),
        ("ipv6 extension", "IP6 fd00::1.1000 > fd00::2.2000: hop-by-hop UDP, length 0"),
        (
            "lldp",
            "02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype LLDP (0x88cc), length 11: 0207 0402 0000 0000 0100 00",
        ),
        (
            "dhcp discover",
            "IP 0.0.0.0.68 > 255.255.255.255.67: BOOTP/DHCP, Request from 02:00:00:00:00:02, length 255, Discover, "
            'xid 0x1234, Requested-IP 10.0.0.5, Hostname "box"',
        ),
        (
            "dhcp ack",
            "IP 10.0.0.1.67 > 10.0.0.2.68: BOOTP/DHCP, Reply, length 250, ACK, xid 0x1234, Your-IP 10.0.0.5, "
            "Server-ID 10.0.0.1",
        ),
    ],
)
def test_lines_that_differ_from_tcpdump(title: str, text: str) -> None:
    """VLANs, fragments, extension headers, unknown EtherTypes and DHCP have these lines."""
    assert shown(GOOD[title]) == text


@pytest.mark.parametrize(
    ("title", "mark"),
    [
        ("ipv4 version", "[malformed: IP version 5]"),
        ("ipv4 short header", "[malformed: an IPv4 header of 8 bytes]"),
        ("ipv4 length above frame", "truncated-ip - 20 bytes missing!"),
        ("tcp long header", "[malformed: a TCP header of 60 bytes in 20]"),
        ("udp length below header", "[malformed: a UDP length of 3]"),
        ("dns name that loops", "[malformed: a DNS name that points forward]"),
        ("dns more than there is", "[|domain]"),
        ("dhcp option too long", "[|dhcp]"),
        ("terminal escapes", r"A? \x1b[31mred\x0a."),
    ],
)
def test_invalid_fields_are_named(title: str, mark: str) -> None:
    """A line names the invalid field after the valid parts of a packet."""
    assert mark in shown(BAD[title])


def test_names_are_bounded() -> None:
    """A DNS name is at most 255 bytes, although pointers could make it longer, and the parser stops at a thousand pointers."""
    long = udp((53, 9), dns(0x8180, [(".".join(["x" * 60] * 5), 1)], []))
    assert "a DNS name of more than 255 bytes" in shown(long)
    pointers = b"".join((0xC000 | 12 + 2 * max(n - 1, 0)).to_bytes(2, "big") for n in range(1000))
    made = udp((53, 9), (bytes(5) + b"\1" + bytes(6) + pointers)[: 12 + 2000])
    assert shown(made)


def test_quotes_and_backslashes_in_names() -> None:
    """Quotes and backslashes in DNS texts and host names are escaped, so they cannot imitate other words of the line."""
    answer = udp((53, 9), dns(0x8180, [], [(name("x"), 16, b'\x08a"b\\c\x7f\xff!')]))
    assert r'TXT "a\"b\x5cc\x7f\xff!"' in shown(answer)


def test_an_error_that_quotes_an_error() -> None:
    """ICMP errors nested in each other cause no recursion."""
    body = b""
    for _ in range(2000):
        body = ipv4(1, b"\3\1\0\0" + bytes(4) + body)
        if len(body) > 60_000:
            break
    check(ethernet(0x0800, body), len(body) + 14, ethernet=True)
    assert "ICMP host 10.0.0.2 unreachable" in shown(icmp(3, 1, bytes(4) + body[:1000]))


def test_no_more_connections_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more connections than the limit, the oldest are forgotten, and the others are kept."""
    monkeypatch.setattr(sequences, "CONNECTIONS_MOST", 4)
    numbers = Sequences()

    def sequence(port: int) -> int:
        frame = tcp(0x10, b"x", ports=(port, 9), numbers=(500, 100))
        fields = dissect(frame, len(frame), ethernet=True)
        numbers.count(fields)
        return int(fields["tcp"]["sequence"])

    assert [sequence(port) for port in range(10)] == [500] * 10
    assert [sequence(port) for port in (6, 7, 8, 9)] == [0] * 4
    assert [sequence(port) for port in (5, 4)] == [500] * 2


def test_rows_of_bytes() -> None:
    """-x and -X print sixteen bytes per row, in words, and -X also the printable characters."""
    data = bytes(range(0x41, 0x41 + 18)) + b"\x1b"
    assert hexadecimal.rows(data, readable=False) == (
        "\n\t0x0000:  4142 4344 4546 4748 494a 4b4c 4d4e 4f50\n\t0x0010:  5152 1b"
    )
    assert hexadecimal.rows(data, readable=True) == (
        "\n\t0x0000:  4142 4344 4546 4748 494a 4b4c 4d4e 4f50  ABCDEFGHIJKLMNOP"
        "\n\t0x0010:  5152 1b                                  QR."
    )
    assert hexadecimal.rows(b"", readable=True) == ""


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """-t to -tttt print no time, seconds since 1970, the time since the previous packet, and date and time. The default is the time of day."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    moment = 1_700_000_000_123_456_789
    later = moment + 3_661_000_001_000
    expected = [
        ["22:13:20.123456 ", "23:14:21.123457 ", "--:--:--.------ "],
        ["", "", ""],
        ["1700000000.123456 ", "1700003661.123457 ", "-.------ "],
        [" 00:00:00.000000 ", " 01:01:01.000001 ", " --:--:--.------ "],
        ["2023-11-14 22:13:20.123456 ", "2023-11-14 23:14:21.123457 ", "----------  --:--:--.------ "],
    ]
    for asked, texts in enumerate(expected):
        stamp = times.stamp(asked)
        assert [stamp(moment), stamp(later), stamp(None)] == texts
    backwards = times.stamp(3)
    assert [backwards(later), backwards(moment)] == [" 00:00:00.000000 ", "-01:01:01.000001 "]
    assert times.iso(moment) == "2023-11-14T22:13:20.123456789Z"
    assert times.iso(-1) == "1969-12-31T23:59:59.999999999Z"
    for extreme in (-(2**63), 2**63 - 1):
        for asked in range(5):
            assert times.stamp(asked)(extreme).isprintable()
        assert times.iso(extreme)
    monkeypatch.undo()
    time.tzset()


def test_every_name_is_documented() -> None:
    """docs/dump.md lists each name of a JSON object, and each name within the object of a protocol."""
    text = (Path(__file__).parents[2] / "docs" / "dump.md").read_text().partition("## JSON")[2]
    rows = {row.split("|")[1]: row for row in text.splitlines() if row.startswith("| `")}
    behind = text.partition("With `-v`")[2]
    with_header: dict[str, Any] = {"ethernet": True, "tag": (0x8100, 5)}
    without: dict[str, Any] = {"ethernet": False, "protocol": 0x0800, "sender": b"abcdef"}
    for frame in every_frame():
        for known in (with_header, without):
            for title, value in dissect(frame, len(frame), depth=CHECKED, **known).items():
                row = next(row for names, row in rows.items() if f"`{title}`" in names)
                for inner in names_within(value):
                    assert f"`{inner}`" in row or f"`{inner}`" in behind, (title, inner)


def names_within(value: Any) -> set[str]:
    """The names in nested objects, at any depth."""
    if isinstance(value, list):
        return set().union(*map(names_within, value))
    if not isinstance(value, dict):
        return set()
    return set(value) | set().union(*map(names_within, value.values()))
