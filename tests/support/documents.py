"""The README and the files of docs/, and the Python programs in them."""

from __future__ import annotations

import re
from pathlib import Path

from support.paths import ROOT

README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))


def programs(*documents: Path) -> list[str]:
    """The Python programs in these documents, in order. Without arguments: in all documents."""
    return [
        program
        for document in documents or DOCUMENTS
        for program in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    ]
