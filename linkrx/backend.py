"""What a backend is: one kernel mechanism that fills an arena with packets.

A backend never waits, parses, counts, logs or delivers. It is asked to `fill`, and answers with a count, with 0
when there is nothing now, or with the OSError that the kernel gave; the dispatcher decides what that means. What an
author of a backend needs is imported from here.
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
    """What a backend needs to know to receive from one source."""

    fd: int
    capabilities: Capabilities
    layout: Layout
    framing: Framing
    options: Options
    file: CaptureReader | None = None  # of a capture file; `fd` can only be polled then


class Mechanism(ABC):
    """What fills an arena: a backend, or a stage behind one."""

    def start(self) -> None:
        """The source is live: bound, and in its fanout group. Called once, before the first `fill`."""
        return

    def joining(self) -> None:
        """The source joins a fanout group now, between `__init__` and `start`."""
        return

    @abstractmethod
    def fill(self, arena: Owner, room: int) -> int:
        """Receive what is there now, without waiting, into `room` bytes behind `arena.cursor`.

        `room` is enough for a packet of any size that the layout keeps, and one byte more. Reports in the
        descriptors it was made with, and returns how many packets they describe. The kernel's errno goes into
        `report.error`, also when it came behind packets; without packets it may be raised as OSError instead.
        While an errno is there, `fill` is called for what is `held` only. ENODATA: the source is over, as a file is at its end.
        """

    def interface_name(self, index: int) -> str | None:
        """The name of the interface of that number, where the mechanism knows it."""
        return None

    def explain(self, code: int) -> Exception | None:
        """What to raise for an errno that `fill` has told, where that is more than its name says."""
        return None

    @property
    def native(self) -> int:
        """The address of a struct lrx_mechanism (_core/mechanism.h), which the receiver calls in place of `fill`; 0: none."""
        return 0

    # The mechanism itself holds packets back for Options.latency, so that several come together.
    coalesces = False

    # A packet can be read so many seconds after it has come, at the latest.
    readable_within = 0.0

    # How many packets can wait in memory of the mechanism, for one that `has_queue`; 0: the source has the queue.
    queue_limit = 0

    # Somebody still reads in memory of the mechanism, which could not be copied: close() must leave it.
    held_by_others = False

    # The next `fill` needs no readable source, although nothing is `held`: packets wait that nobody has counted.
    goes_on = False

    @property
    def held(self) -> int:
        """Packets that were received and wait for the next `fill`, which needs no readable source for them."""
        return 0

    def drops(self) -> int:
        """Packets that the kernel dropped since this was made, and that the source's own counter leaves out."""
        return 0

    def freezes(self) -> int | None:
        """How often a ring was found full; None without a ring."""
        return None

    def close(self) -> None:
        """Release what `__init__` took. Called again where an exception came in between: do nothing then."""
        return

    def leave_to_parent(self) -> None:
        """In a forked child, at once: close copies of descriptors, and nothing else. `abandon` may follow."""
        return

    def abandon(self) -> None:
        """In a forked child, in place of `close`: release what is the child's own, change nothing that is shared."""
        self.close()


class Backend(Mechanism):
    """One kernel mechanism, in a file of its name under `linkrx/backends/` or behind an entry point.

    `rank` orders backends that accept a source: the highest is chosen. `honours` names the options beyond the
    common ones that it can fulfil: `buffer_sizes`, `outgoing`, `timestamps`, `fanout`.

    `batch_size` is how many packets a receive takes at most when the caller leaves it open. `has_queue`: packets wait
    in memory of the backend's own, so the buffer of a socket need not be large. `tells_metadata`: of packet sockets it reports
    what the kernel tells beside a packet (PACKET_AUXDATA): the VLAN tag, and the true length of what a filter cut.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    honours: ClassVar[frozenset[str]] = frozenset()
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
        """Bytes of an arena that `fill` makes use of, enough for a packet of any size. Only what is written takes memory."""
        return ARENA_BYTES + align(layout.capacity + 1)

    @abstractmethod
    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        """Prepare to receive. Whatever fails here must leave nothing behind. The descriptors outlive the backend."""


@dataclass(frozen=True)
class BackendInfo:
    """One backend on this host. `reason` is the sentence that says why it is not supported, else None. `honours` names
    the options that not every backend has, `backend` is its class: for authors of backends, see `linkrx.backend`.
    """

    name: str
    supported: bool
    reason: str | None
    rank: int
    honours: frozenset[str]
    backend: type[Backend] = field(repr=False)


class CoreBackend(Backend):
    """A backend whose fill is a function of the C core, of the type of lrx_readv_fill(), and has a state.

    `__init__` begins with `_use` and ends with `_state`, behind which nothing may fail.
    """

    _state: Any

    @classmethod
    def missing(cls) -> str | None:
        """The core may not have been built."""
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
        """One crossing: until nothing is there, the descriptors are full, or the next packet might not fit."""
        count: int = self._mechanism.fill(
            self._state, self._descriptors, self._rows, arena.address + arena.cursor, room
        )
        return max(0, count)  # the report has the errno
