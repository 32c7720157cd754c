"""A packet's fields as a line in tcpdump's manner."""

from linkrx.cli.lines.packet import line

__all__ = ["line"]
