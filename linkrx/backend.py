"""The base classes of backends. A backend is one kernel mechanism that fills an arena with packets.

A backend never waits, parses, counts, logs or delivers. Its `fill` returns the number of packets, 0 if there are none now, or
raises the OSError of the kernel. The dispatcher decides what an error means. Authors of backends import everything from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from linkrx import _core
from linkrx.memory.columns import Columns, Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.memory.layouts import Layout
from linkrx.memory.report import Report
from linkrx.packets import ARENA_BYTES, Owner
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.capture_file import CaptureReader
from linkrx.sources.options import Options

__all__ = [
    "Backend",
    "BackendInfo",
    "Capabilities",
    "Columns",
    "CoreBackend",
    "Descriptors",
    "Framing",
    "Layout",
    "Mechanism",
    "Options",
    "Owner",
    "ReceiveConfig",
    "Report",
    "align",
]


@dataclass(frozen=True)
class ReceiveConfig:
    """The settings with which a backend receives from a source."""

    fd: int
    capabilities: Capabilities
    layout: Layout
    framing: Framing
    options: Options
    file: CaptureReader | None = None  # for a capture file; `fd` can only be polled then


class Mechanism(ABC):
    """Fills an arena: a backend, or a stage behind one."""

    def start(self) -> None:
        """Called once when the source is bound and in its fanout group, before the first `fill`."""
        return

    def joining(self) -> None:
        """Called right before the source joins a fanout group, between `__init__` and `start`."""
        return

    @abstractmethod
    def fill(self, arena: Owner, room: int) -> int:
        """Receive, without waiting, into `room` bytes of the arena after `arena.cursor`. Returns the number of packets.

        `room` has space for the largest packet of the layout, and one byte more. `fill` describes the packets in the descriptors
        that `__init__` got. It puts an errno of the kernel into `report.error`, also after packets. Without packets it may
        raise OSError instead. While an errno is there, `fill` is called only for packets that are `held`. ENODATA is the end of
        the source, such as of a file.
        """

    def interface_name(self, index: int) -> str | None:
        """The name of the interface with that index, if the mechanism knows it."""
        return None

    def explain(self, code: int) -> Exception | None:
        """An exception that says more than the errno that `fill` reported, or None."""
        return None

    @property
    def native(self) -> int:
        """The address of a struct lrx_mechanism (_core/mechanism.h). The receiver calls that instead of `fill`. 0: none."""
        return 0

    # The mechanism itself holds packets back for Options.latency, so that several come together.
    coalesces = False

    # Seconds after its arrival at which a packet can be read, at the latest.
    readable_within = 0.0

    # The packets that fit into the memory of a mechanism that `has_queue`. 0: the source has the queue.
    queue_limit = 0

    # Packets in memory of the mechanism are still in use and could not be copied: close() must not free it.
    held_by_others = False

    # The next `fill` needs no readable source, although nothing is `held`: data was read that is not parsed yet.
    goes_on = False

    @property
    def held(self) -> int:
        """Received packets that the next `fill` returns, without a readable source."""
        return 0

    def drops(self) -> int:
        """Packets that the kernel dropped, and that the source's counter does not include."""
        return 0

    def freezes(self) -> int | None:
        """The number of times that the kernel found the ring full; None without a ring."""
        return None

    def close(self) -> None:
        """Release the resources of `__init__`. It may be called again, after an exception."""
        return

    def leave_to_parent(self) -> None:
        """Called in a forked child, right after the fork. Close copies of descriptors only. `abandon` may follow."""
        return

    def abandon(self) -> None:
        """Called in a forked child instead of `close`. Release the memory of the child, and change nothing that is shared."""
        self.close()


class Backend(Mechanism):
    """One kernel mechanism, in a file of its name under `linkrx/backends/`, or loaded from an entry point.

    The backend with the highest `rank` that accepts a source is chosen. `honours` names the options that it can fulfil, of those
    that not every backend can: `buffer_sizes`, `snaplen`, `outgoing`, `timestamps`, `fanout`. `latency_least` is the smallest
    `latency` that it can promise, in seconds.

    `batch_size` is the default of that option. `has_queue`: packets wait in memory of the backend, so the socket buffer need not
    be large. `tells_metadata`: for packet sockets it reports PACKET_AUXDATA, which has the VLAN tag and the true length of packets
    that a filter cut.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    honours: ClassVar[frozenset[str]] = frozenset()
    latency_least: ClassVar[float] = 0.0
    batch_size: ClassVar[int] = 256
    has_queue: ClassVar[bool] = False
    tells_metadata: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str | None:
        """Why this host cannot run it, as a sentence; None when it can."""
        return None

    @classmethod
    @abstractmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Why it cannot receive from such a source, as a sentence; None when it can."""

    @classmethod
    def discouraged(cls, capabilities: Capabilities) -> str | None:
        """Why "auto" should not choose it for a source that it accepts; None when it may."""
        return None

    @classmethod
    def room(cls, layout: Layout) -> int:
        """The bytes of an arena that `fill` uses, enough for the largest packet. Only written pages take memory."""
        return ARENA_BYTES + align(layout.capacity + 1)

    @abstractmethod
    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        """Prepare to receive. If this raises, it must release everything. The descriptors outlive the backend."""


@dataclass(frozen=True)
class BackendInfo:
    """One backend on this host. `reason` says why it is not supported, or is None.

    `honours` names the options that it can fulfil, of those that not every backend can. `backend` is its class, for authors of
    backends: see `linkrx.backend`.
    """

    name: str
    supported: bool
    reason: str | None
    rank: int
    honours: frozenset[str]
    backend: type[Backend] = field(repr=False)


class CoreBackend(Backend):
    """A backend whose fill is a function of the C core, of the type of lrx_readv_fill(), and has a state.

    `__init__` calls `_use` first, and sets `_state` last. Nothing may fail after that.
    """

    _state: Any

    @classmethod
    def missing(cls) -> str | None:
        """The reason why the core is missing."""
        return _core.reason

    def _use(self, function: str, descriptors: Descriptors) -> None:
        self._mechanism = _core.new("struct lrx_mechanism *", fill=_core.function(function))
        self._descriptors, self._rows = descriptors.address(), descriptors.rows

    @property
    def native(self) -> int:
        """See Mechanism."""
        self._mechanism.state = self._state
        return _core.pointer(self._mechanism)

    def fill(self, arena: Owner, room: int) -> int:
        """Receive in one call of C, until the queue is empty, the descriptors are full, or the next packet might not fit."""
        count: int = self._mechanism.fill(
            self._state, self._descriptors, self._rows, arena.address + arena.cursor, room
        )
        return max(0, count)  # the report has the errno
