"""linkrx and tcpdump receive the same frames from one interface."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support.run import that_take

from linkrx.testing import rigs
from linkrx.testing.waiting import collect

FRAMES = 300
PCAP_HEADER, RECORD = (
    24,
    struct.Struct("=IIII"),
)  # pcap-savefile(5): seconds, fraction, captured, original length


def records(saved: bytes) -> list[bytes]:
    """The frames of a savefile."""
    found, at = [], PCAP_HEADER
    while at < len(saved):
        _, _, captured, original = RECORD.unpack_from(saved, at)
        assert captured == original
        at += RECORD.size
        found.append(saved[at : at + captured])
        at += captured
    return found


@pytest.mark.repeats
@pytest.mark.usefixtures("devices")
@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump: apt install tcpdump")
@pytest.mark.parametrize("backend", that_take("packet"))
def test_beside_tcpdump(backend: str, tmp_path: Path) -> None:
    """tcpdump -w saves the frames that linkrx receives, byte for byte and in the same order, and timestamps increase."""
    saved = tmp_path / "saved.pcap"
    honoured = {"timestamps": True} if backend in ("packet_mmap", "recvmmsg") else {}
    with rigs.interface() as rig:
        command = [
            "tcpdump",
            "-i",
            str(rig.source),
            "-w",
            str(saved),
            "-c",
            str(FRAMES),
            "-s",
            "0",
            "-n",
            "-Z",
            "root",
        ]
        with (
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tcpdump,
            rig.open(backend, **honoured) as rx,
        ):
            assert tcpdump.stderr is not None
            while "listening on" not in (line := tcpdump.stderr.readline()):
                assert line, "tcpdump did not start"
            for number in range(FRAMES):
                rig.send(rig.frame(60 + 37 * number % 9000, number))
            packets = collect(rx, FRAMES)
            assert tcpdump.wait(30) == 0
    assert [bytes(packet) for packet in packets] == records(saved.read_bytes())
    stamps = [packet.timestamp_ns or 0 for packet in packets]
    assert stamps == sorted(stamps)
    assert all(stamps) == bool(honoured)
