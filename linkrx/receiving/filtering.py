"""The filter of a reception: whether the kernel or linkrx runs it, and how it is replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable

from linkrx.backend import Backend
from linkrx.errors import Busy, UnsupportedOption
from linkrx.kernel.uapi import ETH_P_ALL
from linkrx.sources import filters
from linkrx.sources.file_filter import FilePrograms
from linkrx.sources.filters import FilterLike, Plan
from linkrx.sources.options import Options
from linkrx.sources.resolve import Settings
from linkrx.sources.source import Source

# Sets the filter that linkrx runs: a program of struct sock_filter (empty: none) or the programs of a capture file, whether it reads
# VLAN tags, and the seconds after which it ends when the queue was empty, or -1. Returns when the old filter is out of use.
Run = Callable[[bytes | FilePrograms, bool, float], None]

_STAYS = -1.0


def plan_at_open(settings: Settings, backend: type[Backend]) -> Plan | None:
    """Whether the kernel or linkrx filters; None without a filter. Raises UnsupportedOption for one that the source cannot have."""
    if settings.filter is None:
        return None
    options, found = settings.options, settings.capabilities
    return filters.planned(
        settings.filter,
        found,
        fresh=found.owned,
        segment=options.segment,
        metadata=_reports_metadata(backend, options),
    )


def _reports_metadata(backend: type[Backend], options: Options) -> bool:
    """Whether the metadata of packets is complete. Sockets bound to an EtherType do not get VLAN tags: __netif_receive_skb_core()."""
    return backend.tells_metadata and options.protocol in (None, ETH_P_ALL)


class SourceFilter:
    """The filter of one source. If a change fails, the old filter stays in force."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._options = settings.options
        self._plan: Plan | None = None
        self._done: tuple[Plan | None] = (None,)  # the plan of the last change(): a new tuple for each
        # "thread": the identifier of the thread that is in change(). A signal handler may call it inside.
        self._claims: dict[str, list[int]] = {}

    @property
    def explanation(self) -> str | None:
        """Whether the kernel or linkrx filters, and why; None without a filter."""
        return self._plan.explanation if self._plan else None

    @property
    def own(self) -> bool:
        """Whether linkrx filters by itself."""
        return self._plan is not None and self._plan.own and not self._plan.until_empty

    def open(self, run: Run, backend: type[Backend], readable_within: float) -> None:
        """Set the filter of the options. A socket that linkrx opened is not bound yet."""
        plan = plan_at_open(self._settings, backend)
        if plan is not None:
            self._put(run, plan, readable_within)

    def change(
        self, run: Run, given: FilterLike | None, backend: type[Backend], readable_within: float
    ) -> None:
        """Replace the filter; None removes it."""
        plan = None
        if given is not None:
            filters.checked(given)
            found = self._source.capabilities
            plan = self._planned(
                filters.compiled(given, found, ethernet=self._settings.framing.ethernet), backend
            )
        claim = [threading.get_ident()]
        try:
            if self._claims.setdefault("thread", claim) != claim:
                raise Busy("another thread is setting the filter: one at a time")
            done = self._done
            self._put(run, plan, readable_within)
            while self._done is not done:  # by a signal handler meanwhile, so its filter is the later one
                done = self._done
                self._put(run, *done, readable_within)
            self._done = (self._plan,)
        finally:
            # Nothing is called before the claim is compared, because a signal handler could raise in a call.
            if "thread" in self._claims and self._claims["thread"] is claim:
                del self._claims["thread"]

    def backend_changed(self, run: Run, backend: type[Backend], readable_within: float) -> None:
        """Let linkrx cut packets instead of the kernel if the new backend does not read their length before cutting.

        Raises UnsupportedOption if linkrx cannot run the filter.
        """
        plan = self._plan
        if (
            plan is None
            or _reports_metadata(backend, self._options)
            or not (plan.program.tags or (plan.program.cuts and not plan.own))
        ):
            return
        self._put(run, self._planned(plan.program, backend), readable_within)

    def _planned(self, program: filters.Program, backend: type[Backend]) -> Plan:
        return filters.planned(
            program,
            self._source.capabilities,
            fresh=False,
            segment=self._options.segment,
            metadata=_reports_metadata(backend, self._options),
        )

    def _put(self, run: Run, plan: Plan | None, readable_within: float) -> None:
        """Change both filters. At every moment one of them rejects: linkrx's filter is set before the kernel's is removed."""
        if plan is None:
            self._source.set_filter(None)
            self._run_own(run, None)
        elif plan.kernel:
            self._source.set_filter(plan.kernel)
            self._run_own(run, plan, readable_within)
        else:
            self._run_own(run, plan)
            try:
                self._source.set_filter(b"")
            except UnsupportedOption:
                self._run_own(run, self._plan, readable_within)
                raise
        self._plan = plan

    def _run_own(self, run: Run, plan: Plan | None, readable_within: float = 0.0) -> None:
        file = self._source.file
        if plan is None or not plan.own:
            run(b"", False, _STAYS)
            if file is not None:
                file.filters.clear()
        elif file is not None and plan.program.of_file is not None:
            file.filters.put(plan.program.of_file, lambda programs: run(programs, False, _STAYS))
        else:
            run(plan.program.code, plan.program.tags, readable_within if plan.until_empty else _STAYS)
