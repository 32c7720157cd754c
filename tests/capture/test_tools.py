"""linkrx reads the capture files of other programs packet for packet, and they read linkrx's files."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from support import captures
from support.captures import KUZNETZOV, NANOSECONDS, Interface, Recorded, frame, read

import linkrx
from linkrx import _core
from linkrx.testing import rigs
from linkrx.testing.waiting import collect

pytestmark = pytest.mark.skipif(
    _core.reason is not None, reason=f"capture files take the C core: {_core.reason}"
)


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip the test if a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: apt install tshark tcpdump has it"
    )


# A sanitizer's runtime is for this process only. Other programs may hang if it is preloaded.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run(*command: str | Path, **options: Any) -> str:
    """Run a program. Returns its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, check=False, env=ENVIRONMENT, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode() if isinstance(done.stdout, bytes) else done.stdout


FIELDS = (
    "frame.time_epoch",
    "frame.cap_len",
    "frame.len",
    "frame.interface_name",
    "frame.packet_flags_direction",
)


def of_tshark(path: Path) -> list[tuple[bytes, int, int, str, bool]]:
    """Every packet that tshark reads: bytes, nanoseconds, true length, interface, direction."""
    fields = [option for field in FIELDS for option in ("-e", field)]
    # All protocols are disabled, because dissecting these random frames only takes time.
    common = ("tshark", "-n", "-r", path, "-o", "frame.generate_md5_hash:FALSE")
    lines = run(*common, "-T", "fields", *fields).splitlines()
    # The bytes are from the file that tshark writes.
    raw = path.with_suffix(".raw")
    run("tshark", "-n", "-r", path, "-F", "nsecpcap", "-w", raw)
    frames = records(raw.read_bytes())
    found = []
    for line, data in zip(lines, frames, strict=True):
        time, kept, length, name, direction = line.split("\t")
        seconds, _, fraction = time.partition(".")
        assert int(kept) == len(data)
        found.append(
            (data, int(seconds) * 10**9 + int(fraction), int(length), name, direction == "0x00000002")
        )
    return found


def named(packets: list[tuple[bytes, int, int, str, bool]]) -> list[tuple[bytes, int, int, str, bool]]:
    """An interface name. mergecap and tshark call an interface without a name unknown."""
    return [(*each[:3], "" if each[3] == "unknown" else each[3], each[4]) for each in packets]


def records(saved: bytes) -> list[bytes]:
    """The frames of a pcap file in this machine's byte order."""
    found, at = [], 24
    while at < len(saved):
        length = struct.unpack_from("=I", saved, at + 8)[0]
        found.append(saved[at + 16 : at + 16 + length])
        at += 16 + length
    return found


def of_linkrx(path: Path) -> list[tuple[bytes, int, int, str, bool]]:
    """Every packet that linkrx reads, as in `of_tshark`."""
    with linkrx.open(path) as rx:
        return [
            (
                packet.tobytes(),
                packet.timestamp_ns or 0,
                packet.wire_length,
                rx.interface_name(packet.interface) or "",
                packet.outgoing,
            )
            for packet in rx
        ]


def some_packets(unit: int = 1000) -> list[Recorded]:
    """Packets of many lengths, some of them cut."""
    chooses = random.Random(7)
    return [
        Recorded(
            frame(length, number), length + number % 5, 1_700_000_000_000_000_000 + number * 12_345 * unit
        )
        for number, length in enumerate([14, 60, 1514, 9000, *chooses.choices(range(14, 3000), k=200)])
    ]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A pcapng file with two named interfaces, directions and cut packets, which other programs convert."""
    made = captures.section() + b"".join(
        Interface(name=name, resolution=9).block() for name in ("eth7", "br0")
    )
    for number, one in enumerate(some_packets(1)):
        options = captures.option("<", 2, struct.pack("<I", 1 + number % 2)) + captures.option("<", 0, b"")
        made += captures.enhanced("<", number % 2, one.timestamp_ns or 0, one.data, one.wire_length, options)
    path = tmp_path / "original.pcapng"
    path.write_bytes(made)
    return path


def kinds() -> dict[str, bytes]:
    """A file of each kind."""
    packets = some_packets()[:40]
    found = {}
    for name, magic in (("us", captures.MICROSECONDS), ("ns", NANOSECONDS), ("modified", KUZNETZOV)):
        for order in "<>":
            exact = some_packets(1)[:40] if magic == NANOSECONDS else packets
            found[f"pcap {name} {order}"] = captures.pcap(exact, magic=magic, order=order)
    for snaplen in (0, 16, 65_535, 2**31 - 1):
        found[f"pcap, snaplen {snaplen}"] = captures.pcap(packets, snaplen=snaplen)
    for order in "<>":
        for resolution in (None, 3, 9, 10, 0x80 | 20):
            interface = Interface(name="a", resolution=resolution, offset=1_700_000_000)
            made = captures.section(order, captures.option(order, 4, b"a program")) + interface.block(order)
            made += captures.block(order, 4, bytes(4))  # names
            for number, one in enumerate(packets):
                units = number * 997
                if number % 2:
                    made += captures.enhanced(order, 0, units, one.data, one.wire_length)
                else:
                    made += captures.obsolete(order, 0, units, one.data, one.wire_length)
                if number % 7 == 0:
                    made += captures.block(order, 0x0BAD1, b"not known at all") + captures.block(
                        order, 5, bytes(12)
                    )
            found[f"pcapng {order} {resolution}"] = made
    found["pcapng of two sections"] = found["pcapng > 9"] + found["pcapng < 9"]
    return found


KINDS = kinds()


@pytest.mark.repeats
@needs("tshark")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    """linkrx and tshark read the same packets of each magic number, byte order, wrong snaplen, resolution and kind of block."""
    path = tmp_path / "some"
    path.write_bytes(KINDS[kind])
    expected, found = of_tshark(path), of_linkrx(path)
    assert [each[:3] for each in found] == [each[:3] for each in expected]
    assert len(found) == (80 if "two" in kind else 40)
    if kind.startswith("pcapng"):
        assert [each[3:] for each in found] == [each[3:] for each in expected]


@needs("tshark")
def test_files_made_by_hand(original: Path) -> None:
    """linkrx and tshark read the same bytes, times, lengths, interface names and directions of a file made by hand."""
    assert of_linkrx(original) == of_tshark(original)


@needs("tshark", "editcap")
@pytest.mark.parametrize("form", ["pcap", "nsecpcap", "modpcap", "pcapng"])
def test_editcap(original: Path, tmp_path: Path, form: str) -> None:
    """linkrx reads files converted by editcap as tshark does."""
    one = tmp_path / "one.pcapng"
    run("tshark", "-n", "-r", original, "-Y", "frame.interface_id == 0", "-w", one)
    made = tmp_path / "made"
    run("editcap", "-F", form, one, made)
    expected = of_tshark(made)
    assert len(expected) == len(some_packets()) // 2
    assert of_linkrx(made) == named(expected)


@needs("tshark", "editcap", "mergecap")
def test_mergecap(original: Path, tmp_path: Path) -> None:
    """linkrx reads files that mergecap merged from several files, interfaces and resolutions as tshark does."""
    other, merged = tmp_path / "other.pcap", tmp_path / "merged.pcapng"
    other.write_bytes(captures.pcap(some_packets(), order=">"))
    run("mergecap", "-w", merged, original, other)
    assert named(of_linkrx(merged)) == named(of_tshark(merged))
    assert len(of_linkrx(merged)) == 2 * len(some_packets())
    # Also concatenated files, which have several sections.
    both = tmp_path / "both.pcapng"
    both.write_bytes(original.read_bytes() + merged.read_bytes())
    assert of_linkrx(both) == of_linkrx(original) + of_linkrx(merged)


@needs("tshark", "text2pcap")
def test_text2pcap(tmp_path: Path) -> None:
    """linkrx reads files that text2pcap made from hexadecimal text as tshark does."""
    text, made = tmp_path / "text", tmp_path / "made"
    text.write_text("".join(f"000000 {one.data.hex(' ')}\n" for one in some_packets()))
    run("text2pcap", text, made)
    assert [each[0] for each in of_linkrx(made)] == [one.data for one in some_packets()]
    assert [each[:3] for each in of_linkrx(made)] == [each[:3] for each in of_tshark(made)]


@needs("tcpdump")
@pytest.mark.parametrize("magic", [captures.MICROSECONDS, NANOSECONDS, KUZNETZOV])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tcpdump_copies(tmp_path: Path, magic: int, order: str) -> None:
    """linkrx reads the same packets from each kind of pcap file and from tcpdump's copy of it."""
    first, second = tmp_path / "first", tmp_path / "second"
    packets = some_packets(1 if magic == NANOSECONDS else 1000)
    first.write_bytes(captures.pcap(packets, magic=magic, order=order))
    run("tcpdump", "--time-stamp-precision=nano", "-r", first, "-w", second)
    assert read(first) == packets
    assert read(second) == packets


@needs("tcpdump")
@pytest.mark.usefixtures("devices")
def test_tcpdump_through_a_pipe() -> None:
    """linkrx receives packets from a pipe while tcpdump captures and writes them."""
    with rigs.interface() as rig:
        command = ["tcpdump", "-i", str(rig.source), "-U", "-w", "-", "-n", "-s", "0", "-Z", "root"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        ) as tcpdump:
            assert tcpdump.stderr is not None
            while b"listening on" not in (line := tcpdump.stderr.readline()):
                assert line, "tcpdump did not start"
            assert tcpdump.stdout is not None
            with linkrx.open(linkrx.CaptureFile(tcpdump.stdout)) as rx:
                for number in range(5):
                    rig.send(rig.frame(100, number))
                    assert bytes(collect(rx, 1)[0]) == rig.frame(100, number)
                tcpdump.terminate()
                assert list(rx) == []
                assert rx.end is linkrx.End.EOF


@needs("tshark", "dumpcap")
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("form", ["-n", "-P"])
def test_dumpcap(tmp_path: Path, form: str) -> None:
    """linkrx reads captures of dumpcap, in pcapng and pcap, as tshark does."""
    made = tmp_path / "made"
    with rigs.interface() as rig:
        command = ["dumpcap", form, "-i", str(rig.source), "-w", str(made), "-c", "5", "-q"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as dumpcap:
            assert dumpcap.stderr is not None
            while "File:" not in (line := dumpcap.stderr.readline()):
                assert line, "dumpcap did not start"
            for number in range(5):
                rig.send(rig.frame(100, number))
            assert dumpcap.wait(30) == 0
        frames = [rig.frame(100, number) for number in range(5)]
    assert [each[0] for each in of_linkrx(made)] == frames
    expected = of_tshark(made)
    assert of_linkrx(made) == named(expected)


def by_scapy_pcap(path: Path, packets: list[Recorded]) -> None:
    """Write a pcap file with nanoseconds by scapy."""
    from scapy.utils import RawPcapWriter

    with RawPcapWriter(str(path), linktype=1, nano=True) as out:
        out.write_header(packets[0].data)
        for one in packets:
            seconds, rest = divmod(one.timestamp_ns or 0, 10**9)
            out.write_packet(one.data, sec=seconds, usec=rest, caplen=len(one.data), wirelen=one.wire_length)


def by_pcapy(path: Path, packets: list[Recorded]) -> None:
    """Copy a pcap file by pcapy-ng."""
    import pcapy  # type: ignore[import-not-found, unused-ignore]

    source = path.with_suffix(".source")
    source.write_bytes(captures.pcap(packets))
    reader = pcapy.open_offline(str(source))
    dumper = reader.dump_open(str(path))
    while (pair := reader.next())[0] is not None:
        dumper.dump(*pair)
    del dumper


@pytest.mark.parametrize("write", [by_scapy_pcap, by_pcapy])
def test_libraries_write(tmp_path: Path, write: Callable[[Path, list[Recorded]], None]) -> None:
    """linkrx reads the packets that were given to scapy and pcapy-ng from the files that they wrote."""
    if write is by_pcapy and find_spec("pcapy") is None:
        pytest.skip("needs pcapy-ng: pip install pcapy-ng")
    path = tmp_path / "made"
    write(path, some_packets())
    assert read(path) == some_packets()


def test_scapy_pcapng(tmp_path: Path) -> None:
    """linkrx reads scapy's pcapng files, with interface names and directions."""
    from scapy.layers.l2 import Ether
    from scapy.utils import PcapNgWriter

    path = tmp_path / "made"
    with PcapNgWriter(str(path)) as out:
        for number, one in enumerate(some_packets()):
            packet = Ether(one.data)
            packet.time, packet.sniffed_on = (one.timestamp_ns or 0) / 10**9, ("eth7", "br0")[number % 2]
            out.write(packet)
    got = of_linkrx(path)
    assert [each[0] for each in got] == [one.data for one in some_packets()]
    assert [each[3] for each in got] == [("eth7", "br0")[number % 2] for number in range(len(got))]


# Files that linkrx writes.

Format = Literal["pcapng", "pcap"]
every_format = pytest.mark.parametrize("form", ["pcapng", "pcap"])


def recorded(original: Path, path: Path, form: Format) -> list[tuple[bytes, int, int, str, bool]]:
    """Record the packets of a file, and return them."""
    with linkrx.open(original) as rx, linkrx.PcapWriter(path, format=form, source=rx) as out:
        for batch in rx.batches():
            out.write(batch)
    found = of_linkrx(original)
    return found if form == "pcapng" else [(*each[:3], "", False) for each in found]


@needs("tshark", "capinfos")
@every_format
def test_tshark_and_capinfos_read(original: Path, tmp_path: Path, form: Format) -> None:
    """tshark and capinfos read the recorded bytes, times, lengths, names and directions."""
    path = tmp_path / "made"
    expected = recorded(original, path, form)
    assert named(of_tshark(path)) == expected
    output = run("capinfos", "-M", path)
    assert f"Number of packets:   {len(expected)}\n" in output
    assert "Strict time order:   True" in output
    for name in {each[3] for each in expected} - {""}:
        assert f"Name = {name}\n" in output


@needs("tcpdump")
@every_format
def test_tcpdump_reads(original: Path, tmp_path: Path, form: Format) -> None:
    """tcpdump copies the recorded bytes, times and lengths."""
    path, copy = tmp_path / "made", tmp_path / "copy"
    expected = recorded(original, path, form)
    run("tcpdump", "--time-stamp-precision=nano", "-r", path, "-w", copy)
    assert [each[:3] for each in of_linkrx(copy)] == [each[:3] for each in expected]


@every_format
def test_scapy_reads(original: Path, tmp_path: Path, form: Format) -> None:
    """scapy reads the recorded bytes and lengths."""
    from scapy.utils import RawPcapReader

    path = tmp_path / "made"
    expected = recorded(original, path, form)
    with RawPcapReader(str(path)) as reader:
        found = [(bytes(data), metadata.wirelen) for data, metadata in reader]
    assert found == [(each[0], each[2]) for each in expected]


@every_format
def test_pcapy_reads(original: Path, tmp_path: Path, form: Format) -> None:
    """pcapy-ng, and with it libpcap, reads the recorded bytes and lengths."""
    pcapy = pytest.importorskip("pcapy", reason="needs pcapy-ng: pip install pcapy-ng")
    path = tmp_path / "made"
    expected = recorded(original, path, form)
    reader, found = pcapy.open_offline(str(path)), []
    while (pair := reader.next())[0] is not None:
        found.append((bytes(pair[1]), pair[0].getlen()))
    assert found == [(each[0], each[2]) for each in expected]


def test_gzip_of_a_pipe(original: Path) -> None:
    """linkrx reads the same packets from a gzip file by path and through a pipe from `gzip -dc`."""
    packed = subprocess.run(
        ["gzip", "-c", str(original)], capture_output=True, check=True, env=ENVIRONMENT
    ).stdout
    path = original.with_suffix(".gz")
    path.write_bytes(packed)
    with subprocess.Popen(["gzip", "-dc", str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT) as gzip:
        assert gzip.stdout is not None
        assert read(gzip.stdout) == read(path) == read(io.BytesIO(original.read_bytes()))
