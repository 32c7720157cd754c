"""Formats a packet's fields as a line, as tcpdump does."""

from linkrx.cli.lines.packet import line
from linkrx.cli.lines.sequences import Sequences

__all__ = ["Sequences", "line"]
