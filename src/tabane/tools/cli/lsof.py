"""`tabane lsof`: open files and sockets of all nodes' processes.

As with lsof, several choices are added up unless -a joins them, and numbers stay numbers: -n and -P
are what it always does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence

from tabane.errors import UsageError
from tabane.tools.cli.asking import add_filters, ask, check_users, filters_of, say_partial
from tabane.tools.cli.columns import gpid, short_app
from tabane.tools.cli.common import Parser, Row, print_json
from tabane.tools.cli.screen import Place, layout, show
from tabane.tools.cli.selection import split

Test = Callable[[Row], bool]
INTERNET = re.compile(
    r"(?P<family>[46]?)(?P<protocol>tcp|udp)?(?:@(?P<host>\[[0-9a-f:.]+\]|[^:@]+))?"
    r"(?::(?P<ports>[0-9a-z,-]+))?",
    re.IGNORECASE,
)
FAMILIES = {"": ("IPv4", "IPv6"), "4": ("IPv4",), "6": ("IPv6",)}
LARGEST_PORT = 65535
LONGEST_ASKED = 1000
"""Of a question's parameter, in characters."""
I_HELP = "sockets of the internet: [46][tcp|udp][@HOST][:PORTS]"


def lsof(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    choices, exclusions = tests_of(args)
    from tabane.tools.client import Cluster

    cluster = Cluster(args.root)
    answer = ask(cluster, "files", filters_of(args), narrowing(args, len(choices)))
    check_users(cluster, _split(args.users)[0], answer.rows)
    rows = choose(answer.rows, choices, exclusions, together=args.together)
    if args.json:
        print_json({"files": rows, "silent": answer.silent})
    elif args.terse:
        for process in dict.fromkeys(map(gpid, rows)):
            print(process)
    elif rows:
        show(render(rows))
    return say_partial(answer) or (0 if rows else 1)


def _parser() -> Parser:
    parser = Parser("lsof", "Open files and sockets of all nodes' processes.")
    add = parser.add_argument
    add("-p", dest="pids", action="append", metavar="PIDS", help="of these processes; ^PID: not")
    add("-u", dest="users", action="append", metavar="USERS", help="of these users; ^USER: not")
    add("-c", dest="names", action="append", metavar="NAME", help="whose command begins so; /RE/")
    add("-d", dest="fds", action="append", metavar="FDS", help="these descriptors; ^FD: not")
    add("-i", dest="internet", action="append", nargs="?", const="", metavar="ADDRESS", help=I_HELP)
    add("-s", dest="states", action="append", metavar="PROTOCOL:STATE", help="as TCP:LISTEN")
    add("-U", dest="unix", action="store_true", help="unix sockets")
    add("-a", dest="together", action="store_true", help="all choices must hold")
    add("-n", "-P", dest="numeric", action="store_true", help="no names, as always here")
    add("-t", "--terse", action="store_true", help="process ids only, for kill")
    add_filters(parser)
    add("--json", action="store_true")
    add("files", nargs="*", metavar="FILE", help="who has these open")
    return parser


def tests_of(args: argparse.Namespace) -> tuple[list[Test], list[Test]]:
    """What chooses (-p 1, -i, ...) and what excludes (-p ^1, -s). Raises `UsageError`."""
    choices: list[Test] = []
    exclusions: list[Test] = []
    for texts, field in ((args.pids, "pid"), (args.users, "user"), (args.fds, "fd")):
        named, excluded = _split(texts)
        if named:
            choices.append(_among(field, named))
        if excluded:
            exclusions.append(_none_of(_among(field, excluded)))
    if args.names:
        choices.append(_named(args.names))
    if args.internet:
        matches = [internet_test(text) for text in args.internet]
        choices.append(lambda row: any(test(row) for test in matches))
    if args.unix:
        choices.append(lambda row: row["type"] == "unix")
    if args.files:
        if odd := [file for file in args.files if not file or file.startswith("+")]:
            raise UsageError(f"lsof: {odd[0]!r} is neither an option here nor a file")
        files = frozenset(args.files)
        choices.append(lambda row: row["path"] in files)
    exclusions += map(state_test, args.states or ())
    return choices, exclusions


def _none_of(test: Test) -> Test:
    return lambda row: not test(row)


def _split(texts: Sequence[str] | None) -> tuple[frozenset[str], frozenset[str]]:
    """Words, and those after a `^`."""
    words = split("lsof", texts or ())
    excluded = frozenset(word[1:] for word in words if word.startswith("^"))
    return frozenset(word for word in words if not word.startswith("^")), excluded


def _among(field: str, words: frozenset[str]) -> Test:
    """Also by `dc/node:pid`, by uid, and by ranges of descriptors (`0-2`)."""
    if field == "pid":
        for word in words:
            if not re.fullmatch("[0-9]+|.+/.+:[0-9]+", word):
                raise UsageError(f"lsof: -p: {word!r} is no process: write PID or DC/NODE:PID")
        return lambda row: str(row["pid"]) in words or gpid(row) in words
    if field == "user":
        return lambda row: row["user"] in words or str(row["uid"]) in words
    spans = [_span(word) for word in words if "-" in word]
    return lambda row: (
        row["fd"] in words
        or (row["fd"].isdigit() and any(int(row["fd"]) in span for span in spans))
    )


def _span(word: str) -> range:
    """`0-2`."""
    low, _, high = word.partition("-")
    if not re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", word) or int(low) > int(high):
        raise UsageError(f"lsof: -d: {word!r} is no range of descriptors: write 0-2")
    return range(int(low), int(high) + 1)


def _named(texts: Sequence[str]) -> Test:
    tests = [_name_test(text) for text in texts]
    return lambda row: any(test(row) for test in tests)


def _name_test(text: str) -> Test:
    """By the beginning of a name, or by a regular expression between slashes."""
    found = re.fullmatch("/(.*)/(i?)", text)
    if not found:
        return lambda row: bool(row["name"].startswith(text))
    try:
        pattern = re.compile(found[1], re.DOTALL | re.IGNORECASE * bool(found[2]))
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"lsof: -c: {text} is no regular expression: {error}") from None
    return lambda row: pattern.search(row["name"]) is not None


def internet_test(text: str) -> Test:
    """`:80`, `TCP:80,443`, `4udp@127.0.0.1:1-1024`, or nothing for all. Raises `UsageError`."""
    found = INTERNET.fullmatch(text)
    if not found:
        raise UsageError(f"lsof: -i: {text!r} is no address: write [46][tcp|udp][@HOST][:PORTS]")
    families, protocol = FAMILIES[found["family"]], (found["protocol"] or "").upper()
    host = (found["host"] or "").strip("[]")
    ports = _ports(text, found["ports"])

    def test(row: Row) -> bool:
        return (
            row["type"] in families
            and protocol in ("", row["protocol"].upper())
            and (not host or host in (row["local_address"], row["peer_address"]))
            and (ports is None or bool(ports & {row["local_port"], row["peer_port"]}))
        )

    return test


def _ports(text: str, words: str | None) -> frozenset[int] | None:
    if words is None:
        return None
    ports: set[int] = set()
    for word in words.split(","):
        low, dash, high = word.partition("-")
        if dash and low.isdigit():
            ports.update(range(_port(text, low), _port(text, high) + 1))
        else:
            ports.add(_port(text, word))
    return frozenset(ports)


def _port(text: str, word: str) -> int:
    """By its number, or the name that this machine knows it by."""
    from socket import getservbyname

    if re.fullmatch("[0-9]{1,5}", word) and int(word) <= LARGEST_PORT:
        return int(word)
    try:
        return getservbyname(word)
    except OSError:
        problem = f"{word!r} is neither a port up to {LARGEST_PORT} nor a service's name"
        raise UsageError(f"lsof: -i: {text!r}: {problem}") from None


def state_test(text: str) -> Test:
    """`TCP:LISTEN,ESTABLISHED`, `TCP:^TIME_WAIT`: only for sockets of that protocol."""
    protocol, colon, words = text.partition(":")
    if not colon or protocol.upper() not in ("TCP", "UDP"):
        raise UsageError(f"lsof: -s: {text!r}: write a protocol and states, as TCP:LISTEN")
    named, excluded = _split([words.upper()])

    def test(row: Row) -> bool:
        if row["protocol"].upper() != protocol.upper():
            return True
        return row["state"] not in excluded and (not named or row["state"] in named)

    return test


def narrowing(args: argparse.Namespace, choices: int) -> Mapping[str, str]:
    """What nodes can leave out themselves. Only what every row must fulfil may be asked so, and
    what is no longer than questions may be."""
    asked: dict[str, str] = {}
    if choices > 1 and not args.together:
        return asked
    pids, _ = _split(args.pids)
    if pids and all(word.isdigit() for word in pids):
        asked["pid"] = ",".join(sorted(pids))
    if args.internet:
        asked["type"] = "IPv4,IPv6"
    if len(args.files) == 1:
        asked["path"] = args.files[0]
    return {name: text for name, text in asked.items() if len(text) <= LONGEST_ASKED}


def choose(
    rows: Sequence[Row], choices: Sequence[Test], exclusions: Sequence[Test], *, together: bool
) -> list[Row]:
    """Rows that any choice takes (all, if they hold `together`; any row without choices), and that
    nothing excludes; by place and process."""
    join = all if together or not choices else any
    found = [
        row
        for row in rows
        if join(test(row) for test in choices) and all(test(row) for test in exclusions)
    ]
    return sorted(found, key=lambda row: (row["dc"], row["node"], row["pid"]))


PLACES = [
    *(Place("DC"), Place("NODE"), Place("APP"), Place("CLASS"), Place("COMMAND")),
    *(Place("PID", right=True), Place("USER"), Place("FD", right=True), Place("TYPE", right=True)),
    *(Place("DEVICE", right=True), Place("SIZE/OFF", right=True), Place("INODE", right=True)),
    Place("NAME"),
]


def render(rows: Sequence[Row]) -> list[str]:
    return layout(PLACES, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    size = row["size"]
    if size is None and row["offset"] is not None:
        size = f"0t{row['offset']}"
    network = row["type"] in ("IPv4", "IPv6")
    return [
        *(row["dc"], row["node"], short_app(row), row["class"] or "-", row["name"]),
        *(str(row["pid"]), row["user"], row["fd"] + row["mode"], row["type"], row["device"]),
        "" if size is None else str(size),
        row["protocol"] if network else "" if row["inode"] is None else str(row["inode"]),
        name_of(row),
    ]


def name_of(row: Row) -> str:
    """A path; of a connection `127.0.0.1:80->127.0.0.1:5000 (ESTABLISHED)`."""
    if row["type"] not in ("IPv4", "IPv6"):
        return str(row["path"] or "")
    ends = [_endpoint(row["local_address"], row["local_port"])]
    if row["peer_port"]:
        ends.append(_endpoint(row["peer_address"], row["peer_port"]))
    state = f" ({row['state']})" if row["state"] and row["protocol"].upper() == "TCP" else ""
    return "->".join(ends) + state


def _endpoint(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address or "*"
    return f"{host}:{port or '*'}"
