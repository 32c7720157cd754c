"""The fastest and most dependable way to receive link-layer packets in Python on Linux.

`linkrx.open(source)` probes what the source can do, picks the best backend and hands over every packet with its
protocol and link addresses.
"""

from linkrx.backend import BackendInfo
from linkrx.capture.writer import PcapWriter, WritableFile
from linkrx.choice import Choice, Verdict
from linkrx.errors import (
    BackendUnavailable,
    Busy,
    Closed,
    DamagedCapture,
    Ended,
    LinkrxError,
    MissingPrivilege,
    RecordingFailed,
    UnsupportedOption,
    UnsupportedSource,
)
from linkrx.factory import choose, open
from linkrx.memory.layouts import BUFFER_SIZES, IovecBuffer
from linkrx.packets import Batch, Deliver, Packet
from linkrx.packets.headers import Flags, Gso, Vlan, VnetHeader
from linkrx.receiving.dispatcher import Batches, Dispatcher
from linkrx.receiving.stats import End, Stats
from linkrx.registry import backends
from linkrx.sources.capabilities import Capabilities, HasFileno, probe
from linkrx.sources.capture_file import BinaryFile, CaptureFile
from linkrx.sources.interfaces import Interface, interfaces
from linkrx.sources.options import OpenOptions
from linkrx.sources.tuntap import Offload, TunTap

__version__ = "0.1.0"

__all__ = [
    "BUFFER_SIZES",
    "BackendInfo",
    "BackendUnavailable",
    "Batch",
    "Batches",
    "BinaryFile",
    "Busy",
    "Capabilities",
    "CaptureFile",
    "Choice",
    "Closed",
    "DamagedCapture",
    "Deliver",
    "Dispatcher",
    "End",
    "Ended",
    "Flags",
    "Gso",
    "HasFileno",
    "Interface",
    "IovecBuffer",
    "LinkrxError",
    "MissingPrivilege",
    "Offload",
    "OpenOptions",
    "Packet",
    "PcapWriter",
    "RecordingFailed",
    "Stats",
    "TunTap",
    "UnsupportedOption",
    "UnsupportedSource",
    "Verdict",
    "Vlan",
    "VnetHeader",
    "WritableFile",
    "backends",
    "choose",
    "interfaces",
    "open",
    "probe",
]


def __dir__() -> list[str]:
    """The public names, without the rooms."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
