"""Replaces a backend by the next one of the ladder, with a warning, or an error if there is none."""

from __future__ import annotations

import errno
import logging

from linkrx.choice import Choice
from linkrx.errors import BackendUnavailable

logger = logging.getLogger("linkrx")

# The meaning of EFBIG from a ring.
CUT = "a frame was cut that is longer than a block of the ring"


def why(error: OSError) -> str:
    """The reason for the replacement, without a full stop."""
    return CUT if error.errno == errno.EFBIG else f"the kernel answers {error.strerror}"


def following(choice: Choice, error: OSError, title: str) -> Choice:
    """The choice without its first backend. Raises BackendUnavailable if there is no other."""
    if len(choice.ladder) == 1:
        raise BackendUnavailable(
            f"{choice.backend} on the {title}: {why(error)} ({errno.errorcode.get(error.errno or 0, error.errno)}), and there "
            "is no other backend to take over"
        ) from error
    after = choice.demoted(f"refused at run time: {CUT if error.errno == errno.EFBIG else error.strerror}")
    logger.warning("%s on the %s: %s; going on with %s", choice.backend, title, why(error), after.backend)
    return after


def warn_cut(choice: Choice, title: str) -> None:
    """Warn that frames are cut, if no other backend can take over."""
    logger.warning(
        "%s on the %s: %s, as the next ones will be. Open it again: its blocks are then made for what the interface and its "
        "peer are set up for now",
        choice.backend,
        title,
        CUT,
    )
