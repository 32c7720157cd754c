"""Runs the conformance checks of a backend: `python -m linkrx.testing NAME`, as root or where user namespaces are allowed."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter

from linkrx.errors import LinkrxError
from linkrx.kernel.namespace import enter_private_network
from linkrx.testing import cells
from linkrx.testing.rigs import PLAIN_RIGS


def main(arguments: list[str] | None = None) -> int:
    """Run every check on every kind of source, in a new network namespace. Returns 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m linkrx.testing", description=__doc__)
    parser.add_argument("backend", help="the name of a backend: `linkrx doctor` lists them")
    backend: str = parser.parse_args(arguments).backend
    try:
        chosen = cells(backend)
    except LinkrxError as error:
        parser.error(str(error))
    try:
        enter_private_network()
    except LinkrxError as error:
        print(f"without the sources that need network devices: {error}")
        chosen = cells(backend, PLAIN_RIGS)
    outcomes: Counter[str] = Counter()
    for cell in chosen:
        try:
            outcomes[cell.run()] += 1
        except Exception:
            outcomes["failed"] += 1
            print(f"\n{cell.name} failed:\n{traceback.format_exc()}")
    print(f"{backend}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
