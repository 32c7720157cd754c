"""Formats bytes in rows of sixteen, as `-x` and `-X` of tcpdump do."""

from __future__ import annotations

_READABLE = bytes(byte if 0x20 < byte < 0x7F else 0x2E for byte in range(256))


def rows(data: bytes, *, readable: bool) -> str:
    """The rows, each after a line feed. `readable`: with the characters as well."""
    found = []
    for at in range(0, len(data), 16):
        digits = data[at : at + 16].hex()
        words = " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))
        if readable:
            found.append(f"\n\t0x{at:04x}:  {words:<39}  {data[at : at + 16].translate(_READABLE).decode()}")
        else:
            found.append(f"\n\t0x{at:04x}:  {words}")
    return "".join(found)
