"""What a reception is filtered by, who runs it, and how another takes its place."""

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

# Lets linkrx run a program (of struct sock_filter; empty: none), or those of a capture file, on what waits and what comes: the program, whether it reads
# tags, and after how many seconds it ends once nothing was there, or -1. Returns when nothing of before is handed over any more.
Run = Callable[[bytes | FilePrograms, bool, float], None]

_STAYS = -1.0


def plan_at_open(settings: Settings, backend: type[Backend]) -> Plan | None:
    """Who is to filter; None without a filter. Raises UnsupportedOption for a filter that the source cannot have."""
    if settings.filter is None:
        return None
    options, found = settings.options, settings.capabilities
    return filters.planned(
        settings.filter, found, fresh=found.owned, segment=options.segment, told=_tells(backend, options)
    )


def _tells(backend: type[Backend], options: Options) -> bool:
    """Whether it is known what the kernel tells beside a packet of a packet socket. Where one is bound to an EtherType, tags are
    forgotten before: __netif_receive_skb_core().
    """
    return backend.tells_metadata and options.protocol in (None, ETH_P_ALL)


class SourceFilter:
    """The filter of one source. Whatever fails leaves the one before in force."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._options = settings.options
        self._plan: Plan | None = None
        self._changing = threading.RLock()  # a signal handler may come in again

    @property
    def explanation(self) -> str | None:
        """Who filters, and why it; None without a filter."""
        return self._plan.explanation if self._plan else None

    @property
    def own(self) -> bool:
        """Whether linkrx filters by itself."""
        return self._plan is not None and self._plan.own and not self._plan.until_empty

    def open(self, run: Run, backend: type[Backend], readable_within: float) -> None:
        """Filter as the options say: an own socket is not bound yet."""
        plan = plan_at_open(self._settings, backend)
        if plan is not None:
            self._put(run, plan, readable_within)

    def change(
        self, run: Run, given: FilterLike | None, backend: type[Backend], readable_within: float
    ) -> None:
        """Filter by another from now on; None: by none."""
        plan = None
        if given is not None:
            filters.checked(given)
            found = self._source.capabilities
            plan = self._planned(
                filters.compiled(given, found, ethernet=self._settings.framing.ethernet), backend
            )
        if not self._changing.acquire(blocking=False):
            raise Busy("another thread is setting the filter: one at a time")
        try:
            self._put(run, plan, readable_within)
        finally:
            self._changing.release()

    def backend_changed(self, run: Run, backend: type[Backend], readable_within: float) -> None:
        """Let linkrx cut where the kernel did, and the backend that took over would not learn of it. Raises UnsupportedOption where
        that cannot be.
        """
        plan = self._plan
        if (
            plan is None
            or _tells(backend, self._options)
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
            told=_tells(backend, self._options),
        )

    def _put(self, run: Run, plan: Plan | None, readable_within: float) -> None:
        """In an order that lets nothing pass that neither filter takes: the kernel's is taken off behind linkrx's own."""
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
