"""Formats ARP, ICMP and ICMPv6 messages as tcpdump does."""

from __future__ import annotations

from linkrx.cli.dissection.fields import Fields
from linkrx.cli.lines.names import PROTOCOLS


def arp(found: Fields) -> str:
    """An ARP message: the operation and its addresses."""
    unusual = f"hardware {found['hardware']}, " if "hardware" in found else ""
    if "protocol" in found:
        unusual += f"protocol 0x{found['protocol']:04x}, "
    operation = found["operation"]
    target, sender = found.get("target_ip", "?"), found.get("sender_ip", "?")
    if operation == "request":
        what = f"Request who-has {target} tell {sender}"
    elif operation == "reply":
        what = f"Reply {sender} is-at {found.get('sender_mac', '?')}"
    elif operation == "reverse request":
        what = f"Reverse Request who-is {found.get('target_mac', '?')} tell {found.get('sender_mac', '?')}"
    elif operation == "reverse reply":
        what = f"Reverse Reply {found.get('target_mac', '?')} at {target}"
    elif isinstance(operation, str):
        what = f"{operation.title()} {sender} to {target}"
    else:
        what = f"operation {operation}"
    return f"{unusual}{what}, length {found['length']}"


_UNREACHABLE = {
    0: "net {} unreachable",
    1: "host {} unreachable",
    13: "host {} unreachable - admin prohibited filter",
}
_REDIRECT = {0: "net", 1: "host", 2: "net for tos", 3: "host for tos"}
_TIME = {0: "in-transit", 1: "reassembly"}
_PORT_UNREACHABLE, _PROTOCOL_UNREACHABLE, _FRAGMENTATION_NEEDED = 3, 2, 4


def _checksum(found: Fields, verbose: bool) -> str:
    return (
        f", cksum 0x{found['checksum']:04x} (incorrect)"
        if verbose and found.get("checksum_state") == "wrong"
        else ""
    )


def icmp(found: Fields, verbose: bool) -> str:
    """An ICMP message. An error names the destination of the packet that caused it."""
    name, code = found.get("name", f"type-{found['type']}"), found["code"]
    quoted = found.get("quoted")
    if "id" in found:
        what = f"{name}, id {found['id']}, seq {found['sequence']}"
    elif name == "unreachable":
        what = _unreachable(code, quoted, found)
    elif name == "redirect":
        about = quoted["destination"] if quoted else "?"
        what = f"redirect {about} to {_REDIRECT.get(code, 'host')} {found.get('gateway', '?')}"
    elif name == "time exceeded":
        what = f"time exceeded {_TIME.get(code, f'code {code}')}"
    else:
        what = name if not code else f"{name}, code {code}"
    return f"{what}{_checksum(found, verbose)}, length {found['length']}"


def _unreachable(code: int, quoted: Fields | None, found: Fields) -> str:
    about = quoted["destination"] if quoted else "?"
    if code == _PORT_UNREACHABLE and quoted and "destination_port" in quoted:
        return (
            f"{about} {PROTOCOLS[quoted['protocol']].lower()} port {quoted['destination_port']} unreachable"
        )
    if code == _PROTOCOL_UNREACHABLE and quoted:
        return f"{about} protocol {quoted['protocol']} unreachable"
    if code == _FRAGMENTATION_NEEDED:
        return f"{about} unreachable - need to frag (mtu {found.get('mtu', '?')})"
    return _UNREACHABLE.get(code, f"{{}} unreachable - code {code}").format(about)


_UNREACHABLE6 = {
    0: "unreachable route {}",
    1: "unreachable prohibited {}",
    3: "unreachable address {}",
    5: "unreachable source address {}",
    6: "unreachable reject route {}",
}


def icmpv6(found: Fields, verbose: bool) -> str:
    """An ICMPv6 message. An error names the destination of the packet that caused it; neighbor discovery its target."""
    name, code = found.get("name", f"type-#{found['type']}"), found["code"]
    quoted = found.get("quoted")
    about = quoted["destination"] if quoted else "?"
    if "id" in found:
        what = f"{name}, id {found['id']}, seq {found['sequence']}"
    elif name == "neighbor solicitation":
        what = f"{name}, who has {found.get('target', '?')}"
    elif name == "neighbor advertisement":
        what = f"{name}, tgt is {found.get('target', '?')}"
    elif name == "packet too big":
        what = f"{name}, mtu {found.get('mtu', '?')}"
    elif name == "unreachable" and code == 4 and quoted and "destination_port" in quoted:
        protocol = PROTOCOLS[quoted["protocol"]].lower()
        what = (
            f"destination unreachable, unreachable port, {about} {protocol} port {quoted['destination_port']}"
        )
    elif name == "unreachable":
        what = "destination unreachable, " + _UNREACHABLE6.get(code, f"code {code} {{}}").format(about)
    elif name == "time exceeded":
        what = f"time exceeded {_TIME.get(code, f'code {code}')} for {about}"
    elif "records" in found:
        what = f"{name}, {found['records']} group record(s)"
    elif "target" in found:
        what = f"{name}, {found['target']}"
    else:
        what = name if not code else f"{name}, code {code}"
    return f"{what}{_checksum(found, verbose)}, length {found['length']}"
