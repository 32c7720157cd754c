"""Functions for all protocols: addresses as text, and the internet checksum.

`fields["cut"]` names the protocol whose header is truncated. `fields["malformed"]` says what is wrong in a header.
"""

from __future__ import annotations

import socket
from array import array
from functools import lru_cache
from typing import Any

Fields = dict[str, Any]

# The depth of dissection: the fields of a line, all fields, all fields with checksums verified.
LINE, ALL, CHECKED = range(3)

# The size of the caches of addresses. A look-up costs a third of formatting an address.
_CACHED = 16_384


@lru_cache(_CACHED)
def mac(address: bytes) -> str:
    """A link address as text."""
    return address.hex(":")


@lru_cache(_CACHED)
def ipv4_address(address: bytes) -> str:
    """An IPv4 address (four bytes) as text."""
    return socket.inet_ntoa(address)


@lru_cache(_CACHED)
def ipv6_address(address: bytes) -> str:
    """An IPv6 address (sixteen bytes) as text (RFC 5952)."""
    return socket.inet_ntop(socket.AF_INET6, address)


def printable(text: bytes) -> str:
    """Text of a packet on one line. Control characters are escaped, because a terminal would obey them."""
    if text.isascii():
        found = text.decode("ascii")
        if found.isprintable() and "\\" not in found:
            return found
    return "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in text)


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071). It is 0 for data that includes a correct checksum."""
    # In host byte order: a one's complement sum of swapped words is the swapped sum (RFC 1071, 2 (B)).
    words = array("H", data + bytes(len(data) % 2))
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def checksum_state(frame: bytes, at: int, end: int, length: int, pseudo: bytes | None) -> str | None:
    """Verify a transport checksum: "ok" or "wrong". None if `pseudo` is None, or if the segment is truncated.

    `pseudo` is the pseudo-header. None: do not verify.
    """
    if pseudo is None or end - at < length:
        return None
    return "wrong" if checksum(pseudo + frame[at : at + length]) else "ok"
