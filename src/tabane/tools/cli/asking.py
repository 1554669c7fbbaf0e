"""One question to all nodes, by what people narrow it with: `--dc --node --app --user`.

A node that is dead costs its deadline once, for all who are asked, and is named on stderr.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tabane.errors import Denied, NotFound, UsageError
from tabane.tools.cli.common import Row, app_key, complain, say_silent

if TYPE_CHECKING:
    from tabane.tools.client import Cluster

MOST_NAMED = 20
FRESH_S = 3.0
"""What is older is said to be."""
ANY_APP = "*"
NO_PARAMS: Mapping[str, str] = {}
PLAIN = re.compile(r"[A-Za-z0-9_./,-]*")


class Filters(NamedTuple):
    """Which nodes', apps' and users' rows: names (and numbers) with commas between them, as in
    REST; empty: of all."""

    dc: str = ""
    node: str = ""
    app: str = ""
    user: str = ""


class Answer(NamedTuple):
    """`silent` are the nodes that did not answer, `age_s` is how old rows are at most."""

    rows: list[Row]
    silent: list[str]
    age_s: float


def add_filters(parser: argparse._ActionsContainer, *, app: bool = True, user: bool = True) -> None:
    """`--dc`, `--node`; and `--app`, `--user` where rows have such. Each may be given again."""

    def add(option: str, metavar: str, about: str) -> None:
        parser.add_argument(option, metavar=metavar, action="append", help=about)

    add("--dc", "DCS", "only of these data centers (a,b or given again)")
    add("--node", "NODES", "only of these nodes")
    if app:
        add("--app", "APPS", "only of these apps' instances; '*': of any app's")
    if user:
        add("--user", "USERS", "only of these users (names, uids)")


def filters_of(args: argparse.Namespace) -> Filters:
    """Raises `UsageError` for what nothing can be called: an empty name would mean all."""
    named = {}
    for name in Filters._fields:
        words: list[str] = []
        for text in getattr(args, name, None) or ():
            found = [word.strip() for word in text.split(",") if word.strip()]
            if not found:
                problem = "an empty name means nothing: leave the option out"
                raise UsageError(f"--{name}: {problem}")
            words += found
        named[name] = words
    apps = named["app"]
    named["user"] = " ".join(named["user"]).split()  # which may be written with blanks, too
    named["app"] = [ANY_APP] if ANY_APP in apps else [*map(app_key, apps)]
    return Filters(**{name: ",".join(dict.fromkeys(words)) for name, words in named.items()})


def ask(
    cluster: Cluster,
    kind: str,
    filters: Filters,
    params: Mapping[str, str] = NO_PARAMS,
) -> Answer:
    """The rows of all nodes that the filters leave, by place. Raises `NotFound` for a data center,
    node, app or user that is not there."""
    check_place(cluster.nodes, filters)
    of_any = filters.app == ANY_APP
    answer = cluster.get(path_of(kind, filters._replace(app="") if of_any else filters, params))
    rows = sorted(answer[kind], key=lambda row: (row["dc"], row["node"]))
    if of_any:
        rows = [row for row in rows if row["app"]]
    elif filters.app:
        seen = {row["app"] for row in rows}
        check_apps(cluster, [key for key in filters.app.split(",") if key not in seen])
    if filters.user:
        check_users(cluster, filters.user.split(","), rows)
    ages = [node["age_s"] for node in answer["nodes"]]
    return Answer(rows, answer["silent"], max(ages, default=0.0))


def ask_processes(cluster: Cluster, filters: Filters, *, tasks: bool = False) -> Answer:
    """All processes, by place and pid; with their threads as `tasks`, if wanted."""
    answer = ask(cluster, "processes", filters, {"tasks": "yes"} if tasks else NO_PARAMS)
    answer.rows.sort(key=lambda row: (row["dc"], row["node"], row["inside"], row["pid"]))
    return answer


def is_self(row: Row) -> bool:
    """Whether it is the very process that asks; it may be on a node's own machine."""
    import os

    if row["pid"] != os.getpid():
        return False
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123
        started = int(file.read().rpartition(b")")[2].split()[19])
    return bool(started == row["start_ticks"])


def path_of(kind: str, filters: Filters, params: Mapping[str, str]) -> str:
    asked = {"scope": "cluster", **{k: v for k, v in filters._asdict().items() if v}, **params}
    return f"/v2/{kind}?" + "&".join(f"{name}={_quote(text)}" for name, text in asked.items())


def _quote(text: str) -> str:
    if PLAIN.fullmatch(text):
        return text
    from urllib.parse import quote

    return quote(text, safe="", errors="surrogateescape")


def say_partial(answer: Answer) -> int:
    """What an answer lacks, on stderr: 1 when a node is missing, else 0. Rows that took their time
    are said to be old."""
    code = say_silent(answer.silent)
    if answer.age_s > FRESH_S and answer.rows:
        complain(f"what is shown is up to {answer.age_s:.1f} s old")
    return code


def check_place(nodes: Sequence[str], filters: Filters) -> None:
    """Raises `NotFound` for a data center or a node that the cluster does not have."""
    datacenters = list(dict.fromkeys(key.partition("/")[0] for key in nodes))
    for dc in filter(None, filters.dc.split(",")):
        if dc not in datacenters:
            raise NotFound(f"there is no data center {dc}, only {', '.join(datacenters)}")
    for node in filter(None, filters.node.split(",")):
        if not any(node in (key, key.partition("/")[2]) for key in nodes):
            raise NotFound(f"there is no node {node!r}, only {', '.join(nodes)}")


def is_in(node: str, filters: Filters) -> bool:
    """Whether the filters leave a node, `dc/node`."""
    dc, _, name = node.partition("/")
    datacenters, nodes = filters.dc.split(","), filters.node.split(",")
    is_named = not filters.node or node in nodes or name in nodes
    return is_named and (not filters.dc or dc in datacenters)


def check_apps(cluster: Cluster, keys: Sequence[str]) -> None:
    """Raises `NotFound` for an app that is not there, rather than at rest; only who may control the
    cluster is told which there are."""
    if not keys:
        return
    try:
        apps = cluster.get("/api/v1/apps")["apps"]
    except Denied:
        return
    known = [f"{app['namespace']}/{app['name']}" for app in apps]
    if missing := [key for key in keys if key not in known]:
        more = ", ..." if len(known) > MOST_NAMED else ""
        shown = ", ".join(known[:MOST_NAMED]) + more or "none at all"
        raise NotFound(f"there is no app {missing[0]}, only {shown}")


def check_users(cluster: Cluster, words: Iterable[str], seen: Iterable[Row] = ()) -> None:
    """Raises `NotFound` for a name that is a user's neither here nor of any process or row that was
    `seen`. Numbers are known to the kernel without a name."""
    known = {row["user"] for row in seen}
    names = [word for word in words if not (word in known or word.isdigit() or _is_user_here(word))]
    if not names:
        return
    path = path_of("processes", Filters(user=",".join(names)), {"fields": "user"})
    answer = cluster.get(path)
    known |= {row["user"] for row in answer["processes"]}
    unknown = [name for name in names if name not in known]
    if unknown and not answer["silent"]:
        raise NotFound(f"there is no user {unknown[0]}, neither here nor of any process")


def _is_user_here(name: str) -> bool:
    from pwd import getpwnam

    try:
        getpwnam(name)
    except (KeyError, ValueError):
        return False
    return True
