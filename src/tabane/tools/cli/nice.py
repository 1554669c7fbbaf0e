"""`tabane nice`: run a command inside an instance, nicer (or less nice) than its program.

Programs are started by requests, not by people, so there is no command to be started on a node of
one's choice: what can be started beside a program is what `tabane exec` starts. What already runs
is changed by `tabane renice`.
"""

from __future__ import annotations

import argparse
import re

from tabane.errors import NotFound, UsageError
from tabane.tools.cli.common import Parser
from tabane.tools.cli.exec import INSTANCE_HELP, add_choice, execute

USUAL = 10


def nice(argv: list[str]) -> int:
    parser = Parser("nice", "Run a command in an instance, nicer to others than its program.")
    parser.usage = "tabane nice [-n N] INSTANCE [--] COMMAND ..."
    add = parser.add_argument
    help_ = "added to the nice value; 10 unless told, below 0 if the instance may"
    add("-n", "--adjustment", type=_adjustment, default=USUAL, metavar="N", help=help_)
    add_choice(parser)
    add("--json", action="store_true", help="as of exec")
    add("instance", help=INSTANCE_HELP)
    add("command", nargs=argparse.REMAINDER, help="all that follows the instance")
    args = parser.parse_args(_spelled_out(argv))
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("nice: name an instance and a command (what runs: `tabane renice`)")
    told = [f"--root={args.root}"] if args.root is not None else []
    told += [f"--{one}={name}" for one in ("dc", "node") for name in getattr(args, one) or ()]
    told += [f"--{one}" for one in ("json", "verbose") if getattr(args, one)]
    nicely = ["nice", "-n", str(args.adjustment), *command]
    try:
        return execute([*told, args.instance, "--", *nicely])
    except NotFound as error:
        hint = "`tabane renice` changes what already runs"
        raise NotFound(f"nice: {error.message} ({hint})") from None


def _spelled_out(argv: list[str]) -> list[str]:
    """A first `-5` is `-n 5`, and `--5` is `-n -5`, as nice has always had it."""
    at = 2 if argv[:1] == ["--root"] else 1 if argv[:1] and argv[0].startswith("--root=") else 0
    found = re.fullmatch("-(-?[0-9]{1,2})", argv[at]) if at < len(argv) else None
    return [*argv[:at], f"--adjustment={found[1]}", *argv[at + 1 :]] if found else argv


def _adjustment(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from -99 to 99")
    return int(text)
