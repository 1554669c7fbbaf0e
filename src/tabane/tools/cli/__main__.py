"""`python -m tabane.tools.cli`: the `tabane` command of this very interpreter."""

from tabane.tools.cli import main

main()
