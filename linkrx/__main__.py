"""`python -m linkrx`."""

import sys

from linkrx.cli import run

sys.exit(run())
