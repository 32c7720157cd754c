"""Formats a packet as a line: the link header if wanted, the addresses, and the innermost header."""

from __future__ import annotations

from linkrx.cli.dissection.fields import Fields
from linkrx.cli.dissection.link import SHOWN_BYTES
from linkrx.cli.lines.control import arp, icmp, icmpv6
from linkrx.cli.lines.names import ETHERTYPES, PROTOCOLS
from linkrx.cli.lines.services import dhcp, dhcpv6, dns

# tcpdump's names of truncated headers.
_SHORT = {"ipv4": "ip", "ipv6": "ip6", "icmpv6": "icmp6", "dns": "domain", "ethernet": "ether"}

# The whole text for a packet whose first header is truncated.
_KINDS = {"ipv4": "IP", "ipv6": "IP6", "arp": "ARP", "llc": "LLC"}

_SEQUENCED = frozenset("SFR")  # flags whose sequence number is printed for empty segments too


def line(fields: Fields, length: int, *, link: bool = False, verbose: bool = False) -> str:
    """The line of a packet with `length` bytes on the wire. `link`: with the link header. `verbose`: with header fields and checksums."""
    front = _link(fields, length) if link else ""
    tagged = "vlan" in fields
    if tagged:
        front += _tags(fields["vlan"])
    # A link header names the protocol, unless a tag stands in front of it.
    text = front + _network(fields, link, link and not tagged and "ethernet" in fields, verbose)
    if "cut" in fields or "malformed" in fields or "super_packet" in fields:
        text = (text.rstrip() + _marks(fields)).lstrip()
    return text


def _link(fields: Fields, length: int) -> str:
    """The link header, as `-e` of tcpdump prints it."""
    header = fields.get("ethernet")
    if header is None:
        sender = fields.get("link", {}).get("sender")
        return f"{sender}, length {length}: " if sender else f"length {length}: "
    kind = header["type"]
    what = f"ethertype {_ethertype(kind)}" if kind >= 0x0600 else "802.3"
    return f"{header['source']} > {header['destination']}, {what}, length {length}: "


def _ethertype(number: int) -> str:
    return f"{ETHERTYPES.get(number, 'Unknown')} (0x{number:04x})"


def _tags(tags: list[Fields]) -> str:
    return "".join(f"vlan {tag['id']}, p {tag['priority']}, {'DEI, ' if tag['dei'] else ''}" for tag in tags)


def _network(fields: Fields, link: bool, named: bool, verbose: bool) -> str:
    if "ipv4" in fields:
        header = fields["ipv4"]
        details = _ipv4_details(header) if verbose else ""
        return _internet(fields, header, "" if named else "IP ", details, verbose)
    header = fields.get("ipv6")
    if header is not None:
        return _internet(
            fields, header, "" if named else "IP6 ", _ipv6_details(header) if verbose else "", verbose
        )
    header = fields.get("arp")
    if header is not None:
        return ("" if named else "ARP, ") + arp(header)
    header = fields.get("llc")
    if header is not None:
        return (
            f"LLC, dsap 0x{header['dsap']:02x}, ssap 0x{header['ssap']:02x}, ctrl 0x{header['control']:02x}, "
            f"length {header['length']}{_bytes(header['bytes'], header['length'] - 3)}"
        )
    header = fields.get("payload")
    if header is not None:
        return _unknown(fields, header, link, named)
    return "" if named else _KINDS.get(fields.get("cut", ""), "")


def _unknown(fields: Fields, header: Fields, link: bool, named: bool) -> str:
    """A packet of an unknown protocol. What the link header says is not repeated."""
    words = []
    if "ethernet" in fields and not link:
        words.append(f"{fields['ethernet']['source']} > {fields['ethernet']['destination']}")
    if header["ethertype"] and not named:
        words.append(f"ethertype {_ethertype(header['ethertype'])}")
    if not link:
        words.append(f"length {header['length']}")
    return (", ".join(words) + _bytes(header["bytes"], header["length"])).removeprefix(": ")


def _bytes(digits: str, length: int) -> str:
    """The first bytes of an unknown protocol, in groups as `-x` of tcpdump prints them."""
    if not digits:
        return ""
    words = " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))
    return f": {words}{' ...' if length > SHOWN_BYTES else ''}"


def _internet(fields: Fields, header: Fields, kind: str, details: str, verbose: bool) -> str:
    source, destination = header["source"], header["destination"]
    extensions = ""
    if len(header) > 2:  # more than the addresses
        if "missing" in header:
            details = f"truncated-ip - {header['missing']} bytes missing! {details}"
        if "extensions" in header:
            extensions = "".join(f"{name} " for name in header["extensions"])
    if "tcp" in fields:
        found = fields["tcp"]
        return (
            f"{kind}{details}{source}.{found['source_port']} > {destination}.{found['destination_port']}: "
            f"{extensions}{_tcp(fields, found, verbose)}"
        )
    if "udp" in fields:
        found = fields["udp"]
        return (
            f"{kind}{details}{source}.{found['source_port']} > {destination}.{found['destination_port']}: "
            f"{extensions}{_udp(fields, found, verbose)}"
        )
    front = f"{kind}{details}{source} > {destination}: {extensions}"
    found = fields.get("icmp")
    if found is not None:
        return f"{front}ICMP {icmp(found, verbose)}"
    found = fields.get("icmpv6")
    if found is not None:
        return f"{front}ICMP6, {icmpv6(found, verbose)}"
    found = fields.get("payload")
    if found is None:
        return front.rstrip()
    number = found["protocol"]
    name = PROTOCOLS.get(number, f"ip-proto-{number}")
    offset = header.get("fragment_offset", 0)
    if offset:
        more = "+" if header["more_fragments"] else ""
        return f"{front}{name}, fragment at {offset}{more}, length {found['length']}"
    return f"{front}{name}, length {found['length']}"


def _ipv4_details(header: Fields) -> str:
    flags = "DF" if header["dont_fragment"] else ""
    if header.get("more_fragments"):
        flags += "+"
    options = f", options 0x{header['options']}" if "options" in header else ""
    wrong = ", bad cksum" if header.get("checksum_state") == "wrong" else ""
    number = header["protocol"]
    return (
        f"(tos 0x{header['tos']:x}, ttl {header['ttl']}, id {header['id']}, offset {header.get('fragment_offset', 0)}, "
        f"flags [{flags or 'none'}], proto {PROTOCOLS.get(number, 'unknown')} ({number}), "
        f"length {header['length']}{options}{wrong}) "
    )


def _ipv6_details(header: Fields) -> str:
    traffic = f"class 0x{header['traffic_class']:02x}, " if header["traffic_class"] else ""
    label = f"flowlabel 0x{header['flow_label']:05x}, " if header["flow_label"] else ""
    number = header["next_header"]
    return (
        f"({traffic}{label}hlim {header['hop_limit']}, next-header {PROTOCOLS.get(number, 'unknown')} ({number}) "
        f"payload length: {header['length']}) "
    )


_CHECKSUM = {"ok": "correct", "wrong": "incorrect", "unfinished": "unfinished: left to a device"}


def _tcp(fields: Fields, found: Fields, verbose: bool) -> str:
    if "flags" not in found:
        return ""  # truncated after the ports
    flags, length = found["flags"], found["length"]
    text = f"Flags [{flags}]"
    if verbose and found.get("checksum_state"):
        text += f", cksum 0x{found['checksum']:04x} ({_CHECKSUM[found['checksum_state']]})"
    sequence = found["sequence"]
    if length:
        text += f", seq {sequence}:{sequence + length & 0xFFFFFFFF}"
    elif not _SEQUENCED.isdisjoint(flags):
        text += f", seq {sequence}"
    if "." in flags:
        text += f", ack {found['acknowledgement']}"
    text += f", win {found['window']}"
    if "urgent" in found:
        text += f", urg {found['urgent']}"
    options = found.get("options")
    if options is not None:
        if "sack" in found:
            options = [_sack(found["sack"]) if option == "sack" else option for option in options]
        text += f", options [{','.join(options)}]"
    if length is not None:
        text += f", length {length}"
    if "dns" in fields:
        text += f" {dns(fields['dns'])}"
    return text


def _sack(blocks: list[list[int]]) -> str:
    return f"sack {len(blocks)} " + "".join(f"{{{left}:{right}}}" for left, right in blocks)


def _udp(fields: Fields, found: Fields, verbose: bool) -> str:
    if "length" not in found:
        return ""
    state = found.get("checksum_state") if verbose else None
    front = ""
    if state == "none":
        front = "[no cksum] "
    elif state is not None:
        front = f"[udp sum {'ok' if state == 'ok' else _CHECKSUM[state]}] "
    if "dns" in fields:
        return front + dns(fields["dns"])
    if "dhcp" in fields:
        return front + dhcp(fields["dhcp"])
    if "dhcpv6" in fields:
        return front + dhcpv6(fields["dhcpv6"])
    length = found["length"]
    return f"{front}UDP" if length is None else f"{front}UDP, length {length}"


def _marks(fields: Fields) -> str:
    """Marks for a super-packet, a truncated header and a malformed header."""
    text = ""
    if "super_packet" in fields:
        text = " [super-packet]"
    cut = fields.get("cut")
    if cut is not None:
        text += f" [|{_SHORT.get(cut, cut)}]"
    malformed = fields.get("malformed")
    if malformed is not None:
        text += f" [malformed: {malformed}]"
    return text
