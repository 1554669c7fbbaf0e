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
    """Which nodes', apps' and users' rows; empty: of all."""

    dc: str = ""
    node: str = ""
    app: str = ""
    user: str = ""
    """Names and numbers, with commas between them."""


class Answer(NamedTuple):
    """`silent` are the nodes that did not answer, `age_s` is how old rows are at most."""

    rows: list[Row]
    silent: list[str]
    age_s: float


def add_filters(parser: argparse._ActionsContainer, *, app: bool = True, user: bool = True) -> None:
    """`--dc`, `--node`; and `--app`, `--user` where rows have such."""
    parser.add_argument("--dc", metavar="DC", help="only of this data center")
    parser.add_argument("--node", metavar="NODE", help="only of this node")
    if app:
        parser.add_argument(
            "--app", metavar="APP", help="only of this app's instances; '*': of any app's"
        )
    if user:
        parser.add_argument("--user", metavar="USERS", help="only of these users (names, uids)")


def filters_of(args: argparse.Namespace) -> Filters:
    """Raises `UsageError` for what nothing can be called: an empty name would mean all."""
    given = {name: getattr(args, name, None) for name in Filters._fields}
    named = {name: ",".join(text.replace(",", " ").split()) for name, text in given.items() if text}
    if empty := [name for name, text in given.items() if text is not None and not named.get(name)]:
        raise UsageError(f"--{empty[0]}: an empty name means nothing: leave the option out")
    if named.get("app", ANY_APP) != ANY_APP:
        named["app"] = app_key(named["app"])
    return Filters(**named)


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
    elif filters.app and not rows:
        check_app(cluster, filters.app)
    if filters.user and not rows:
        check_users(cluster, filters.user.split(","))
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
    dc, node = filters.dc, filters.node
    datacenters = list(dict.fromkeys(key.partition("/")[0] for key in nodes))
    if dc and dc not in datacenters:
        raise NotFound(f"there is no data center {dc}, only {', '.join(datacenters)}")
    if node and not any(node in (key, key.partition("/")[2]) for key in nodes):
        raise NotFound(f"there is no node {node!r}, only {', '.join(nodes)}")


def check_app(cluster: Cluster, key: str) -> None:
    """Raises `NotFound` for an app that is not there, rather than at rest; only who may control the
    cluster is told which there are."""
    try:
        apps = cluster.get("/api/v1/apps")["apps"]
    except Denied:
        return
    known = [f"{app['namespace']}/{app['name']}" for app in apps]
    if key not in known:
        more = ", ..." if len(known) > MOST_NAMED else ""
        shown = ", ".join(known[:MOST_NAMED]) + more or "none at all"
        raise NotFound(f"there is no app {key}, only {shown}")


def check_users(cluster: Cluster, words: Iterable[str], seen: Iterable[Row] = ()) -> None:
    """Raises `NotFound` for a name that is a user's neither here nor of any process; no process of
    theirs is among the `seen`. Numbers are known to the kernel without a name."""
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
