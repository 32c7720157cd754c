"""Sequence numbers of TCP counted from where a connection begins, as tcpdump counts them."""

from __future__ import annotations

from linkrx.cli.dissection.fields import Fields

CONNECTIONS_MOST = 65_536  # that are remembered: the one that began first is forgotten

_Ends = tuple[str, int, str, int]


class Sequences:
    """The first numbers of each connection, of either direction."""

    def __init__(self) -> None:
        self._first: dict[_Ends, tuple[int, int]] = {}

    def count(self, fields: Fields) -> None:
        """Make the numbers of a segment those that a line shows.

        The first segment with an acknowledgement that is seen of a connection, and each with SYN, keep theirs; what follows counts from
        the one before the first byte that it acknowledges.
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
