"""Fanout groups: several packet sockets share an interface, and each packet goes to one of them."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from linkrx.kernel.uapi import (
    PACKET_FANOUT,
    PACKET_FANOUT_FLAG_DEFRAG,
    PACKET_FANOUT_FLAG_IGNORE_OUTGOING,
    PACKET_FANOUT_FLAG_ROLLOVER,
    PACKET_FANOUT_FLAG_UNIQUEID,
    SOL_PACKET,
)

# linux/if_packet.h
MODES = {"hash": 0, "lb": 1, "cpu": 2, "rollover": 3, "qm": 5}

GROUP_MAX = 0xFFFF

# The suffix of a mode: a member whose queue is full passes packets on to other members.
ROLLOVER = "+rollover"


@dataclass(frozen=True)
class Fanout:
    """A fanout group: its number, and how it divides packets. None: a new number that the kernel chooses."""

    group: int | None
    mode: str
    rollover: bool = False

    @classmethod
    def of(cls, value: object) -> Fanout:
        """Parse the option: a number or "auto", or a pair of that and a mode. Raises TypeError or ValueError for other values."""
        group, mode = value if isinstance(value, tuple) and len(value) == 2 else (value, "hash")
        rollover = isinstance(mode, str) and mode.endswith(ROLLOVER)
        mode = mode.removesuffix(ROLLOVER) if rollover else mode
        number = group if isinstance(group, int) and not isinstance(group, bool) else None
        if (number is None and group != "auto") or not isinstance(mode, str):
            raise TypeError(
                f"fanout={value!r}: give the number of a group or 'auto', or a pair of that and a mode such as 'hash'"
            )
        if number is not None and not 0 <= number <= GROUP_MAX:
            raise ValueError(f"fanout={value!r}: a group has a number from 0 to {GROUP_MAX}")
        if mode not in MODES or (rollover and mode == "rollover"):
            raise ValueError(
                f"fanout={value!r}: give one of the modes {', '.join(MODES)}, also with the suffix {ROLLOVER}"
            )
        return cls(number, mode, rollover)

    def join(self, packet: socket.socket, *, outgoing: bool) -> int:
        """Make a bound packet socket a member, and return the number of the group. A socket leaves the group when it is closed.

        `outgoing`: the group receives frames of this host too. The kernel takes this from the group, not from its members.
        Raises OSError if the kernel refuses.
        """
        kind = MODES[self.mode]
        # Only the first fragment of a datagram has ports. Reassemble datagrams, so that all fragments get one hash.
        if self.mode == "hash":
            kind |= PACKET_FANOUT_FLAG_DEFRAG
        if self.rollover:
            kind |= PACKET_FANOUT_FLAG_ROLLOVER
        if not outgoing:
            kind |= PACKET_FANOUT_FLAG_IGNORE_OUTGOING
        if self.group is None:
            kind |= PACKET_FANOUT_FLAG_UNIQUEID
        try:
            packet.setsockopt(SOL_PACKET, PACKET_FANOUT, struct.pack("=I", kind << 16 | (self.group or 0)))
        except OSError as error:
            why = {
                errno.EINVAL: "all members must have the same interface, mode and outgoing=, and be opened by linkrx",
                errno.ENOSPC: "it has as many members as the kernel allows",
            }.get(error.errno or 0, "the kernel refused PACKET_FANOUT")
            raise OSError(
                error.errno, f"joining the {self.mode} fanout group {self.group}: {error.strerror}; {why}"
            ) from error
        return packet.getsockopt(SOL_PACKET, PACKET_FANOUT) & GROUP_MAX
