"""Parsers accept a packet itself, in C and in plain Python, instead of `bytes(packet)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from support.received import Kind, Row, every_kind, one
from support.super_packets import LOCAL, REMOTE, Super

FRAME = Super(payload=100, size=0).frames()[0]

# The fields that the parsers must find.
Found = tuple[bytes, bytes, str, str, int, int, bytes]
FOUND: Found = (REMOTE, LOCAL, "198.51.100.1", "198.51.100.2", 4321, 80, FRAME[54:])


def imported(*names: str) -> list[Any]:
    """Import the modules of a parser, or skip the test."""
    package = names[0].partition(".")[0]
    pytest.importorskip(package, reason=f"needs {package}, which is not installed (pip install {package})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' modules warn at import
        return [import_module(name) for name in names]


def by_dpkt(frame: Any) -> Found:
    """dpkt."""
    (ethernet,) = imported("dpkt.ethernet")
    link = ethernet.Ethernet(frame)
    ip, tcp = link.data, link.data.data
    source, target = (".".join(map(str, address)) for address in (ip.src, ip.dst))
    return bytes(link.src), bytes(link.dst), source, target, tcp.sport, tcp.dport, bytes(tcp.data)


def by_pypacker(frame: Any) -> Found:
    """pypacker."""
    ethernet, layer3, layer4 = imported(
        "pypacker.layer12.ethernet", "pypacker.layer3.ip", "pypacker.layer4.tcp"
    )
    link = ethernet.Ethernet(frame)
    ip, tcp = link[layer3.IP], link[layer4.TCP]
    return link.src, link.dst, ip.src_s, ip.dst_s, tcp.sport, tcp.dport, bytes(tcp.body_bytes)


def by_scapy(frame: Any) -> Found:
    """scapy."""
    l2, inet = imported("scapy.layers.l2", "scapy.layers.inet")
    link = l2.Ether(frame)
    ip, tcp = link[inet.IP], link[inet.TCP]
    source, target = (bytes.fromhex(address.replace(":", "")) for address in (link.src, link.dst))
    return source, target, ip.src, ip.dst, tcp.sport, tcp.dport, bytes(tcp.payload)


@every_kind
@pytest.mark.parametrize("parse", [by_dpkt, by_pypacker, by_scapy], ids=lambda parse: parse.__name__)
@pytest.mark.parametrize("given", ["packet", "bytes", "frame"])
def test_parser(kind: Kind, parse: Callable[[Any], Found], given: str) -> None:
    """dpkt, pypacker and scapy accept a packet itself. For its frame, which is a memoryview, scapy needs bytes."""
    packet = one(kind, Row(FRAME, protocol=0x0800))
    what: Any = {"packet": packet, "bytes": bytes(packet), "frame": packet.frame}[given]
    if given == "frame" and parse is by_scapy:
        what = bytes(what)
    assert parse(what) == FOUND
