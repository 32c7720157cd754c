"""A cell: one check on one backend and one kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from linkrx.backend import BackendInfo
from linkrx.errors import BackendUnavailable, UnsupportedSource
from linkrx.registry import backends
from linkrx.sources.capabilities import probe
from linkrx.testing.rigs import Inapplicable, MakeRig, Rig

__all__ = ["Cell", "Check", "Inapplicable", "named", "row_of"]

Check = Callable[[Rig, str], None]


@dataclass(frozen=True)
class Cell:
    """One backend on one kind of source under one check."""

    backend: str
    make_rig: MakeRig
    check: Check

    @property
    def source(self) -> str:
        """The kind of source: the name of its rig."""
        return getattr(self.make_rig, "__name__", "source")

    @property
    def row(self) -> str:
        """The name of the check, without prefix and variant."""
        return row_of(self.check)

    @property
    def name(self) -> str:
        """The name for reports: backend-source-check."""
        return f"{self.backend}-{self.source}-{self.check.__name__.removeprefix('check_')}"

    def run(self) -> str:
        """Run the check. Returns "supported" if it held, "refused" if the backend refuses the source, and "inapplicable" if the
        check does not apply to the source or the backend.

        A refusal must name the backend and the reason. Raises AssertionError if the check fails, and BackendUnavailable if there
        is no such backend.
        """
        info = named(self.backend)
        with self.make_rig() as rig:
            reason = info.backend.refuses(probe(rig.source))
            if reason is None:
                try:
                    self.check(rig, self.backend)
                except Inapplicable:
                    return "inapplicable"
                return "supported"
            try:
                rig.open(self.backend).close()
            except UnsupportedSource as error:
                message = str(error)
            else:
                raise AssertionError(f"{self.backend} refuses the source ({reason}), but opened it")
            assert self.backend in message
            assert reason in message
            return "refused"


def named(backend: str) -> BackendInfo:
    """The backend of that name. Raises BackendUnavailable if there is none."""
    known = {info.name: info for info in backends()}
    if backend not in known:
        raise BackendUnavailable(
            f"there is no backend {backend!r}: there are {', '.join(known)}. One of your own is found in the folder "
            "linkrx/backends, or as an entry point of an installed distribution, in the group linkrx.backends"
        )
    return known[backend]


def row_of(check: Check) -> str:
    """The name of a check, without prefix and variant: `check_this__that` is a variant of `this`."""
    return check.__name__.removeprefix("check_").partition("__")[0]
