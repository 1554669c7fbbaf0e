"""`python -m tabane.middlecon`: the same as the command `middlecon`."""

import sys

from tabane.middlecon.cli import main

sys.exit(main())
