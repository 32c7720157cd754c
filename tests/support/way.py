"""`python tests/support/way.py` prints the files that run between `dispatch` and `deliver` for one packet, without the core.

The core runs the same steps in C, where Python cannot trace them.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def files() -> list[str]:
    """The files of linkrx whose functions were called, in order. Imports linkrx into this process without the core."""
    sys.modules["linkrx._core._native"] = None  # type: ignore[assignment] # importing it raises ImportError
    logging.getLogger("linkrx").setLevel(logging.ERROR)  # it warns of that
    import linkrx

    package = Path(linkrx.__file__).parent
    called: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            called.setdefault(str(path.relative_to(package)))

    reading, writing = os.pipe2(os.O_DIRECT)
    with linkrx.open(reading, lambda *_: sys.setprofile(None), backend="os_readv") as rx:
        os.write(writing, b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x08\0" + bytes(46))
        sys.setprofile(note)
        rx.dispatch(0)
    return list(called)


if __name__ == "__main__":
    print(*files(), sep="\n")
