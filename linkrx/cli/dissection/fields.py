"""What all protocols share: names and addresses as text, the internet checksum, and how a part that is missing is told.

`fields["cut"]` is the protocol in whose header the bytes end; `fields["malformed"]` says what in a header cannot be.
"""

from __future__ import annotations

import socket
from array import array
from functools import lru_cache
from typing import Any

Fields = dict[str, Any]

# How much is asked for: what a line shows, all fields, and whether checksums are right as well.
LINE, ALL, CHECKED = range(3)

# Addresses come again and again: looking one up costs a third of making it.
_REMEMBERED = 16_384


@lru_cache(_REMEMBERED)
def mac(address: bytes) -> str:
    """A link address."""
    return address.hex(":")


@lru_cache(_REMEMBERED)
def ipv4_address(address: bytes) -> str:
    """An IPv4 address, of four bytes."""
    return socket.inet_ntoa(address)


@lru_cache(_REMEMBERED)
def ipv6_address(address: bytes) -> str:
    """An IPv6 address, of sixteen bytes (RFC 5952)."""
    return socket.inet_ntop(socket.AF_INET6, address)


def printable(text: bytes) -> str:
    """What a packet brings as text, of one line and without a control character: a terminal would obey these."""
    if text.isascii():
        found = text.decode("ascii")
        if found.isprintable() and "\\" not in found:
            return found
    return "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in text)


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071); 0 over data that carries its own."""
    # One's complement sums do not depend on the byte order, as long as their result is swapped alike; and 0 is 0.
    words = array("H", data + bytes(len(data) % 2))
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def checksum_state(frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> str | None:
    """Whether a transport's checksum is right: "ok", "wrong", or None where it was not asked for, or not all is there.

    `pseudo`: the pseudo-header in front, or None not to look.
    """
    if pseudo is None or end - at < length:
        return None
    return "wrong" if checksum(pseudo + frame[at : at + length]) else "ok"
