"""`tabane pstree`: who started whom, node by node, and where an app's instances begin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tabane.errors import NotFound
from tabane.tools.cli.asking import (
    Answer,
    add_filters,
    ask_processes,
    filters_of,
    say_partial,
)
from tabane.tools.cli.columns import gpid, short_app, tid
from tabane.tools.cli.common import Parser, Row, complain, print_json
from tabane.tools.cli.drawing import ASCII, UNICODE, Knot, draw_across, draw_down, tie
from tabane.tools.cli.screen import UNLIMITED, show
from tabane.tools.cli.threads import threads_of
from tabane.tools.cli.trees import Branch, flatten, grow, walk


def pstree(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    from tabane.tools.client import Cluster

    with_threads = not (args.hide_threads or args.json)
    answer = ask_processes(Cluster(args.root), filters_of(args), tasks=with_threads)
    try:
        roots = choose(answer, args.what, parents=args.show_parents)
    except NotFound as error:
        complain(f"pstree: {error.message}")
        return 1
    if with_threads:
        hang_threads(roots, by_name=args.thread_names)
    sort(roots, by_pid=args.numeric_sort)
    if args.json:
        rows = [{**row, "depth": len(above)} for row, above in flatten(roots)]
        print_json({"processes": rows, "silent": answer.silent})
    else:
        show(render(roots, args), heading=False, width=UNLIMITED if args.long else None)
    return say_partial(answer) or (0 if roots else 1)


def _parser() -> Parser:
    parser = Parser("pstree", "Processes as trees, one for each node.")
    add = parser.add_argument
    add("-a", "--arguments", action="store_true", help="command lines, one process a line")
    add("-p", "--show-pids", action="store_true")
    add("-g", "--show-pgids", action="store_true", help="process groups")
    add("-u", "--uid-changes", action="store_true", help="the user, where it is not the parent's")
    add("-c", "--compact-not", action="store_true", help="equal subtrees one by one")
    add("-n", "--numeric-sort", action="store_true", help="by pid, not by name")
    add("-s", "--show-parents", action="store_true", help="the way from the top to what is chosen")
    add("-l", "--long", action="store_true", help="lines as long as they are, on a terminal too")
    add("-A", "--ascii", action="store_true", help="draw with ASCII, as always but on a terminal")
    add("-U", "--unicode", action="store_true", help="draw with lines")
    add("-T", "--hide-threads", action="store_true", help="processes alone")
    add("-t", "--thread-names", action="store_true", help="threads by their own names")
    add_filters(parser)
    add("--json", action="store_true", help="parents before children, each with its depth")
    add("what", nargs="?", help="begin at this process or instance, or at those of a user")
    return parser


def choose(answer: Answer, what: str | None, *, parents: bool) -> list[Branch]:
    """The trees to draw: all, or those of a process, an instance or a user; with the `parents`, no
    more than lead there. Raises what `find_target` raises."""
    roots = grow(answer.rows)
    if what is None:
        return roots
    chosen = {id(row) for row in _meant(what, answer)}
    above: dict[int, Branch | None] = {id(root): None for root in roots}
    tops = []
    waiting = list(reversed(roots))
    while waiting:
        branch = waiting.pop()
        if id(branch.row) in chosen:
            tops.append(branch)
            continue
        above |= {id(child): branch for child in branch.children}
        waiting += reversed(branch.children)
    return _with_parents(roots, tops, above) if parents else tops


def _with_parents(
    roots: Sequence[Branch], tops: Sequence[Branch], above: dict[int, Branch | None]
) -> list[Branch]:
    kept = {id(top) for top in tops}
    passed: list[Branch] = []
    for top in tops:
        branch = above[id(top)]
        while branch is not None and id(branch) not in kept:
            kept.add(id(branch))
            passed.append(branch)
            branch = above[id(branch)]
    for branch in passed:
        branch.children[:] = [child for child in branch.children if id(child) in kept]
    return [root for root in roots if id(root) in kept]


def _meant(what: str, answer: Answer) -> list[Row]:
    from tabane.tools.cli.ordering import find_target

    if not what.isdigit():
        rows = [row for row in answer.rows if what in (row["user"], gpid(row))]
        if rows:
            return rows
    try:
        return [find_target(what, answer)]
    except NotFound:
        raise NotFound(f"{what} is no process, no instance, and no process is a {what}'s") from None


def hang_threads(roots: Iterable[Branch], *, by_name: bool) -> None:
    """Each thread but the first below its process: by the name of that, or by its own."""
    for branch in list(walk(roots)):
        process = branch.row
        for thread in threads_of(process):
            if (number := tid(thread)) != process["pid"]:
                name = f"{{{(thread if by_name else process)['name']}}}"
                thread |= {"pid": number, "name": name, "command": ""}
                branch.children.append(Branch(thread, []))


def sort(roots: Sequence[Branch], *, by_pid: bool) -> None:
    """Siblings by name, or by pid."""

    def key(branch: Branch) -> Any:
        return branch.row["pid"] if by_pid else (branch.row["name"], branch.row["pid"])

    for branch in walk(roots):
        branch.children.sort(key=key)


def render(roots: Sequence[Branch], args: argparse.Namespace) -> list[str]:
    """The trees of each node below its name."""

    def merges(branch: Branch) -> bool:
        is_thread = "tid" in branch.row
        return not (args.compact_not or args.show_pids) and (is_thread or not args.arguments)

    with_ = UNICODE if args.unicode or (sys.stdout.isatty() and not args.ascii) else ASCII
    nodes: dict[str, list[Branch]] = {}
    for root in roots:
        nodes.setdefault(f"{root.row['dc']}/{root.row['node']}", []).append(root)
    draw = draw_down if args.arguments else draw_across
    lines = []
    for node, own in nodes.items():
        knots = tie(own, lambda branch, parent: label(branch, parent, args), merges)
        lines += draw(Knot(node, knots), with_)
    return lines


def label(branch: Branch, parent: Branch | None, args: argparse.Namespace) -> str:
    """`httpd(42,www-data)[hello,container]`; with -a `httpd,42,www-data[hello,container] -f`."""
    row, before = branch.row, parent.row if parent else None
    facts = []
    if args.show_pids:
        facts.append(str(row["pid"]))
    if args.show_pgids:
        facts.append(str(row["pgrp"]))
    if args.uid_changes and (before["uid"] != row["uid"] if before else row["uid"] != 0):
        facts.append(row["user"])
    app = ""
    if row["instance"] and (before is None or before["instance"] != row["instance"]):
        app = f"[{short_app(row)},{row['class'] or '-'}]"
    if not args.arguments:
        return f"{row['name']}({','.join(facts)}){app}" if facts else f"{row['name']}{app}"
    _, _, words = row["command"].partition(" ")
    return ",".join([row["name"], *facts]) + app + (f" {words}" if words else "")
