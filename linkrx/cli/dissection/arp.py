"""ARP (RFC 826)."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.fields import Fields, ipv4_address, mac

_FIXED = struct.Struct("!HHBBH")  # hardware and protocol type, their address lengths, operation
_OPERATIONS = {
    1: "request",
    2: "reply",
    3: "reverse request",
    4: "reverse reply",
    8: "inverse request",
    9: "inverse reply",
}


def arp(fields: Fields, frame: bytes, at: int, end: int, length: int, _depth: int) -> None:
    """The operation, and the addresses that were captured."""
    if end < at + 8:
        fields["cut"] = "arp"
        return
    hardware, protocol, hardware_bytes, protocol_bytes, operation = _FIXED.unpack_from(frame, at)
    found: Fields = {"operation": _OPERATIONS.get(operation, operation), "length": length}
    fields["arp"] = found
    if hardware != 1:
        found["hardware"] = hardware
    if protocol != 0x0800:
        found["protocol"] = protocol
    at += 8
    for name, size in (
        ("sender_mac", hardware_bytes),
        ("sender_ip", protocol_bytes),
        ("target_mac", hardware_bytes),
        ("target_ip", protocol_bytes),
    ):
        if end < at + size:
            fields["cut"] = "arp"
            return
        address = frame[at : at + size]
        at += size
        if name.endswith("_ip") and protocol == 0x0800 and size == 4:
            found[name] = ipv4_address(address)
        else:
            found[name] = mac(address)
