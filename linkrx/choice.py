"""The choice of a backend for a source, with a reason for each backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from linkrx.backend import BackendInfo
from linkrx.errors import BackendUnavailable, UnsupportedOption, UnsupportedSource
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.options import Options


@dataclass(frozen=True)
class Verdict:
    """The decision about one backend: `outcome` is `chosen`, `accepted` or `refused`, `reason` a sentence."""

    backend: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """The decision, best backend first.

    `ladder` has the name of the chosen backend, then those that replace it if the kernel refuses it at run time. A named backend
    is not replaced. `filter` says whether the kernel or linkrx filters, and why; None without a filter.
    """

    source: str
    ladder: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    filter: str | None = None

    @property
    def backend(self) -> str:
        """The chosen backend's name."""
        return self.ladder[0]

    def explain(self) -> str:
        """One line per backend: chosen, accepted or refused, and why. With a filter, one more line says who filters."""
        width = max(len(verdict.backend) for verdict in self.verdicts)
        lines = [f"{v.backend:<{width}}  {v.outcome:<8}  {v.reason}" for v in self.verdicts]
        if self.filter:
            lines.append(f"{'filter':<{width}}  {self.filter}")
        return "\n".join(lines)

    def demoted(self, reason: str) -> Choice:
        """The choice after the kernel refused the chosen backend at run time."""
        refused, following = self.ladder[:2]

        def now(verdict: Verdict) -> Verdict:
            if verdict.backend == refused:
                return replace(verdict, outcome="refused", reason=reason)
            if verdict.backend == following:
                return replace(verdict, outcome="chosen", reason=f"took over from {refused}")
            return verdict

        return replace(self, ladder=self.ladder[1:], verdicts=tuple(map(now, self.verdicts)))


def decide(
    capabilities: Capabilities,
    infos: Sequence[BackendInfo],
    options: Options,
    backend: str = "auto",
    avoid: Collection[str] = (),
) -> Choice:
    """Choose a backend. A pure function: the same arguments give the same choice.

    "auto" takes the highest-ranking backend that this host supports, that accepts the source and honours the options. A named
    backend is taken, or this raises BackendUnavailable if this host does not have it, UnsupportedSource if it does not accept
    the source, UnsupportedOption if it cannot honour an option.
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
    if missing:
        return f"{info.name} cannot honour {', '.join(missing)}"
    least = info.backend.latency_least
    if options.latency is not None and options.latency < least:
        return f"{info.name} cannot honour latency={options.latency}: its least is {least} s"
    return None
