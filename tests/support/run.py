"""State of a test run: whether --all was given, the backends of this host, and counts for the summary."""

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
# Frames that were compared with the kernel's own segmentation.
segmented: Counter[str] = Counter()


def thorough() -> bool:
    """Whether the current test must run in full, as with --all. Asserts that the test is marked `samples`."""
    assert running is not None
    assert running.get_closest_marker("samples"), f"mark {running.name} with pytest.mark.samples"
    return everything


def points(most: int) -> range:
    """The points at which to interrupt or fail a call, one per run: all with --all, else every seventh."""
    return range(0, most, 1 if thorough() else 7)


def that_take(kind: str) -> list[str]:
    """The backends of this host that accept sources of a kind. Conformance cells test that the others refuse."""
    source = Capabilities(kind, socket=kind not in ("tap", "tun", "pipe"), largest_frame=65_536)
    return [
        info.name for info in linkrx.backends() if info.supported and info.backend.refuses(source) is None
    ]
