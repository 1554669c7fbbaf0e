"""`tabane shell`: a shell whose /proc is the cluster's."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabane.clock import SYSTEM
from tabane.errors import UsageError
from tabane.tools.cli.common import Parser, say_silent

if TYPE_CHECKING:
    from tabane.tools.procfs.view import NodeLine

RC = "/proc/tabane/bashrc"
PROMPT = "(cluster) "


def shell(argv: list[str]) -> int:
    parser = Parser("shell", "A shell in which ps, top, kill and the like see every data center.")
    parser.add_argument("-c", dest="command", metavar="COMMAND", help="run this and end as it ends")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.words:
        command = " ".join(args.words)
        raise UsageError(f"shell: a command comes after -c: `tabane shell -c '{command}'`")
    from tabane.tools.client import Cluster
    from tabane.tools.procfs.filter import numbering
    from tabane.tools.procfs.serving import ClusterShell
    from tabane.tools.procfs.session import Plan, run
    from tabane.tools.procfs.source import ClusterSource
    from tabane.tools.procfs.supervisor import ClusterCarrier

    cluster = Cluster(args.root)
    carrier = ClusterCarrier(cluster, numbering())
    view = ClusterShell(ClusterSource(cluster), carrier, secret=os.geteuid() == 0)
    view.feed.fetch()
    at_terminal = args.command is None and os.isatty(0)
    if at_terminal:
        _greet(view.view.lines(SYSTEM.now()), len(view.view.processes))
    words = argv_of(user_shell(), args.command)
    environment = environment_of(os.environ, str(cluster.root))
    plan = Plan(words, environment, view.overlays, own_group=at_terminal)
    return run(plan, view.serve).code


def _greet(nodes: Sequence[NodeLine], processes: int) -> None:
    from tabane.tools.procfs.numbers import FIRST

    shown = sum(node.shown for node in nodes)
    told = f"/proc is the cluster's here: {processes} processes of {shown} nodes, from {FIRST} up"
    print(f"{told}; `exit` leaves.", file=sys.stderr)
    say_silent(node.name for node in nodes if not node.shown)


def user_shell() -> str:
    """`$SHELL`, else the user's own by the database, else /bin/sh."""
    if given := os.environ.get("SHELL"):
        return given
    try:
        return pwd.getpwuid(os.geteuid()).pw_shell or "/bin/sh"
    except KeyError:
        return "/bin/sh"


def argv_of(program: str, command: str | None) -> list[str]:
    """How to start a shell: at a prompt that says where one is, or with a command."""
    if command is not None:
        return [program, "-c", command]
    if os.path.basename(program) == "bash":  # noqa: PTH119
        return [program, "--rcfile", RC, "-i"] if os.isatty(0) else [program]
    return [program]


def environment_of(before: os._Environ[str] | dict[str, str], root: str) -> dict[str, str]:
    """Shells other than bash take their prompt from it; `tabane` within means the same cluster."""
    prompt = PROMPT + before.get("PS1", "\\$ " if os.geteuid() else "# ")
    return {**before, "PS1": prompt, "TABANE_SHELL": "1", "TABANE_ROOT": root}
