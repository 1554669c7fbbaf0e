"""`tabane kill`, `tabane renice`: act on processes of any node, addressed so that nobody else can
be hit. Both go on with the other targets when one cannot be reached, and end with 1 then."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

from tabane.errors import NotFound, UsageError
from tabane.tools.cli.asking import Filters, ask_processes
from tabane.tools.cli.columns import gpid
from tabane.tools.cli.common import Parser, Row, complain, print_json, say, say_silent

TARGET_HELP = "DC/NODE:PID, a pid that only one node has, or an instance's id (its first process)"
NO_SIGNAL = "neither an option nor a signal: `tabane kill -l` lists the signals"
DESCRIBED = ("dc", "node", "namespace", "app", "instance", "class", "pid", "name", "user")
LINE_CELLS = 78
TABLE_COLUMNS = 7


def kill(argv: list[str]) -> int:
    from tabane.k2i.orders import parse_signal
    from tabane.tools.cli.ordering import take_signal

    given, rest = take_signal(argv)
    args = _kill_parser().parse_args(rest)
    if args.table:
        print("\n".join(signal_table()))
        return 0
    if args.names:
        print("\n".join(convert(args.targets) if args.targets else signal_names()))
        return 0
    if not args.targets:
        raise UsageError("kill: name processes: " + TARGET_HELP)
    if groups := [word for word in args.targets if word.startswith("-")]:
        hint = "`tabane pkill -g PGID` signals a process group"
        raise UsageError(f"kill: {groups[0]} is neither a signal nor a process: {hint}")
    signal = parse_signal(args.signal or given or "TERM")
    return _act("kill", args, args.targets, (), "signal", {"signal": signal})


def _kill_parser() -> Parser:
    parser = Parser("kill", "Signal processes, wherever they run.", or_else=NO_SIGNAL)
    parser.usage = "tabane kill [-SIGNAL] TARGET ... | -l [SIGNAL ...] | -L"
    add = parser.add_argument
    add("-s", "--signal", metavar="SIGNAL", help="by name or number, as -TERM and -9 do; else TERM")
    add("-l", "--list", dest="names", action="store_true", help="signals, or what these are")
    add("-L", "--table", action="store_true", help="signals and their numbers")
    add("--force", action="store_true", help="also what a node cannot do without (root)")
    add("--json", action="store_true")
    add("targets", nargs="*", metavar="TARGET", help=TARGET_HELP)
    return parser


def signal_names() -> list[str]:
    """As `kill -l` prints them."""
    from textwrap import wrap

    return wrap(" ".join(name for _, name in _signals()), LINE_CELLS)


def signal_table() -> list[str]:
    """As `kill -L` prints them."""
    cells = [f"{value:2} {name:<8}" for value, name in _signals()]
    rows = range(0, len(cells), TABLE_COLUMNS)
    return ["".join(cells[n : n + TABLE_COLUMNS]).rstrip() for n in rows]


def _signals() -> list[tuple[int, str]]:
    """All but the real-time ones."""
    from signal import SIGRTMIN, Signals

    names = ((int(one), one.name[3:]) for one in sorted(set(Signals)) if one < SIGRTMIN)
    return [(value, "POLL" if name == "IO" else name) for value, name in names]


def convert(words: Sequence[str]) -> list[str]:
    """Names to numbers, and numbers (also exit codes, 128 more) to names."""
    from tabane.k2i.orders import parse_signal

    names = dict(_signals())
    found = []
    for word in words:
        if not re.fullmatch("[0-9]{1,3}", word):
            found.append(str(parse_signal(word)))
            continue
        value = int(word) - 128 if int(word) > 128 else int(word)
        if value not in names:
            raise UsageError(f"kill: {word} is no signal's number: `tabane kill -L` lists them")
        found.append(names[value])
    return found


def renice(argv: list[str]) -> int:
    parser = Parser("renice", "Change how nice running processes are to others.")
    parser.usage = "tabane renice [-n] NICE [-p] TARGET ... | [-n] NICE -u USER ..."
    add = parser.add_argument
    add("-n", "--priority", type=_nice, metavar="NICE", help="-20 (is favoured) to 19 (steps back)")
    add("--relative", action="store_true", help="NICE is added to what each has")
    add("-p", "--pid", dest="pids", nargs="+", action="extend", metavar="TARGET", help=TARGET_HELP)
    add("-u", "--user", dest="users", nargs="+", action="extend", metavar="USER", help="all theirs")
    add("--force", action="store_true", help="also what a node cannot do without (root)")
    add("--json", action="store_true")
    add("words", nargs="*", metavar="TARGET", help="as -p; the nice value first, without -n")
    args = parser.parse_args(argv)
    words, users = [*args.words, *(args.pids or ())], args.users or ()
    if args.priority is None and args.words:
        try:
            args.priority = _nice(words.pop(0))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"renice: {error}") from None
    if args.priority is None or not (words or users):
        raise UsageError("renice: name a nice value and processes, as in renice -n 5 -p 4711")
    nice = args.priority if args.relative else max(-20, min(args.priority, 19))
    body = {"nice": nice, "relative": args.relative}
    return _act("renice", args, words, users, "nice", body)


def _nice(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,2}", text) or not -40 <= int(text) <= 40:
        raise argparse.ArgumentTypeError(f"{text!r} is no nice value: write -20 to 19")
    return int(text)


def _act(
    name: str,
    args: argparse.Namespace,
    words: Sequence[str],
    users: Sequence[str],
    action: str,
    body: dict[str, object],
) -> int:
    """Send an order to all who are meant by the words, or are of these users; say what became of
    each."""
    from tabane.tools.cli.ordering import find_all, find_target, send
    from tabane.tools.client import Cluster

    cluster = Cluster(args.root)
    answer = ask_processes(cluster, Filters())
    theirs = _of_users(users, answer.rows)
    rows, problems = find_all(words, lambda word: find_target(word, answer, cluster.nodes))
    for problem in problems:
        complain(f"{name}: {problem.message}")
    rows += [row for row in theirs if row not in rows]
    outcomes = send(cluster, rows, action, {**body, "force": args.force})
    if args.json:
        told = [_described(row, outcome) for row, outcome in zip(rows, outcomes, strict=True)]
        print_json({"outcomes": told, "silent": answer.silent})
    _say_outcomes(name, rows, outcomes, quiet=args.json or action == "signal")
    failed = [outcome for outcome in outcomes if outcome.get("error")]
    missing = say_silent(answer.silent) if users else 0
    if any(type(problem) is UsageError for problem in problems):
        return 2
    return 1 if problems or failed or missing else 0


def _described(row: Row, outcome: Mapping[str, object]) -> Row:
    """An outcome, after whose it is."""
    process = {name: row[name] for name in DESCRIBED}
    return process | {name: value for name, value in outcome.items() if name != "target"}


def _of_users(words: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """All processes of these users. Raises `NotFound` for one who has none."""
    found = [row for row in rows if row["user"] in words or str(row["uid"]) in words]
    seen = {name for row in found for name in (row["user"], str(row["uid"]))}
    if missing := [word for word in words if word not in seen]:
        raise NotFound(f"renice: no process is {missing[0]}'s")
    return found


def _say_outcomes(
    name: str, rows: Sequence[Row], outcomes: Sequence[dict[str, object]], *, quiet: bool
) -> None:
    from tabane.tools.cli.ordering import complain_of

    results = list(zip(rows, outcomes, strict=True))
    complain_of(name, [(row, outcome) for row, outcome in results if outcome.get("error")])
    for row, outcome in results:
        if not outcome.get("error") and not quiet:
            old, new = outcome["before"], outcome["after"]
            say(f"{gpid(row)} (process ID) old priority {old}, new priority {new}")
