"""The backends on this host."""

from __future__ import annotations

import logging
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from linkrx.backend import Backend, BackendInfo

logger = logging.getLogger("linkrx")

ENTRY_POINTS = "linkrx.backends"

# Not `import linkrx.backends`, because that name is the public function below.
_FOLDER: list[str] = list(import_module("linkrx.backends").__path__)


@cache
def classes() -> tuple[type[Backend], ...]:
    """Every backend class: the files of linkrx/backends/, then those that other distributions bring."""
    found: dict[str, type[Backend]] = {}
    for module in pkgutil.iter_modules(_FOLDER):
        for value in vars(import_module(f"linkrx.backends.{module.name}")).values():
            if (
                isinstance(value, type)
                and issubclass(value, Backend)
                and value.__dict__.get("name") == module.name
            ):
                found[value.name] = value
    for entry in entry_points(group=ENTRY_POINTS):
        # A plug-in that cannot be loaded must not break linkrx, and must not vanish silently.
        try:
            value = entry.load()
        except Exception:
            logger.exception("the backend %r of %s could not be loaded", entry.name, entry.value)
            continue
        if not (
            isinstance(value, type) and issubclass(value, Backend) and {"name", "rank"} <= set(dir(value))
        ):
            logger.error(
                "the backend %r of %s is left out: it is no Backend with a name and a rank",
                entry.name,
                entry.value,
            )
        elif value.name in found:
            logger.warning("the backend %r of %s is left out: the name is taken", value.name, entry.value)
        else:
            found[value.name] = value
    return tuple(sorted(found.values(), key=lambda backend: (-backend.rank, backend.name)))


def backends() -> tuple[BackendInfo, ...]:
    """Every backend, best first, with whether this host supports it and if not why."""
    return tuple(
        BackendInfo(b.name, reason is None, reason, b.rank, b.honours, b)
        for b, reason in ((b, _missing(b)) for b in classes())
    )


def _missing(backend: type[Backend]) -> str | None:
    try:
        return backend.missing()
    except Exception as error:
        logger.exception("the backend %r could not say whether this host supports it", backend.name)
        return f"its own check failed: {error!r}"
