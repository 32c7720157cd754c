"""From a source to a dispatcher: which backends there are, which one to take, and opening it."""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Unpack

from linkrx import _core
from linkrx.backend import Backend
from linkrx.capabilities import Capabilities, HasFileno, probe
from linkrx.choice import Choice, Verdict
from linkrx.dispatcher import Dispatcher
from linkrx.errors import BackendUnavailable, UnsupportedOption, UnsupportedSource
from linkrx.options import OpenOptions, Options
from linkrx.packets import Deliver
from linkrx.source import open_source

logger = logging.getLogger("linkrx")

ENTRY_POINTS = "linkrx.backends"

# Not `import linkrx.backends`: the package's name is also that of the public function below.
_FOLDER: list[str] = list(import_module("linkrx.backends").__path__)


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


@cache
def _classes() -> tuple[type[Backend], ...]:
    """Every backend class: the files of linkrx/backends/, then those that other distributions bring."""
    found: dict[str, type[Backend]] = {}
    for module in pkgutil.iter_modules(_FOLDER):
        for value in vars(import_module(f"linkrx.backends.{module.name}")).values():
            if (
                isinstance(value, type)
                and issubclass(value, Backend)
                and value.__dict__.get("name") == module.name
            ):
                found[value.name] = value
    for entry in entry_points(group=ENTRY_POINTS):
        # A plug-in of somebody else must not take reception down with it, and must not vanish either.
        try:
            value = entry.load()
        except Exception:
            logger.exception("the backend %r of %s could not be loaded", entry.name, entry.value)
            continue
        if not (
            isinstance(value, type) and issubclass(value, Backend) and {"name", "rank"} <= set(dir(value))
        ):
            logger.error(
                "the backend %r of %s is left out: it is no Backend with a name and a rank",
                entry.name,
                entry.value,
            )
        elif value.name in found:
            logger.warning("the backend %r of %s is left out: the name is taken", value.name, entry.value)
        else:
            found[value.name] = value
    return tuple(sorted(found.values(), key=lambda backend: (-backend.rank, backend.name)))


def backends() -> tuple[BackendInfo, ...]:
    """Every backend, best first, with whether this host supports it and if not why."""
    return tuple(
        BackendInfo(b.name, reason is None, reason, b.rank, b.honours, b)
        for b, reason in ((b, _missing(b)) for b in _classes())
    )


def _missing(backend: type[Backend]) -> str | None:
    try:
        return backend.missing()
    except Exception as error:
        logger.exception("the backend %r could not say whether this host supports it", backend.name)
        return f"its own check failed: {error!r}"


def from_environment(backend: str = "auto") -> tuple[str, tuple[str, ...]]:
    """The backend asked for and those to avoid, as `decide` takes them: LINKRX_BACKEND replaces "auto" only."""
    if backend == "auto":
        backend = os.environ.get("LINKRX_BACKEND") or "auto"
    return backend, tuple(filter(None, map(str.strip, os.environ.get("LINKRX_AVOID", "").split(","))))


def decide(
    capabilities: Capabilities,
    infos: Sequence[BackendInfo],
    options: Options,
    backend: str = "auto",
    avoid: Collection[str] = (),
) -> Choice:
    """Decide, from what is known alone: the same arguments give the same answer.

    "auto" takes the highest-ranking backend that this host supports, that accepts the source and honours the options.
    A named backend is that one or an error: BackendUnavailable when it does not exist or this host lacks it,
    UnsupportedSource when it does not accept the source, UnsupportedOption when it cannot honour an option.
    """
    known = [info.name for info in infos]
    if backend != "auto":
        if backend not in known:
            raise BackendUnavailable(f"there is no backend {backend!r}: there are {', '.join(known)}")
        _check_named(next(info for info in infos if info.name == backend), capabilities, options)
    ladder: list[str] = []
    verdicts = []
    for info in infos:
        reason = _refusal(info, capabilities, options)
        if reason is None and backend == "auto" and info.name in avoid:
            reason = "LINKRX_AVOID names it"
        discouraged = None if reason else info.backend.discouraged(capabilities)
        if reason is not None:
            verdict = Verdict(info.name, "refused", reason)
        elif backend != "auto" and info.name != backend:
            verdict = Verdict(info.name, "accepted", f"would do, but {backend} was named")
        elif backend == "auto" and discouraged is not None:
            verdict = Verdict(info.name, "accepted", f"only when named: {discouraged}")
        elif ladder:
            ladder.append(info.name)
            verdict = Verdict(info.name, "accepted", f"would do, but {ladder[0]} is better")
        else:
            ladder.append(info.name)
            verdict = Verdict(
                info.name, "chosen", "it was named" if backend != "auto" else "the best that takes the source"
            )
        verdicts.append(verdict)
    if not ladder:
        why = "\n".join(f"  {v.backend}: {v.reason}" for v in verdicts)
        needed = ", ".join(f"{name}={getattr(options, name)!r}" for name in options.needed())
        kind = UnsupportedOption if needed else UnsupportedSource
        raise kind(
            f"no backend receives from the {capabilities.title}{f' with {needed}' if needed else ''}:\n{why}"
        )
    return Choice(capabilities.title, tuple(ladder), tuple(verdicts))


def _decide_here(capabilities: Capabilities, options: Options, backend: str) -> Choice:
    """On this host, with the environment's say."""
    infos = backends()
    name, avoid = from_environment(backend)
    for unknown in set(avoid) - {info.name for info in infos}:
        logger.warning("LINKRX_AVOID names %r, and there is no such backend", unknown)
    try:
        return decide(capabilities, infos, options, name, avoid)
    except (BackendUnavailable, UnsupportedOption, UnsupportedSource) as error:
        if name == backend:
            raise
        raise type(error)(f"LINKRX_BACKEND={name}: {error}") from error


@cache
def _warn_without_core(reason: str) -> None:
    """Once in a process."""
    logger.warning("without its C core linkrx receives many times slower: %s", reason)


def _check_named(info: BackendInfo, capabilities: Capabilities, options: Options) -> None:
    if not info.supported:
        raise BackendUnavailable(f"{info.name} is not available here: {info.reason}")
    refusal = info.backend.refuses(capabilities)
    if refusal is not None:
        raise UnsupportedSource(f"{info.name} does not take this source: {refusal}")
    refusal = _unhonoured(info, options)
    if refusal is not None:
        raise UnsupportedOption(f"{refusal}, and it was named for the {capabilities.title}")


def _refusal(info: BackendInfo, capabilities: Capabilities, options: Options) -> str | None:
    return info.reason or info.backend.refuses(capabilities) or _unhonoured(info, options)


def _unhonoured(info: BackendInfo, options: Options) -> str | None:
    missing = [f"{name}={getattr(options, name)!r}" for name in options.needed() if name not in info.honours]
    return f"{info.name} cannot honour {', '.join(missing)}" if missing else None


def choose(source: int | str | HasFileno, *, backend: str = "auto", **options: Unpack[OpenOptions]) -> Choice:
    """Which backend `open` would take with the same arguments, and why. Opens nothing and changes nothing.

    The environment has its say as in `open`. Raises what `open` would raise for such a source and such options, as far
    as probing can tell: not what the kernel answers when a mechanism is set up, and no MissingPrivilege for an interface.
    """
    wanted = _checked("choose", options)
    found = probe(source)
    wanted.check_source(found)
    found = wanted.configured(found)
    choice = _decide_here(found, wanted, backend)
    wanted.framing(found)  # raises for frames of a kind that linkrx does not know
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
    source: int | str | HasFileno,
    deliver: Deliver | None = None,
    *,
    backend: str = "auto",
    **options: Unpack[OpenOptions],
) -> Dispatcher:
    """Receive packets from `source`. Receiving is live when this returns.

    `source`: a file descriptor or an object with `fileno()`, which is borrowed and never closed; or an interface
    name, for which linkrx opens, configures and owns an AF_PACKET socket. `deliver(remote, local, protocol, packet)`
    is called for every packet by `dispatch`, `drain` and `run`; iteration needs none.

    `backend`: "auto" takes the best that accepts the source, as `choice.explain()` of the result tells; a name is
    that backend or an error. The environment variable LINKRX_BACKEND replaces "auto", and LINKRX_AVOID=a,b takes
    names from it. The options are those of `OpenOptions`:

    `batch_size` packets per receive at most, by default what suits the backend; `ethernet`, `vnet_header`,
    `packet_info` say what the probe cannot know; `buffer_sizes`, an iovec ladder that may cut packets; `promiscuous`,
    `outgoing` (own transmissions too), `timestamps` for packet sockets; `receive_buffer`, bytes of socket buffer or
    ring; `fanout`, the number of a group of dispatchers that share an interface, or "auto" for a new one, or a pair of
    that and "hash", "lb", "cpu", "rollover" or "qm"; `latency`, seconds that a ring may hold a packet back; `segment`,
    to have super-packets split into the frames that they stand for, with complete checksums: for sources with a virtio-net
    header, which packet sockets are given for it.

    Raises UnsupportedSource, UnsupportedOption, BackendUnavailable, MissingPrivilege, ValueError for values that
    cannot be, and OSError for what the kernel says.
    """
    if deliver is not None and not callable(deliver):
        raise TypeError(f"deliver={deliver!r}: give a callable deliver(remote, local, protocol, packet)")
    wanted = _checked("open", options)
    opened = open_source(source, wanted)
    try:
        choice = _decide_here(opened.capabilities, wanted, backend)
        if _core.reason is not None and from_environment(backend)[0] == "auto":
            _warn_without_core(_core.reason)
        return Dispatcher(opened, wanted, choice, {one.name: one for one in _classes()}, deliver)
    except BaseException:
        opened.close()
        raise
