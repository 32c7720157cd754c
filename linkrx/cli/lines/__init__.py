"""A packet's fields as a line in tcpdump's manner."""

from linkrx.cli.lines.packet import line
from linkrx.cli.lines.sequences import Sequences

__all__ = ["Sequences", "line"]
