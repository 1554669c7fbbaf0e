"""`tabane uptime`, `tabane w`: how long each node runs, its load, and who is logged in.

Moments are by the reader's clock: nodes tell ages only that are to be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from tabane.clock import SYSTEM
from tabane.tools.cli.asking import Answer, Filters, add_filters, ask, filters_of, say_partial
from tabane.tools.cli.common import Parser, Row, print_json
from tabane.tools.cli.screen import Place, layout, show

if TYPE_CHECKING:
    from tabane.tools.client import Cluster

FIELDS = "dc,node,uptime_s,load_1,load_5,load_15,users"
MINUTE_S, HOUR_S, DAY_S, WEEK_S = 60, 3600, 86400, 604800
WORDS = {"decade": 3650 * DAY_S, "year": 365 * DAY_S, "week": WEEK_S, "day": DAY_S}
WORDS |= {"hour": HOUR_S, "minute": MINUTE_S}


def uptime(argv: list[str]) -> int:
    parser = Parser("uptime", "How long each node has been running, and its load.")
    add = parser.add_argument
    add("-p", "--pretty", action="store_true", help="the duration alone, in words")
    add("-s", "--since", action="store_true", help="the moment alone")
    add_filters(parser, app=False, user=False)
    add("--json", action="store_true")
    args = parser.parse_args(argv)
    from tabane.tools.client import Cluster

    answer = ask(Cluster(args.root), "host", filters_of(args), {"fields": FIELDS})
    if args.json:
        print_json({"host": answer.rows, "silent": answer.silent})
        return say_partial(answer)
    now = SYSTEM.wall()
    tell = in_words if args.pretty else since if args.since else summary
    show(beside_place(answer.rows, [tell(row, now) for row in answer.rows]), heading=False)
    return say_partial(answer)


def beside_place(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """Each text after its node, without a heading, as uptime has none."""
    cells = [(row["dc"], row["node"], text) for row, text in zip(rows, texts, strict=True)]
    return layout([Place(""), Place(""), Place("")], cells)[1:]


def summary(row: Row, now: float) -> str:
    """` 20:57:36 up  3:10,  1 user,  load average: 1.75, 1.10, 1.27`."""
    load = ", ".join(f"{row[f'load_{n}']:.2f}" for n in (1, 5, 15))
    users = f"{row['users']} user{'s' if row['users'] > 1 else ''}"
    at = f"{datetime.fromtimestamp(now):%H:%M:%S}"
    return f" {at} up {_duration(row['uptime_s'])},  {users},  load average: {load}"


def _duration(uptime_s: float) -> str:
    """`3 days,  3:10`, ` 3:10`, `10 min`."""
    days, rest = divmod(int(uptime_s), DAY_S)
    hours, minutes = rest // HOUR_S, rest % HOUR_S // MINUTE_S
    head = f"{days} day{'s' if days > 1 else ''}, " if days else ""
    return head + (f"{hours:2}:{minutes:02}" if hours else f"{minutes} min")


def in_words(row: Row, now: float) -> str:
    """`up 1 week, 3 hours, 10 minutes`."""
    rest = int(row["uptime_s"])
    parts = []
    for word, size_s in WORDS.items():
        number, rest = divmod(rest, size_s)
        if number:
            parts.append(f"{number} {word}{'s' if number > 1 else ''}")
    return "up " + (", ".join(parts) or "0 minutes")


def since(row: Row, now: float) -> str:
    """`2026-11-25 17:47:03`."""
    return f"{datetime.fromtimestamp(now - row['uptime_s']):%Y-%m-%d %H:%M:%S}"


def w(argv: list[str]) -> int:
    parser = Parser("w", "Who is logged in to which node, and what they do.", h_is_help=False)
    add = parser.add_argument
    add("-h", "--no-header", action="store_true", help="neither uptime nor headings")
    add("-s", "--short", action="store_true", help="without login, JCPU and PCPU times")
    add("-f", "--from", dest="no_from", action="store_true", help="without where they come from")
    add_filters(parser, app=False)
    add("--json", action="store_true")
    add("users", nargs="*", metavar="USER")
    args = parser.parse_args(argv)
    from tabane.tools.client import Cluster

    logins, hosts = _ask(
        Cluster(args.root), filters_of(args), with_hosts=not (args.no_header or args.json)
    )
    rows = [row for row in logins.rows if not args.users or row["user"] in args.users]
    if args.json:
        print_json({"logins": rows, "silent": logins.silent})
        return say_partial(logins)
    now = SYSTEM.wall()
    show(beside_place(hosts, [summary(row, now) for row in hosts]), heading=False)
    lines = render(rows, now, short=args.short, with_from=not args.no_from)
    show(lines[args.no_header :], heading=not args.no_header)
    return say_partial(logins)


def _ask(cluster: Cluster, filters: Filters, *, with_hosts: bool) -> tuple[Answer, list[Row]]:
    """The logins, and the figures of the nodes if wanted: at once, so that a dead node costs its
    deadline once."""
    if not with_hosts:
        return ask(cluster, "logins", filters), []
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        machines = filters._replace(user="")
        hosts = pool.submit(ask, cluster, "host", machines, {"fields": FIELDS})
        logins = ask(cluster, "logins", filters)
        return logins, hosts.result().rows


def render(rows: Sequence[Row], now: float, *, short: bool, with_from: bool) -> list[str]:
    """As w does; what a node does not know of somebody is `?`."""
    columns: list[tuple[Place, Callable[[Row], str]]] = [
        (Place("DC"), lambda row: row["dc"]),
        (Place("NODE"), lambda row: row["node"]),
        (Place("USER"), lambda row: row["user"]),
        (Place("TTY"), lambda row: row["tty"]),
    ]
    if with_from:
        columns.append((Place("FROM"), lambda row: row["host"] or "-"))
    if not short:
        columns.append((Place("LOGIN@"), lambda row: login_at(row["login_age_s"], now)))
    columns.append((Place("IDLE", right=True), lambda row: span(row["idle_s"])))
    if not short:
        columns.append((Place("JCPU", right=True), lambda row: span(row["jcpu_s"])))
        columns.append((Place("PCPU", right=True), lambda row: span(row["pcpu_s"])))
    columns.append((Place("WHAT"), lambda row: row["what"]))
    cells = [[tell(row) for _, tell in columns] for row in rows]
    return layout([place for place, _ in columns], cells)


def login_at(age_s: float, now: float) -> str:
    """`14:03`; of another day `Wed14`, of another week `25Nov26`."""
    at, present = datetime.fromtimestamp(now - age_s), datetime.fromtimestamp(now)
    if age_s > HOUR_S * 12 and at.date() != present.date():
        return f"{at:%d%b%y}" if age_s > 6 * DAY_S else f"{at:%a%H}"
    return f"{at:%H:%M}"


def span(seconds: float | None) -> str:
    """`3days`, `2:05m` (hours), `2:05` (minutes), `2.05s`."""
    if seconds is None:
        return "?"
    whole = int(seconds)
    if whole >= 2 * DAY_S:
        return f"{whole // DAY_S}days"
    if whole >= HOUR_S:
        return f"{whole // HOUR_S}:{whole % HOUR_S // MINUTE_S:02}m"
    if whole > MINUTE_S:
        return f"{whole // MINUTE_S}:{whole % MINUTE_S:02}"
    return f"{seconds:.2f}s"
