"""`tabane ps`: the processes of all data centers, in the columns of ps.

`plan` is a plain function from words to what is wanted, `render` one from the nodes' rows to lines,
with nothing in them that could move a terminal's cursor. It imports little, for the command must be
there at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tabane.errors import UsageError
from tabane.tools.cli.asking import (
    Filters,
    add_filters,
    ask_processes,
    check_users,
    filters_of,
    say_partial,
)
from tabane.tools.cli.columns import COLUMNS, Column
from tabane.tools.cli.common import Parser, Row, print_json, whole
from tabane.tools.cli.formats import (
    list_columns,
    named_format,
    parse_columns,
    parse_order,
    with_inserted,
)
from tabane.tools.cli.letters import Letters, has, take_letters, values_of
from tabane.tools.cli.screen import UNLIMITED, Place, layout, show
from tabane.tools.cli.selection import Lists, Test, tests_of
from tabane.tools.cli.threads import blank, threads_of, with_ids
from tabane.tools.cli.trees import flatten, forest_prefix, grow, indent_prefix

ONE_W_CELLS = 132
"""How wide a single `-w` lets lines be, as in ps; a second one lets them be as long as they are."""

SPARE = "tabane-netns"
"""Processes of the nodes' own that only hold a network for an instance: dozens, and never any news.
Who says nothing does not mean them; -e, aux and the like do."""


class Threads(NamedTuple):
    """How threads are shown. `each`: in lines of their own instead of their process's; `below`:
    in lines below it."""

    each: bool
    below: bool

    @property
    def any(self) -> bool:
        return self.each or self.below


class Plan(NamedTuple):
    """What a command line asks for."""

    columns: Sequence[Column]
    lists: Lists
    tests: Sequence[Test]
    """Those of flags (`-a`, `r`): all must hold."""
    negated: bool
    order: Sequence[tuple[Column, bool]]
    prefix: Callable[[tuple[bool, ...]], str] | None
    """How a forest is drawn; None: none is."""
    threads: Threads
    heading: bool
    width: int | None
    """In cells, as asked for; None: the terminal's."""
    json: bool
    filters: Filters


def ps(argv: list[str]) -> int:
    letters, rest = take_letters(argv)
    args = _parser().parse_args(rest)
    if has(letters)("L"):
        print("\n".join(list_columns()))
        return 0
    wanted = plan(args, letters)
    from tabane.tools.client import Cluster

    cluster = Cluster(args.root)
    answer = ask_processes(cluster, wanted.filters, tasks=wanted.threads.any)
    check_users(cluster, wanted.lists.all_users(), answer.rows)
    rows = choose(answer.rows, wanted)
    if wanted.json:
        kind = "threads" if wanted.threads.each else "processes"
        print_json({kind: rows, "silent": answer.silent})
    else:
        from tabane.clock import SYSTEM

        lines = render(rows, wanted, SYSTEM.wall())
        show(lines, heading=wanted.heading, width=wanted.width)
    return say_partial(answer) or (0 if rows else 1)


def _parser() -> Parser:
    parser = Parser("ps", "Processes of all nodes, with the app and class each belongs to.")
    parser.usage = "tabane ps [aux | axo COLUMNS | -ef | options]"
    _add_choices(parser)
    shown = parser.add_argument_group("what is shown")
    add = shown.add_argument
    add("-f", action="store_true", help="parent and start too")
    add("-F", action="store_true", help="memory and processor as well")
    add("-l", action="store_true", help="state, priority, nice")
    add("-y", action="store_true", help="with -l: RSS instead of flags and address")
    add("-j", action="store_true", help="process group and session")
    add("-o", "--format", action="append", metavar="COLUMNS", help="as pid,args or user:20,pid=")
    add("-O", action="append", metavar="COLUMNS", help="the usual ones, and these")
    add("--sort", action="append", metavar="COLUMNS", help="as -rss,pid: - is from the largest")
    add("-L", dest="lwps", action="store_true", help="threads, with LWP and NLWP (BSD H: without)")
    add("-T", dest="spids", action="store_true", help="threads, with SPID")
    add("-m", dest="below", action="store_true", help="threads below their process (BSD m)")
    add("--forest", action="store_true", help="who is whose child (BSD f)")
    add("-H", dest="hierarchy", action="store_true", help="the same, only indented")
    add("--no-headers", "--no-heading", "--noheaders", action="store_true", help="rows only")
    add("--cols", "--columns", "--width", dest="width", type=whole(1), metavar="CELLS")
    add("-w", action="count", default=0, help="132 cells wide; twice: as long as it is")
    add("--json", action="store_true", help="all that is known of each")
    return parser


def _add_choices(parser: Parser) -> None:
    chosen = parser.add_argument_group(f"which processes (all but {SPARE}, unless told)")
    add = chosen.add_argument
    add("-e", "-A", dest="every", action="store_true", help="all")
    add("-a", action="store_true", help="with a terminal, without session leaders")
    add("-d", action="store_true", help="without session leaders")
    add("-r", action="store_true", help="running ones")
    add("-N", "--deselect", dest="negated", action="store_true", help="all but those chosen")
    add("-p", "-q", "--pid", "--quick-pid", dest="pids", action="append", metavar="PIDS")
    add("--ppid", action="append", metavar="PIDS", help="their children")
    add("-u", action="append", metavar="USERS", help="names or uids")
    add("-U", action="append", metavar="USERS", help="real users")
    add("-g", "--group", dest="groups", action="append", metavar="GROUPS", help="-g: or sessions")
    add("-s", "--sid", dest="sessions", action="append", metavar="SESSIONS")
    add("-t", "--tty", dest="terminals", action="append", metavar="TTYS")
    add("-C", action="append", metavar="NAMES", help="by command names")
    add_filters(chosen)


def plan(args: argparse.Namespace, letters: Letters) -> Plan:
    """Raises `UsageError`."""
    flag = has(letters)
    prefix = forest_prefix if args.forest or flag("f") else None
    if args.hierarchy and not prefix:
        prefix = indent_prefix
    threads = _threads(args, letters)
    if threads.any and prefix:
        raise UsageError("ps: threads are in no forest: leave out -f, -H or --forest, or -L, -T, m")
    lists = _lists(args, letters)
    return Plan(
        columns=_columns(args, letters),
        lists=lists,
        tests=_tests(args, letters, chosen=any(lists[:-1]) or args.negated),
        negated=args.negated,
        order=parse_order([*(args.sort or ()), *values_of(letters, "k")]),
        prefix=prefix,
        threads=threads,
        heading=not (args.no_headers or flag("h")),
        width=_width(args, letters),
        json=args.json,
        filters=filters_of(args),
    )


def _threads(args: argparse.Namespace, letters: Letters) -> Threads:
    flag = has(letters)
    if args.lwps and args.spids:
        raise UsageError("ps: -L and -T exclude each other: LWP or SPID")
    below = args.below or flag("m")
    if below and flag("H"):
        raise UsageError("ps: H and m exclude each other: threads alone, or below processes")
    return Threads(not below and (args.lwps or args.spids or flag("H")), below)


def _columns(args: argparse.Namespace, letters: Letters) -> list[Column]:
    flag = has(letters)
    if written := [*(args.format or ()), *values_of(letters, "o")]:
        columns = parse_columns(written)
    elif inserted := [*(args.O or ()), *values_of(letters, "O")]:
        columns = with_inserted(inserted)
    else:
        name = _format_name(args, letters)
        columns = named_format(name, numeric=flag("n"))
        if args.lwps or args.spids:
            heading = "LWP" if args.lwps else "SPID"
            columns = with_ids(columns, heading, counts=name not in ("-l", "-ly"))
    if flag("c"):
        comm = COLUMNS["comm"].show
        args_show = COLUMNS["args"].show
        columns = [c._replace(show=comm) if c.show is args_show else c for c in columns]
    return columns


def _format_name(args: argparse.Namespace, letters: Letters) -> str:
    for letter in "ulj":
        if has(letters)(letter):
            return letter
    if args.F:
        return "-F"
    if args.l:
        return "-lf" if args.f else "-ly" if args.y else "-l"
    if args.j:
        return "-jf" if args.f else "-j"
    return "-f" if args.f else ""


def _lists(args: argparse.Namespace, letters: Letters) -> Lists:
    groups = args.groups or ()
    numbers = [text for text in groups if text.replace(",", "").isdigit()]
    lists = Lists(
        pids=[*(args.pids or ()), *values_of(letters, "pq")],
        ppids=args.ppid or (),
        sessions=[*(args.sessions or ()), *numbers],
        users=[*(args.u or ()), *values_of(letters, "U")],
        real_users=args.U or (),
        groups=groups,
        names=args.C or (),
        terminals=[*(args.terminals or ()), *values_of(letters, "t")],
    )
    tests_of(lists, ())  # what is wrong with them is said before anybody is asked
    return lists


def _tests(args: argparse.Namespace, letters: Letters, *, chosen: bool) -> list[Test]:
    """What flags leave out. `a` alone means those with a terminal, `x` alone one's own. `chosen`:
    something else says which are meant."""
    flag = has(letters)
    tests: list[Test] = []
    if not (chosen or args.every or args.a or args.d or any(map(flag, "Aax"))):
        tests.append(lambda row: row["name"] != SPARE or bool(row["app"]))
    if not args.every and not flag("A"):
        if args.a or args.d:
            tests.append(lambda row: row["session"] != row["pid"])
        if args.a or (flag("a") and not flag("x")):
            tests.append(lambda row: row["tty"] != "?")
        if flag("x") and not flag("a"):
            me = os.geteuid()
            tests.append(lambda row: row["uid"] == me)
    if args.r or flag("r"):
        tests.append(lambda row: row["state"] in "RD")
    return tests


def _width(args: argparse.Namespace, letters: Letters) -> int | None:
    if args.width is not None:
        return int(args.width)
    wide = args.w + sum(letter == "w" for letter, _ in letters)
    return (None, ONE_W_CELLS, UNLIMITED)[min(wide, 2)]


def choose(rows: Sequence[Row], wanted: Plan) -> list[Row]:
    """Those that are in any list, or all without lists, and pass every test; in order."""
    lists = tests_of(wanted.lists, rows)

    def is_meant(row: Row) -> bool:
        listed = not lists or any(test(row) for test in lists)
        return (listed and all(test(row) for test in wanted.tests)) is not wanted.negated

    found = [row for row in rows if is_meant(row)]
    if wanted.threads.each:
        found = [thread for row in found for thread in threads_of(row)]
    for column, from_largest in reversed(wanted.order):
        found.sort(key=column.key, reverse=from_largest)
    return found


def render(rows: Sequence[Row], wanted: Plan, now: float) -> list[str]:
    """The lines to be shown: a heading, unless it is empty or not wanted, and one for each row."""
    columns = wanted.columns
    if wanted.threads.below:
        cells = [cells for row in rows for cells in _with_threads(columns, row, now)]
    elif wanted.prefix:
        drawn = ((row, wanted.prefix(above)) for row, above in flatten(grow(rows)))
        cells = [[_cell(column, row, prefix, now) for column in columns] for row, prefix in drawn]
    else:
        cells = [[column.show(row, now) for column in columns] for row in rows]
    places = [Place(column.heading, column.right, column.width) for column in columns]
    lines = layout(places, cells)
    return lines if wanted.heading and any(c.heading for c in columns) else lines[1:]


def _with_threads(columns: Sequence[Column], row: Row, now: float) -> list[list[str]]:
    """The line of a process, and those of its threads, each without what only the other has."""

    def cells(shown: Row, in_thread: bool) -> list[str]:
        return [
            "-" if blank(column.show, in_thread=in_thread) else column.show(shown, now)
            for column in columns
        ]

    return [cells(row, False), *(cells(thread, True) for thread in threads_of(row))]


COMMANDS = tuple(COLUMNS[name].show for name in ("args", "comm", "fname"))


def _cell(column: Column, row: Row, prefix: str, now: float) -> str:
    text = column.show(row, now)
    return prefix + text if prefix and column.show in COMMANDS else text
