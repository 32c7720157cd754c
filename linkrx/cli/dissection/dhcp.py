"""DHCP (RFC 2131, 2132), and the type of a DHCPv6 message (RFC 8415)."""

from __future__ import annotations

import struct

from linkrx.cli.dissection.fields import Fields, ipv4_address, mac, printable

# op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr. sname and file follow.
_BOOTP = struct.Struct("!BBBBIHH4s4s4s4s16s")
_FIXED = 236
_COOKIE = bytes.fromhex("63825363")

_PAD, _END = 0, 255
_HOST_NAME, _REQUESTED, _MESSAGE_TYPE, _SERVER = 12, 50, 53, 54

MESSAGES = ("Discover", "Offer", "Request", "Decline", "ACK", "NACK", "Release", "Inform")
MESSAGES6 = (
    *("solicit", "advertise", "request", "confirm", "renew", "rebind", "reply", "release"),
    *("decline", "reconfigure", "inf-req", "relay-fwd", "relay-reply"),
)

_NOWHERE = bytes(4)


def dhcp(fields: Fields, frame: bytes, at: int, end: int, length: int) -> None:
    """Operation, transaction, client and addresses, and the options that a line shows."""
    if end < at + _BOOTP.size:
        fields["cut"] = "dhcp"
        return
    operation, hardware, size, _, transaction, _, _, client, yours, server, relay, address = (
        _BOOTP.unpack_from(frame, at)
    )
    found: Fields = {"request": operation == 1, "length": length, "xid": transaction}
    fields["dhcp"] = found
    if operation not in (1, 2):
        fields["malformed"] = f"a BOOTP operation of {operation}"
    if hardware == 1 and size == 6:
        found["client_mac"] = mac(address[:6])
    for name, value in (
        ("client_ip", client),
        ("your_ip", yours),
        ("server_ip", server),
        ("relay_ip", relay),
    ):
        if value != _NOWHERE:
            found[name] = ipv4_address(value)
    at += _FIXED
    if end < at + 4:
        fields["cut"] = "dhcp"
    elif frame[at : at + 4] == _COOKIE:
        _options(fields, found, frame, at + 4, end)


def _options(fields: Fields, found: Fields, frame: bytes, at: int, end: int) -> None:
    while at < end:
        kind = frame[at]
        if kind == _PAD:
            at += 1
            continue
        if kind == _END:
            return
        if end < at + 2 or end < at + 2 + frame[at + 1]:
            break
        value = frame[at + 2 : at + 2 + frame[at + 1]]
        at += 2 + len(value)
        if kind == _MESSAGE_TYPE and len(value) == 1:
            found["message"] = (
                MESSAGES[value[0] - 1] if 1 <= value[0] <= len(MESSAGES) else f"type {value[0]}"
            )
        elif kind == _HOST_NAME:
            found["host_name"] = printable(value)
        elif kind == _REQUESTED and len(value) == 4:
            found["requested_ip"] = ipv4_address(value)
        elif kind == _SERVER and len(value) == 4:
            found["server_id"] = ipv4_address(value)
    else:
        return
    fields["cut"] = "dhcp"


def dhcpv6(fields: Fields, frame: bytes, at: int, end: int, length: int) -> None:
    """The type of the message and its transaction."""
    if end < at + 4:
        fields["cut"] = "dhcpv6"
        return
    kind = frame[at]
    message = MESSAGES6[kind - 1] if 1 <= kind <= len(MESSAGES6) else f"type {kind}"
    fields["dhcpv6"] = {
        "message": message,
        "length": length,
        "xid": int.from_bytes(frame[at + 1 : at + 4], "big"),
    }
