"""Fanout groups: how several packet sockets share one interface, each packet going to one of them."""

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

# Behind a mode: a member that has no room passes packets on to others, so that a busy flow is spread.
ROLLOVER = "+rollover"


@dataclass(frozen=True)
class Fanout:
    """A group by its number, None for a new one that the kernel chooses, and how it divides packets."""

    group: int | None
    mode: str
    rollover: bool = False

    @classmethod
    def of(cls, value: object) -> Fanout:
        """From the option: a number or "auto", or a pair of that and a mode. Raises TypeError and ValueError."""
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
                f"fanout={value!r}: a mode is one of {', '.join(MODES)}, or one with {ROLLOVER} behind it"
            )
        return cls(number, mode, rollover)

    def join(self, packet: socket.socket, *, outgoing: bool) -> int:
        """Make a bound packet socket a member; the number of the group. It is left only by closing the socket.

        `outgoing`: the group has frames of this host as well; whether a member ignores them does not count.
        """
        kind = MODES[self.mode]
        # Only the first fragment of a datagram has ports: whole datagrams are told apart.
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
                errno.EINVAL: "all its members have the same interface, mode and outgoing=, and were opened by linkrx",
                errno.ENOSPC: "it has as many members as the kernel allows",
            }.get(error.errno or 0, "PACKET_FANOUT was refused")
            raise OSError(
                error.errno, f"joining the {self.mode} fanout group {self.group}: {error.strerror}; {why}"
            ) from error
        return packet.getsockopt(SOL_PACKET, PACKET_FANOUT) & GROUP_MAX
