"""The programs of docs/ports/."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from support.paths import ROOT


def port(name: str) -> Any:
    """The module docs/ports/NAME.py, loaded once."""
    known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "ports" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
