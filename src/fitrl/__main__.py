"""`python -m fitrl`."""

import sys

from fitrl.cli import main

sys.exit(main())
