"""What a run of the tests is: how much of each to do, which backends there are, and what is counted for its summary."""

from __future__ import annotations

from collections import Counter

import pytest

import linkrx
from linkrx.sources.capabilities import Capabilities

# Set by --all.
everything = False

# The test that runs.
running: pytest.Item | None = None

# Outcomes of conformance cells: supported, refused, inapplicable or unavailable.
cell_outcomes: Counter[str] = Counter()
# What was compared with the kernel's own segmentation.
segmented: Counter[str] = Counter()


def thorough() -> bool:
    """Whether the test that runs is to do all that it can: with --all. It is marked, so that --all can be had of it alone."""
    assert running is not None
    assert running.get_closest_marker("samples"), f"mark {running.name} with pytest.mark.samples"
    return everything


def points(most: int) -> range:
    """Where to interrupt or to fail a call, one run after the other: everywhere with --all, else at every seventh."""
    return range(0, most, 1 if thorough() else 7)


def that_take(kind: str) -> list[str]:
    """The backends of this host that take sources of a kind. That the others refuse them is for conformance cells."""
    source = Capabilities(kind, socket=kind not in ("tap", "tun", "pipe"), largest_frame=65_536)
    return [
        info.name for info in linkrx.backends() if info.supported and info.backend.refuses(source) is None
    ]
