"""Frames of many flows."""

from __future__ import annotations

from linkrx.testing.rigs import LOCAL, REMOTE

HEADER = LOCAL + REMOTE + b"\x08\x00" + bytes.fromhex("4500002c000000004011000a0a00")


def frame(number: int) -> bytes:
    """A frame that contains its number, in one of 256 flows."""
    flow = (number % 256).to_bytes(2, "big")
    return HEADER + flow + bytes.fromhex("0a0000020009000900180000") + number.to_bytes(4, "big") + bytes(12)
