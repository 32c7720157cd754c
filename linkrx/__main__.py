"""`python -m linkrx`."""

import sys

from linkrx.cli import main

sys.exit(main())
