"""Relative TCP sequence numbers, as tcpdump counts them."""

from __future__ import annotations

from linkrx.cli.dissection.fields import Fields

CONNECTIONS_MOST = 65_536  # connections kept; the oldest is dropped for a new one

_Ends = tuple[str, int, str, int]


class Sequences:
    """The initial sequence numbers of each connection, for both directions."""

    def __init__(self) -> None:
        self._first: dict[_Ends, tuple[int, int]] = {}

    def count(self, fields: Fields) -> None:
        """Replace the sequence and acknowledgement numbers of a segment by relative ones.

        The first segment of a connection with an acknowledgement keeps its numbers, and so does each segment with SYN. Later
        numbers are relative to its sequence number, and to one less than its acknowledgement number.
        """
        segment = fields["tcp"]
        flags = segment.get("flags", "")
        if "." not in flags:
            return
        header = fields["ipv4"] if "ipv4" in fields else fields["ipv6"]
        ours = header["source"], segment["source_port"], header["destination"], segment["destination_port"]
        found = self._first.get(ours)
        if found is None or "S" in flags:
            found = segment["sequence"], segment["acknowledgement"] - 1 & 0xFFFFFFFF
            self._remember(ours, found)
            self._remember((*ours[2:], *ours[:2]), (found[1], found[0]))
        else:
            segment["sequence"] = segment["sequence"] - found[0] & 0xFFFFFFFF
            segment["acknowledgement"] = segment["acknowledgement"] - found[1] & 0xFFFFFFFF
        if "sack" in segment:
            first = found[1]
            segment["sack"] = [[edge - first & 0xFFFFFFFF for edge in block] for block in segment["sack"]]

    def _remember(self, ends: _Ends, first: tuple[int, int]) -> None:
        known = self._first
        if len(known) >= 2 * CONNECTIONS_MOST and ends not in known:
            del known[next(iter(known))]
        known[ends] = first
