"""`open` makes a dispatcher of a source. `choose` decides the same, and opens nothing."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import cache
from typing import Unpack

from linkrx import _core, registry
from linkrx.choice import Choice, decide
from linkrx.errors import BackendUnavailable, UnsupportedOption, UnsupportedSource
from linkrx.packets import Deliver
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.receiving.filtering import plan_at_open
from linkrx.registry import backends
from linkrx.sources.capabilities import AnySource, Capabilities, probe
from linkrx.sources.options import OpenOptions, Options
from linkrx.sources.resolve import Settings, resolve
from linkrx.sources.source import open_source

logger = logging.getLogger("linkrx")


def from_environment(backend: str = "auto") -> tuple[str, tuple[str, ...]]:
    """The arguments of `decide` for the backend, and for those to avoid. LINKRX_BACKEND replaces "auto" only."""
    if backend == "auto":
        backend = os.environ.get("LINKRX_BACKEND") or "auto"
    return backend, tuple(filter(None, map(str.strip, os.environ.get("LINKRX_AVOID", "").split(","))))


def decided(found: Capabilities, options: Options, backend: str = "auto") -> tuple[Settings, Choice]:
    """All that `open` decides before it opens or changes anything, on this host and with this environment."""
    settings = resolve(found, options)
    infos = backends()
    name, avoid = from_environment(backend)
    for unknown in set(avoid) - {info.name for info in infos}:
        logger.warning("LINKRX_AVOID names %r, and there is no such backend", unknown)
    try:
        choice = decide(settings.capabilities, infos, options, name, avoid)
    except (BackendUnavailable, UnsupportedOption, UnsupportedSource) as error:
        if name == backend:
            raise
        raise type(error)(f"LINKRX_BACKEND={name}: {error}") from error
    plan = plan_at_open(settings, next(one for one in registry.classes() if one.name == choice.backend))
    return settings, replace(choice, filter=plan.explanation if plan else None)


@cache
def _warn_without_core(reason: str) -> None:
    """Warn once per process."""
    logger.warning("without its C core linkrx receives many times slower: %s", reason)


def choose(source: AnySource, *, backend: str = "auto", **options: Unpack[OpenOptions]) -> Choice:
    """The backend that `open` would take with the same arguments, and why. Opens nothing and changes nothing.

    Reads the same environment variables as `open`. Raises the same errors, except those of the kernel when a mechanism is set
    up, and MissingPrivilege for an interface.
    """
    wanted = _checked("choose", options)
    _, choice = decided(probe(source), wanted, backend)
    return choice


def _checked(function: str, options: OpenOptions) -> Options:
    """The options. Raises TypeError for an unknown one, and the errors of Options."""
    known = Options.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{function}() has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )
    return Options(**options)


def open(  # noqa: A001
    source: AnySource,
    deliver: Deliver | None = None,
    *,
    backend: str = "auto",
    **options: Unpack[OpenOptions],
) -> Dispatcher:
    """Receive packets from `source`. Receiving is live when this returns.

    `source` is one of these:

    * a file descriptor or an object with `fileno()`: it is borrowed, and never closed;
    * the name of an interface: linkrx opens, configures and owns an AF_PACKET socket;
    * "any": every interface, also those that come later;
    * a `CaptureFile`, or an `os.PathLike` for one.

    `dispatch`, `drain` and `run` call `deliver(remote, local, protocol, packet)` for every packet. Iteration needs no `deliver`.

    `backend`: "auto" takes the best backend that accepts the source; `choice.explain()` of the result says why. A name takes that
    backend or raises. The environment variable LINKRX_BACKEND replaces "auto", and LINKRX_AVOID=a,b removes names from it.

    The options are those of `OpenOptions`:

    * `batch_size`: packets per receive at most. The default depends on the backend.
    * `ethernet`, `vnet_header`, `packet_info`: the framing, if probing cannot find it out.
    * `buffer_sizes`: sizes of the iovec buffers for a packet. `snaplen`: bytes that are kept of each frame. Both can cut packets.
    * `segment`: split super-packets into the frames that they stand for, with complete checksums. For sources with a virtio-net
      header; packet sockets are given one.
    * `filter`: an expression in tcpdump's language ("udp port 53"), or a sequence of BPF instructions (`parse_ddd`).
    * `promiscuous`, `outgoing` (frames of this host too), `timestamps`: for packet sockets.
    * `fanout`: share an interface with other dispatchers. The number of a group, "auto" for a new one, or a pair of that and
      "hash", "lb", "cpu", "rollover" or "qm".
    * `protocol`: an EtherType. The kernel then receives only its packets from an interface by name.
    * `receive_buffer`: bytes of the socket buffer or ring.
    * `latency`: seconds that a packet may wait for others to come with it, 0 for none.

    Raises UnsupportedSource, UnsupportedOption, BackendUnavailable, MissingPrivilege, TypeError or ValueError for invalid
    arguments, and OSError for kernel errors that linkrx cannot handle.
    """
    if deliver is not None and not callable(deliver):
        raise TypeError(f"deliver={deliver!r}: give a callable deliver(remote, local, protocol, packet)")
    wanted = _checked("open", options)
    settings, choice = decided(probe(source), wanted, backend)
    if _core.reason is not None and from_environment(backend)[0] == "auto":
        _warn_without_core(_core.reason)
    opened = open_source(source, settings)
    try:
        return Dispatcher(opened, settings, choice, {one.name: one for one in registry.classes()}, deliver)
    except BaseException:
        opened.close()
        raise
