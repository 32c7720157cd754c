"""The counters of a dispatcher, and the reasons why it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(slots=True)
class Tally:
    """The counters of a Reception. Classification and the receiver have others.

    `undelivered`: packets that the backend held at a stop. `indescribable`: packets that a virtio-net header cannot describe.
    `ring_drops`: drops of a ring that another backend has replaced. `cut_warned`: the warning about cut frames was logged.
    """

    waits: int = 0
    link_downs: int = 0
    undelivered: int = 0
    indescribable: int = 0
    ring_drops: int = 0
    cut_warned: bool = False


class End(Enum):
    """Why reception ended."""

    STOPPED = "stop() was called"
    EOF = "the peer closed, or the capture file ended"
    LINK_GONE = "the device was deleted"


@dataclass(frozen=True)
class Stats:
    """Counters since `open`. None if the source does not report them.

    `packets` were delivered, or wait in the current batch; `bytes` are those of their frames, link headers included.
    `undelivered` were received, and dropped by `stop()`. `runts`, `empty` and `unknown_protocol` are received frames that are no
    packets. `malformed` are super-packets that cannot be split, and frames whose checksum cannot be finished, because their
    virtio-net header is wrong. `truncated` counts among all of these. `filtered` are packets that linkrx rejected by the filter,
    and with `outgoing=True` on every interface also those of `lo` as they leave. It is None if linkrx rejects nothing:
    the kernel does not count what its filter rejects.

    `kernel_drops` never reached linkrx. `ring_freezes` is how often the kernel found a ring full. `receives` are system calls
    that received, or blocks of a ring. `waits` are calls that slept. `sent` are frames that the kernel accepted from `send` and
    `send_batch`.
    """

    packets: int
    bytes: int
    batches: int
    receives: int
    waits: int
    runts: int
    empty: int
    unknown_protocol: int
    malformed: int = field(default=0, kw_only=True)
    truncated: int
    kernel_drops: int | None
    ring_freezes: int | None
    link_downs: int | None
    demotions: int
    undelivered: int
    sent: int = field(default=0, kw_only=True)
    filtered: int | None = field(default=None, kw_only=True)
