"""ptf with the platform and the port class of docs/ports/."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.ports import port

from linkrx.testing import rigs
from linkrx.testing.devices import Device
from linkrx.testing.rigs import LOCAL, REMOTE
from linkrx.testing.waiting import PATIENCE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of escapes in its strings
    from ptf.dataplane import DataPlane

pytestmark = pytest.mark.usefixtures("devices")

PTF = port("ptf_linkrx")

# A test for ptf: one port sends packets that another must receive.
SWITCH = """
import ptf
from ptf import testutils
from ptf.base_tests import BaseTest


class Wire(BaseTest):
    def setUp(self):
        BaseTest.setUp(self)
        self.dataplane = ptf.dataplane_instance

    def runTest(self):
        for packet in (
            testutils.simple_tcp_packet(),
            testutils.simple_udp_packet(pktlen=1400),
            testutils.simple_tcp_packet(dl_vlan_enable=True, vlan_vid=5, vlan_pcp=3),
            testutils.simple_udp_packet(pktlen=9000),
        ):
            testutils.send_packet(self, 0, packet)
            testutils.verify_packet(self, packet, 1)
            testutils.send_packet(self, 1, packet)
            testutils.verify_packet(self, packet, 0)
        testutils.verify_no_other_packets(self, timeout=0.1)
"""


def test_a_run_of_ptf(tmp_path: Path) -> None:
    """ptf runs its test with the platform: TCP, UDP, a VLAN tag and a jumbo frame pass in both directions."""
    (tmp_path / "wire.py").write_text(SWITCH)
    with rigs.veth() as (near, far):
        program = str(Path(sys.executable).parent / "ptf")
        platform = ["--platform-dir", str(ROOT / "docs" / "ports"), "--platform", "ptf_linkrx"]
        interfaces = ["-i", f"0@{near}", "-i", f"1@{far}"]
        patience = ["--default-timeout", str(PATIENCE)]  # two seconds by default
        done = subprocess.run(
            [
                sys.executable,
                program,
                "--allow-user",
                *platform,
                *interfaces,
                *patience,
                "--test-dir",
                str(tmp_path),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert re.search(r"^OK$", done.stderr, re.MULTILINE), done.stdout + done.stderr


@pytest.fixture
def plane() -> Iterator[Any]:
    """ptf's data plane, on linkrx's ports."""
    config = {"platform": "eth", "dataplane": {"portclass": PTF.LinkrxPort}}
    found = DataPlane(config)
    yield found
    ports = list(found.ports.values())
    found.kill()
    for one in ports:
        one.rx.close()


def test_down_up_and_deletion(plane: Any) -> None:
    """Both ports receive after down and up. After their devices were deleted, a third port receives, and ptf's thread waits."""
    sent = LOCAL + REMOTE + b"\x88\xb5" + bytes(50)

    def polled(number: int) -> bytes:
        found: bytes = plane.poll(0, number, timeout=PATIENCE, exp_pkt=sent).packet
        return found

    with rigs.veth() as (near, far), rigs.interface() as other:
        for number, name in enumerate((near, far, other.source)):
            plane.port_add(name, 0, number)
        plane.send(0, 0, sent)
        assert polled(1) == sent
        plane.port_down(0, 1)
        plane.port_up(0, 1)
        device = Device(near, far)
        device.wait_for_carrier()
        for number in (0, 1):
            plane.send(0, number, sent)
            assert polled(1 - number) == sent
        device.delete()
        for number in range(3):
            other.send(sent)
            assert polled(2) == sent, number
        with pytest.raises(OSError, match=r"gone|deleted|No such device"):
            plane.send(0, 0, sent)
