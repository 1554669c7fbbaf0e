"""`tabane pgrep`, `tabane pkill`: processes by name and by what else is known of them.

Exit codes as theirs: 0 something matched (pkill: and was signalled), 1 nothing did, 2 the request
is wrong, and 3 for all else: a node did not answer, or none that matched could be signalled.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence

from tabane.errors import NotFound, UsageError
from tabane.tools.cli import CANNOT_TELL
from tabane.tools.cli.asking import (
    Answer,
    add_filters,
    ask_processes,
    check_users,
    filters_of,
    is_self,
    say_partial,
)
from tabane.tools.cli.columns import gpid
from tabane.tools.cli.common import Parser, Row, print_json, printable, say, seconds_upto
from tabane.tools.cli.selection import Lists, number, split, tests_of

INCOMPLETE = CANNOT_TELL
OLDEST_S = 1e9
FILTERS = ("dc", "node", "app", "user")
CRITERIA = (
    *("pattern", "groups", "parents", "sessions", "terminals", "euid", "uid", "older", "runstates"),
    *FILTERS,
)


def pgrep(argv: list[str]) -> int:
    parser = _parser("pgrep", "Find processes by name or by what else is known of them.")
    add = parser.add_argument
    add("-l", "--list-name", action="store_true", help="their names too")
    add("-a", "--list-full", action="store_true", help="their whole command lines too")
    add("-d", "--delimiter", default="\n", metavar="TEXT", help="between them; else a newline")
    add("-c", "--count", action="store_true", help="only how many there are")
    args = parser.parse_args(argv)
    found, answer = _find(args)
    partial = say_partial(answer)
    if args.json:
        print_json({"processes": found, "silent": answer.silent})
    elif args.count:
        say(str(len(found)))
    elif found:
        print(args.delimiter.join(_describe(row, args) for row in found))
    return INCOMPLETE if partial else 0 if found else 1


def _describe(row: Row, args: argparse.Namespace) -> str:
    if args.list_full:
        return printable(f"{gpid(row)} {row['command']}")
    return printable(f"{gpid(row)} {row['name']}" if args.list_name else gpid(row))


def pidof(argv: list[str]) -> int:
    parser = Parser("pidof", "Find processes by the exact name of their program.")
    add = parser.add_argument
    add("-s", "--single-shot", action="store_true", help="only the youngest")
    add("-S", "--separator", default=" ", metavar="TEXT", help="between them; else a blank")
    add("-q", "--quiet", action="store_true", help="say nothing: only the exit code tells")
    add("-o", "--omit-pid", metavar="PIDS", default="", help="not these: gpids or pids")
    add_filters(parser)
    add("--json", action="store_true", help="all that is known of each")
    add("names", nargs="+", metavar="NAME", help="of programs, or their whole paths")
    args = parser.parse_args(argv)
    from tabane.tools.client import Cluster

    answer = ask_processes(Cluster(args.root), filters_of(args))
    partial = say_partial(answer)
    omitted = args.omit_pid.split(",")
    found = [row for row in answer.rows if is_program(row, args.names) and not is_self(row)]
    found = [row for row in found if str(row["pid"]) not in omitted and gpid(row) not in omitted]
    found.sort(key=lambda row: (row["elapsed_s"], -row["pid"]))
    found = found[:1] if args.single_shot else found
    if args.json:
        print_json({"processes": found, "silent": answer.silent})
    elif found and not args.quiet:
        print(args.separator.join(printable(gpid(row)) for row in found))
    return INCOMPLETE if partial else 0 if found else 1


def is_program(row: Row, names: Sequence[str]) -> bool:
    """By what the kernel calls it, or its first word, as pidof has it."""
    first = str(row["command"]).partition(" ")[0]
    is_kernels = first.startswith("[")
    known = {row["name"]} if is_kernels else {row["name"], first, os.path.basename(first)}  # noqa: PTH119
    return not known.isdisjoint(names)


def pkill(argv: list[str]) -> int:
    from tabane.k2i.orders import parse_signal
    from tabane.tools.cli.kill import NO_SIGNAL
    from tabane.tools.cli.ordering import take_signal

    about = "Signal processes by name or by what else is known of them."
    parser = _parser("pkill", about, or_else=NO_SIGNAL)
    parser.usage = "tabane pkill [-SIGNAL] [options] PATTERN"
    add = parser.add_argument
    add("--signal", default="TERM", metavar="SIGNAL", help="by name or number, as -HUP does")
    add("-e", "--echo", action="store_true", help="say who was signalled")
    add("-c", "--count", action="store_true", help="say how many matched")
    add("--force", action="store_true", help="also what a node cannot do without (root)")
    given, rest = take_signal(argv)
    args = parser.parse_args(rest)
    signal = parse_signal(given or args.signal)
    found, answer = _find(args)
    partial = say_partial(answer)
    done = _signal(args, found, signal)
    if args.json:
        print_json({"signal": signal, "processes": done, "silent": answer.silent})
    elif args.count:
        say(str(len(found)))
    if partial or (found and not done):
        return INCOMPLETE
    return 0 if done else 1


def _signal(args: argparse.Namespace, found: Sequence[Row], signal: int) -> list[Row]:
    """Those that could be signalled; the others are named on stderr."""
    from tabane.tools.cli.ordering import complain_of, send
    from tabane.tools.client import Cluster

    body = {"signal": signal, "force": args.force}
    outcomes = send(Cluster(args.root), found, "signal", body)
    results = list(zip(found, outcomes, strict=True))
    complain_of("pkill", [(row, outcome) for row, outcome in results if outcome.get("error")])
    done = [row for row, outcome in results if not outcome.get("error")]
    if args.echo and not args.json:
        for row in done:
            say(f"{row['name']} killed (pid {gpid(row)})")
    return done


def _parser(name: str, about: str, *, or_else: str = "") -> Parser:
    parser = Parser(name, about, or_else=or_else)
    parser.set_defaults(program=name)
    add = parser.add_argument
    add("-f", "--full", action="store_true", help="match whole command lines")
    add("-i", "--ignore-case", action="store_true")
    add("-x", "--exact", action="store_true", help="the whole name, not a part of it")
    add("-v", "--inverse", action="store_true", help="all that do not match")
    add("-n", "--newest", action="store_true", help="only the one that started last")
    add("-o", "--oldest", action="store_true", help="only the one that started first")
    add(
        "-O",
        "--older",
        type=seconds_upto(OLDEST_S, or_none=True),
        metavar="SECONDS",
        help="older than that",
    )
    add("-g", "--pgroup", dest="groups", metavar="PGIDS", help="process groups")
    add("-P", "--parent", dest="parents", metavar="PIDS", help="children of these")
    add("-s", "--session", dest="sessions", metavar="SIDS", help="of these sessions")
    add("-t", "--terminal", dest="terminals", metavar="TTYS", help="at these terminals")
    add("-u", "--euid", metavar="USERS", help="of these users (names, uids)")
    add("-U", "--uid", metavar="USERS", help="of these real users")
    add("-r", "--runstates", metavar="STATES", help="in these states, as D,Z")
    add_filters(parser)
    add("--json", action="store_true", help="all that is known of each")
    add("pattern", nargs="?", help="a regular expression")
    return parser


def _find(args: argparse.Namespace) -> tuple[list[Row], Answer]:
    name = args.program
    if all(getattr(args, one) is None for one in CRITERIA):
        raise UsageError(f"{name}: say which: a pattern, or one of the options")
    if args.newest and args.oldest:
        raise UsageError(f"{name}: -n and -o exclude each other")
    if name == "pkill" and args.pattern == "":
        raise UsageError("pkill: an empty pattern matches all: write . if all are meant")
    matches = pattern_test(args)
    _list_tests(args, ())  # what is wrong with them is said before anybody is asked
    from tabane.tools.client import Cluster

    cluster = Cluster(args.root)
    answer = ask_processes(cluster, filters_of(args))
    users = [text for text in (args.euid, args.uid) if text is not None]
    try:
        check_users(cluster, split(name, users), answer.rows)
    except NotFound as error:  # and not: nothing matches
        raise UsageError(error.message) from None
    return choose(answer.rows, args, matches), answer


def pattern_test(args: argparse.Namespace) -> Callable[[Row], bool]:
    """Whether a row's name, or with -f its command line, matches. A newline is a character as any
    other, as in pgrep, lest a name hide behind it. Raises `UsageError`."""
    if args.pattern is None:
        return lambda row: True
    try:
        found = re.compile(args.pattern, re.DOTALL | re.IGNORECASE * args.ignore_case)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{args.program}: {args.pattern!r} is no regular expression: {error}"
        ) from None
    look = found.fullmatch if args.exact else found.search
    return lambda row: look(row["command"] if args.full else row["name"]) is not None


def choose(
    rows: Sequence[Row], args: argparse.Namespace, matches: Callable[[Row], bool]
) -> list[Row]:
    """Those that pass all tests (with -v: not all), but never who asks; in order of place."""
    tests = [matches, *_list_tests(args, rows)]
    found = [
        row
        for row in rows
        if all(test(row) for test in tests) is not args.inverse and not is_self(row)
    ]
    if found and args.newest:
        return [min(found, key=lambda row: (row["elapsed_s"], -row["pid"]))]
    if found and args.oldest:
        return [max(found, key=lambda row: (row["elapsed_s"], -row["pid"]))]
    return found


def _list_tests(args: argparse.Namespace, rows: Sequence[Row]) -> list[Callable[[Row], bool]]:
    def of(text: str | None) -> list[str]:
        return [] if text is None else [text]

    tests: list[Callable[[Row], bool]] = []
    for lists in (
        Lists(ppids=of(args.parents), program=args.program),
        Lists(sessions=of(args.sessions), program=args.program),
        Lists(terminals=of(args.terminals), program=args.program),
        Lists(users=of(args.euid), program=args.program),
        Lists(real_users=of(args.uid), program=args.program),
    ):
        tests += tests_of(lists, rows)
    if args.groups is not None:
        groups = {number(args.program, word) for word in split(args.program, [args.groups])}
        tests.append(lambda row: row["pgrp"] in groups)
    if args.older is not None:
        tests.append(lambda row: row["elapsed_s"] > args.older)
    if args.runstates is not None:
        tests.append(lambda row: row["state"] in args.runstates)
    return tests
