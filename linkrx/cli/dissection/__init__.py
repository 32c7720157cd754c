"""Dissects packets, one module per protocol. The result is a dictionary of fields, which `linkrx dump` prints as a line or as JSON.

All functions are pure. They never trust a length in a packet: each gets the end of the captured bytes.
"""

from linkrx.cli.dissection.fields import ALL, CHECKED, LINE
from linkrx.cli.dissection.link import dissect

__all__ = ["ALL", "CHECKED", "LINE", "dissect"]
