"""Reads the TPACKET_V3 rings that this process has mapped, without linkrx."""

from __future__ import annotations

import ctypes
from pathlib import Path

from linkrx.backends.packet_mmap import BLOCK_LEAST

TP_STATUS_USER = 1  # linux/if_packet.h
# struct tpacket_block_desc: block_status, num_pkts and offset_to_first_pkt, behind version and offset_to_priv
STATUS, PACKETS, FIRST = 8, 12, 16


def mapped() -> list[tuple[int, int]]:
    """First address and size of every ring of this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "socket:[" in line:
            first, last = (int(address, 16) for address in line.split(" ", 1)[0].split("-"))
            found.append((first, last - first))
    return found


def block(number: int = 0, size: int = BLOCK_LEAST) -> int:
    """The address of a block of the only ring."""
    ((first, _),) = mapped()
    return first + number * size


def filling(packets: int) -> int:
    """The length of frames of which `packets`, up to 30, fill a block. With one more frame the kernel closes the block.

    A test must not rely on the block's timer: it may expire after the first of several frames.
    """
    return BLOCK_LEAST // (packets + 1)


def waiting(size: int = BLOCK_LEAST) -> list[int]:
    """The number of packets in each closed block of the only ring, in the ring's order."""
    ((first, length),) = mapped()
    found = []
    for at in range(first, first + length, size):
        if ctypes.c_uint32.from_address(at + STATUS).value & TP_STATUS_USER:
            found.append(ctypes.c_uint32.from_address(at + PACKETS).value)
    return found
