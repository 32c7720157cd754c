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
        """The kind of source, as its rig is called."""
        return getattr(self.make_rig, "__name__", "source")

    @property
    def row(self) -> str:
        """What the check is about: its name, without prefix and variant."""
        return row_of(self.check)

    @property
    def name(self) -> str:
        """For reports: backend-source-check."""
        return f"{self.backend}-{self.source}-{self.check.__name__.removeprefix('check_')}"

    def run(self) -> str:
        """Say "supported" after the check held, "refused" when the backend says why it does not take the source.

        "inapplicable" when the source, or the backend's options, have nothing of what the check is about. A refusal
        must name both backend and reason. Raises AssertionError where the check does not hold, BackendUnavailable when there
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
                told = str(error)
            else:
                raise AssertionError(f"{self.backend} refuses the source ({reason}), but opened it")
            assert self.backend in told
            assert reason in told
            return "refused"


def named(backend: str) -> BackendInfo:
    """What is known of the backend of that name. Raises BackendUnavailable when there is none."""
    known = {info.name: info for info in backends()}
    if backend not in known:
        raise BackendUnavailable(
            f"there is no backend {backend!r}: there are {', '.join(known)}. One of your own is found in the folder "
            "linkrx/backends, or as an entry point of an installed distribution, in the group linkrx.backends"
        )
    return known[backend]


def row_of(check: Check) -> str:
    """`check_this__that` is a variant of `this`."""
    return check.__name__.removeprefix("check_").partition("__")[0]
