"""Formats DNS and DHCP messages as tcpdump does."""

from __future__ import annotations

from linkrx.cli.dissection.fields import Fields

_OPERATIONS = {0: "", 1: " inv_q", 2: " stat", 4: " notify", 5: " update"}
_RESULTS = {
    0: "",
    1: " FormErr",
    2: " ServFail",
    3: " NXDomain",
    4: " NotImp",
    5: " Refused",
    6: " YXDomain",
    7: " YXRRSet",
    8: " NXRRSet",
    9: " NotAuth",
    10: " NotZone",
}


def dns(found: Fields) -> str:
    """A DNS message: identifier, flags, and the questions of a query or the answers of a response."""
    flags, (asked, answered, authorities, additional) = found["flags"], found["counts"]
    operation = _OPERATIONS.get(found["opcode"], f" op{found['opcode']}")
    if found["response"]:
        marks = "*" if "aa" in flags else ""
        marks += "" if "ra" in flags else "-"
        marks += ("|" if "tc" in flags else "") + ("$" if "ad" in flags else "")
        result = _RESULTS.get(found["rcode"], f" Resp{found['rcode']}")
        what = f"{found['id']}{operation}{result}{marks}"
        if asked != 1:
            what += f" [{asked}q]"
        what += f" {answered}/{authorities}/{additional}"
        what += ",".join(f" {record['type']} {record['data']}" for record in found["answers"])
    else:
        marks = (
            ("+" if "rd" in flags else "") + ("$" if "ad" in flags else "") + ("%" if "cd" in flags else "")
        )
        what = f"{found['id']}{operation}{marks}"
        for count, letter in ((answered, "a"), (authorities, "n"), (additional, "au")):
            what += f" [{count}{letter}]" if count else ""
        if asked != 1:
            what += f" [{asked}q]"
        what += "".join(f" {question['type']}? {question['name']}" for question in found["questions"])
    return f"{what} ({found['length']})"


def dhcp(found: Fields) -> str:
    """A DHCP message: the client, the type, the transaction and the addresses."""
    words = [f"BOOTP/DHCP, {'Request' if found['request'] else 'Reply'}"]
    if found["request"] and "client_mac" in found:
        words[0] += f" from {found['client_mac']}"
    words.append(f"length {found['length']}")
    if "message" in found:
        words.append(found["message"])
    words.append(f"xid 0x{found['xid']:x}")
    for name, word in (
        ("client_ip", "Client-IP"),
        ("your_ip", "Your-IP"),
        ("requested_ip", "Requested-IP"),
        ("server_id", "Server-ID"),
        ("relay_ip", "Gateway-IP"),
    ):
        if name in found:
            words.append(f"{word} {found[name]}")
    if "host_name" in found:
        words.append('Hostname "{}"'.format(found["host_name"].replace('"', '\\"')))
    return ", ".join(words)


def dhcpv6(found: Fields) -> str:
    """A DHCPv6 message: its type and transaction."""
    return f"dhcp6 {found['message']}, xid 0x{found['xid']:x}, length {found['length']}"
