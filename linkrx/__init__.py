"""The fastest and most dependable way to receive link-layer packets in Python on Linux.

`linkrx.open(source)` probes what the source can do, picks the best backend and hands over every packet with its
protocol and link addresses.
"""

from linkrx.buffers import BUFFER_SIZES, IovecBuffer
from linkrx.capabilities import Capabilities, HasFileno, probe
from linkrx.choice import Choice, Verdict
from linkrx.dispatcher import Batches, Dispatcher
from linkrx.errors import (
    BackendUnavailable,
    Busy,
    Closed,
    Ended,
    LinkrxError,
    MissingPrivilege,
    UnsupportedOption,
    UnsupportedSource,
)
from linkrx.factory import BackendInfo, backends, choose, open
from linkrx.headers import Flags, Gso, Vlan, VnetHeader
from linkrx.options import OpenOptions
from linkrx.packets import Batch, Deliver, Packet
from linkrx.stats import End, Stats
from linkrx.tuntap import Offload, TunTap

__version__ = "0.1.0"

__all__ = [
    "BUFFER_SIZES",
    "BackendInfo",
    "BackendUnavailable",
    "Batch",
    "Batches",
    "Busy",
    "Capabilities",
    "Choice",
    "Closed",
    "Deliver",
    "Dispatcher",
    "End",
    "Ended",
    "Flags",
    "Gso",
    "HasFileno",
    "IovecBuffer",
    "LinkrxError",
    "MissingPrivilege",
    "Offload",
    "OpenOptions",
    "Packet",
    "Stats",
    "TunTap",
    "UnsupportedOption",
    "UnsupportedSource",
    "Verdict",
    "Vlan",
    "VnetHeader",
    "backends",
    "choose",
    "open",
    "probe",
]
