"""`tabane checkpoint`: the checkpoints of all nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tabane.clock import SYSTEM
from tabane.errors import NotFound, UsageError
from tabane.tools.cli.common import (
    Parser,
    Row,
    complain,
    format_age,
    print_json,
    print_table,
    say_silent,
)
from tabane.tools.cli.keeping import (
    LEAST_DIGITS,
    REMOVE_TIMEOUT_S,
    ask,
    collect,
    digits,
    find_node,
    say_removed,
)
from tabane.tools.cli.places import place_of, placed, short
from tabane.tools.cli.sizes import scaled
from tabane.tools.client import Cluster

if TYPE_CHECKING:
    import argparse

ACTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "ls": ("", frozenset({"node"})),
    "inspect": ("CHECKPOINT", frozenset({"node"})),
    "rm": ("CHECKPOINT...", frozenset({"node"})),
    "gc": ("", frozenset({"node", "dry_run"})),
}
"""What each takes: its words, and which options."""
PATH = "/api/v1/checkpoints"
KINDS = ("checkpoints", "stores")


def checkpoint(argv: list[str]) -> int:
    parser = Parser("checkpoint", "Checkpoints of apps: what nodes have, and removing them.")
    forms = [f"{name} {words}".strip() for name, (words, _) in ACTIONS.items()]
    parser.usage = "tabane checkpoint " + "\n       tabane checkpoint ".join(forms)
    parser.add_argument("--node", metavar="NODE", help="only this node")
    parser.add_argument("-n", "--dry-run", action="store_true", help="gc: only say what it is")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("action", choices=tuple(ACTIONS))
    parser.add_argument("words", nargs="*", metavar="CHECKPOINT")
    args = parser.parse_args(argv)
    _check(args)
    actions: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
        "ls": _ls,
        "inspect": _inspect,
        "rm": _rm,
        "gc": _gc,
    }
    return actions[args.action](Cluster(args.root), args)


def _check(args: argparse.Namespace) -> None:
    words, allowed = ACTIONS[args.action]
    if args.dry_run and "dry_run" not in allowed:
        raise UsageError(f"{args.action} has no option --dry-run")
    count, wanted = len(args.words), len(words.split())
    if count < wanted or (count > wanted and not words.endswith("...")):
        raise UsageError(f"write: tabane checkpoint {args.action} {words}".rstrip())


# What there is


def _ls(cluster: Cluster, args: argparse.Namespace) -> int:
    answer = ask(cluster, PATH, KINDS, args.node)
    if args.json:
        told = {kind: [*map(_placed, answer[kind])] for kind in KINDS}
        print_json({**told, "silent": answer["silent"]})
        return say_silent(answer["silent"])
    headings = ("DIGEST", "DC", "NODE", "APP", "REV", "CLASS", "DRIVER", "PUT AWAY")
    sizes = ("SIZE", "ON DISK", "OPEN", "MADE", "USED")
    print_table((*headings, *sizes), map(_line, answer["checkpoints"]))
    print()
    stores = [
        (
            *place_of(store),
            scaled(store["used_bytes"]),
            scaled(store["limit_bytes"]),
            scaled(store["memory_used_bytes"]),
            scaled(store["memory_limit_bytes"]),
        )
        for store in answer["stores"]
    ]
    print_table(("DC", "NODE", "USED", "QUOTA", "IN MEMORY", "MAY BE"), stores)
    for store in answer["stores"]:
        if store["problem"]:
            complain(f"checkpoint: {store['node']} has none: {store['problem']}")
        if store["quarantined"]:
            found = f"{store['node']} has found damaged ones ({store['quarantined']} files)"
            complain(f"checkpoint: {found}: its log/node.log tells which")
    return say_silent(answer["silent"])


def _placed(row: Row) -> Row:
    """In the words of all commands."""
    found = placed(row)
    return found | {"class": found.pop("isolation")} if "isolation" in found else found


def _line(row: Row) -> tuple[object, ...]:
    now = SYSTEM.wall()
    return (
        digits(row["digest"]),
        *place_of(row),
        short(row["app"]) + ("" if row["is_wanted"] else " (unused)"),
        row["revision"],
        row["isolation"],
        row["driver"],
        _away(row) or "-",
        scaled(row["bytes"]),
        scaled(row["disk_bytes"]),
        row["users"] or ("warm" if row["is_warm"] else "-"),
        format_age(now - row["made_at"]),
        format_age(now - row["used_at"]),
    )


def find(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows that are meant by the beginning of a digest, by the instance that is put away, or
    by an app: all of its. Raises `NotFound`, and `UsageError` for digits that several begin
    with."""
    rows = list(rows)
    if named := [
        row for row in rows if name and name in (row["app"], short(row["app"]), _away(row))
    ]:
        return named
    start = name.removeprefix("sha256:")
    is_digest = len(start) >= LEAST_DIGITS and set(start) <= set("0123456789abcdef")
    found = [row for row in rows if is_digest and _begins(row, start)]
    if not found:
        raise NotFound(f"no node has a checkpoint {name!r}: look with `tabane checkpoint ls`")
    if len({row["digest"] for row in found}) > 1:
        several = ", ".join(digits(row["digest"]) for row in found)
        raise UsageError(f"{name!r} means several checkpoints: write more of one of {several}")
    return found


def _away(row: Row) -> str:
    """The instance that is put away as it; empty: others begin from it."""
    instance: str = row["instance"] if row.get("kept") else ""
    return instance


def _begins(row: Row, start: str) -> bool:
    digest: str = row["digest"]
    return digest.removeprefix("sha256:").startswith(start)


def _inspect(cluster: Cluster, args: argparse.Namespace) -> int:
    rows = find(ask(cluster, PATH, KINDS, args.node)["checkpoints"], args.words[0])
    latest = max(rows, key=lambda row: row["made_at"])
    path = f"{PATH}/{latest['digest']}/description"
    print_json(placed(cluster.get(path, node=latest["node"])))
    return 0


# Going


def _rm(cluster: Cluster, args: argparse.Namespace) -> int:
    rows = ask(cluster, PATH, KINDS, args.node)["checkpoints"]
    found = [row for name in args.words for row in find(rows, name)]
    removed: list[Row] = []
    silent: set[str] = set()
    for digest in dict.fromkeys(row["digest"] for row in found):
        node = f"?node={find_node(cluster, args.node)}" if args.node else ""
        path = f"{PATH}/{digest}{node}"
        answer = json.loads(cluster.request("DELETE", path, timeout_s=REMOVE_TIMEOUT_S))
        removed += answer["removed"]
        silent |= {*answer["silent"]}
    return say_removed("checkpoint", removed, sorted(silent), "removed", as_json=args.json)


def _gc(cluster: Cluster, args: argparse.Namespace) -> int:
    answer = collect(cluster, f"{PATH}/gc", args.node, dry_run=args.dry_run)
    done = "would be removed" if args.dry_run else "removed"
    return say_removed("checkpoint", answer["removed"], answer["silent"], done, as_json=args.json)
