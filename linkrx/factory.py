"""From a source to a dispatcher: `open`, and `choose`, which only looks."""

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
    """The backend asked for and those to avoid, as `decide` takes them: LINKRX_BACKEND replaces "auto" only."""
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
    """Once in a process."""
    logger.warning("without its C core linkrx receives many times slower: %s", reason)


def choose(source: AnySource, *, backend: str = "auto", **options: Unpack[OpenOptions]) -> Choice:
    """Which backend `open` would take with the same arguments, and why. Opens nothing and changes nothing.

    The environment has its say as in `open`. Raises what `open` would raise for such a source and such options, as far
    as probing can tell: not what the kernel answers when a mechanism is set up, and no MissingPrivilege for an interface.
    """
    wanted = _checked("choose", options)
    _, choice = decided(probe(source), wanted, backend)
    return choice


def _checked(function: str, options: OpenOptions) -> Options:
    """Raises TypeError for an option that there is not, and what Options does."""
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

    `source`: a file descriptor or an object with `fileno()`, which is borrowed and never closed; an interface
    name, for which linkrx opens, configures and owns an AF_PACKET socket; "any", which is every interface, also those that
    come later; or a `CaptureFile`, for which any `os.PathLike` is short. `deliver(remote, local, protocol, packet)`
    is called for every packet by `dispatch`, `drain` and `run`; iteration needs none.

    `backend`: "auto" takes the best that accepts the source, as `choice.explain()` of the result tells; a name is
    that backend or an error. The environment variable LINKRX_BACKEND replaces "auto", and LINKRX_AVOID=a,b takes
    names from it. The options are those of `OpenOptions`:

    `batch_size` packets per receive at most, by default what suits the backend; `ethernet`, `vnet_header`,
    `packet_info` say what the probe cannot know; `buffer_sizes`, an iovec ladder that may cut packets; `snaplen`, how many bytes
    of each frame are kept; `promiscuous`,
    `filter`, an expression in tcpdump's language ("udp port 53") or a sequence of BPF instructions (`parse_ddd`);
    `outgoing` (own transmissions too), `timestamps` for packet sockets; `receive_buffer`, bytes of socket buffer or
    ring; `fanout`, the number of a group of dispatchers that share an interface, or "auto" for a new one, or a pair of
    that and "hash", "lb", "cpu", "rollover" or "qm"; `latency`, seconds that a ring may hold a packet back; `segment`,
    to have super-packets split into the frames that they stand for, with complete checksums: for sources with a virtio-net
    header, which packet sockets are given for it.

    `protocol`, an EtherType: of an interface by name only its packets, chosen by the kernel.

    Raises UnsupportedSource, UnsupportedOption, BackendUnavailable, MissingPrivilege, ValueError for values that
    cannot be, and OSError for what the kernel says.
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
