"""`python -m fitrl`, which `torchrun` needs."""

import sys

from fitrl_command import main

sys.exit(main())
