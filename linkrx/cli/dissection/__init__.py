"""What is in a packet, protocol by protocol: from bytes to fields with names, which `linkrx dump` prints as a line or as JSON.

Pure functions. What a packet says of lengths is never believed: each function is given where the bytes that are there end.
"""

from linkrx.cli.dissection.fields import ALL, CHECKED, LINE
from linkrx.cli.dissection.link import dissect

__all__ = ["ALL", "CHECKED", "LINE", "dissect"]
