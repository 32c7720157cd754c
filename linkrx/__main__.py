"""`python -m linkrx`."""

import sys

from linkrx.cli.main import main

sys.exit(main())
