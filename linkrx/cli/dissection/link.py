"""The link layer: Ethernet, VLAN tags, LLC, and packets without a link header."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.arp import arp
from linkrx.cli.dissection.fields import ALL, Fields, mac
from linkrx.cli.dissection.internet import ipv4, ipv6

_TAG = struct.Struct("!HH")  # tag control information, and the next EtherType

# IEEE 802.1Q, 802.1ad, and the numbers used before 802.1ad.
TAGS = frozenset({0x8100, 0x88A8, 0x9100, 0x9200, 0x9300})
LEAST_ETHERTYPE = 0x0600  # IEEE 802.3: a smaller number is a length, and LLC follows

SHOWN_BYTES = 16  # bytes shown of an unknown protocol

_NETWORK = {0x0800: ipv4, 0x86DD: ipv6, 0x0806: arp}


def dissect(
    frame: bytes,
    wire_length: int,
    *,
    ethernet: bool,
    protocol: int = 0,
    tag: tuple[int, int] | None = None,
    sender: bytes | None = None,
    depth: int = ALL,
) -> Fields:
    """The fields of a packet, in the order of its headers. Never raises, whatever the bytes are.

    `ethernet`: the packet begins with an Ethernet header. Otherwise `protocol` is its EtherType, and `sender` the sender's link
    address, both reported by the kernel. `tag` is a VLAN tag that the kernel took out: tag protocol identifier and tag control
    information. `depth` is LINE, ALL or CHECKED.
    """
    fields: Fields = {}
    end = len(frame)
    at = 0
    if ethernet:
        if end < 14:
            fields["cut"] = "ethernet"
            return fields
        protocol = frame[12] << 8 | frame[13]
        if depth or protocol not in _NETWORK:
            fields["ethernet"] = {
                "source": mac(frame[6:12]),
                "destination": mac(frame[:6]),
                "type": protocol,
            }
        at = 14
    elif sender:
        fields["link"] = {"sender": mac(sender)}
    if tag is not None:
        fields["vlan"] = [_tag(*tag)]
    while protocol in TAGS:
        if end < at + 4:
            fields["cut"] = "vlan"
            return fields
        control, inner = _TAG.unpack_from(frame, at)
        fields.setdefault("vlan", []).append(_tag(protocol, control))
        protocol = inner
        at += 4
    network = _NETWORK.get(protocol)
    if network is not None:
        network(fields, frame, at, end, wire_length - at, depth)
    elif ethernet and protocol < LEAST_ETHERTYPE:
        _llc(fields, frame, at, end, protocol)
    else:
        fields["payload"] = {
            "ethertype": protocol,
            "length": wire_length - at,
            "bytes": frame[at : at + SHOWN_BYTES].hex(),
        }
    return fields


def _tag(protocol: int, control: int) -> Fields:
    """A VLAN tag (IEEE 802.1Q)."""
    return {
        "id": control & 0x0FFF,
        "priority": control >> 13,
        "dei": bool(control & 0x1000),
        "type": protocol,
    }


def _llc(fields: Fields, frame: bytes, at: int, end: int, length: int) -> None:
    """Logical link control (IEEE 802.2)."""
    if end < at + 3:
        fields["cut"] = "llc"
        return
    fields["llc"] = {
        "dsap": frame[at],
        "ssap": frame[at + 1],
        "control": frame[at + 2],
        "length": length,
        "bytes": frame[at + 3 : min(end, at + max(length, 3), at + 3 + SHOWN_BYTES)].hex(),
    }
