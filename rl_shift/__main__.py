"""`python -m rl_shift` is `rl-shift`."""

import sys

from rl_shift.cli import main

sys.exit(main())
