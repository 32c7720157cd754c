"""The fastest and most dependable way to receive link-layer packets in Python on Linux.

`linkrx.open(source)` probes the source, chooses the best backend, and delivers every packet with its protocol and link
addresses.
"""

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing

if _typing.TYPE_CHECKING:
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
    from linkrx.sources.filters import FilterLike, parse_ddd
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
    "FilterLike",
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
    "parse_ddd",
    "probe",
]

# Where the public names are. A name is imported when it is first used, for pytest imports this package in every run.
_HOMES = {
    "BUFFER_SIZES": "linkrx.memory.layouts",
    "BackendInfo": "linkrx.backend",
    "BackendUnavailable": "linkrx.errors",
    "Batch": "linkrx.packets",
    "Batches": "linkrx.receiving.dispatcher",
    "BinaryFile": "linkrx.sources.capture_file",
    "Busy": "linkrx.errors",
    "Capabilities": "linkrx.sources.capabilities",
    "CaptureFile": "linkrx.sources.capture_file",
    "Choice": "linkrx.choice",
    "Closed": "linkrx.errors",
    "DamagedCapture": "linkrx.errors",
    "Deliver": "linkrx.packets",
    "Dispatcher": "linkrx.receiving.dispatcher",
    "End": "linkrx.receiving.stats",
    "Ended": "linkrx.errors",
    "Flags": "linkrx.packets.headers",
    "Gso": "linkrx.packets.headers",
    "FilterLike": "linkrx.sources.filters",
    "HasFileno": "linkrx.sources.capabilities",
    "Interface": "linkrx.sources.interfaces",
    "IovecBuffer": "linkrx.memory.layouts",
    "LinkrxError": "linkrx.errors",
    "MissingPrivilege": "linkrx.errors",
    "Offload": "linkrx.sources.tuntap",
    "OpenOptions": "linkrx.sources.options",
    "Packet": "linkrx.packets",
    "PcapWriter": "linkrx.capture.writer",
    "RecordingFailed": "linkrx.errors",
    "Stats": "linkrx.receiving.stats",
    "TunTap": "linkrx.sources.tuntap",
    "UnsupportedOption": "linkrx.errors",
    "UnsupportedSource": "linkrx.errors",
    "Verdict": "linkrx.choice",
    "Vlan": "linkrx.packets.headers",
    "VnetHeader": "linkrx.packets.headers",
    "WritableFile": "linkrx.capture.writer",
    "backends": "linkrx.registry",
    "choose": "linkrx.factory",
    "interfaces": "linkrx.sources.interfaces",
    "open": "linkrx.factory",
    "parse_ddd": "linkrx.sources.filters",
    "probe": "linkrx.sources.capabilities",
}


if not _typing.TYPE_CHECKING:  # type checkers would take it for every name

    def __getattr__(name: str) -> object:
        """A public name, when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, without the rooms."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


class _Package(_types.ModuleType):
    """Python gives a package its rooms as attributes; `backends` is the function all the same, not the room."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, _types.ModuleType):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
