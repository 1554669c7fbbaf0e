"""What `tabane image` and `tabane checkpoint` have in common: asking for what nodes keep, naming it
by digests, saying what was removed."""

from __future__ import annotations

from typing import Any

from tabane.errors import NotFound, Unreachable
from tabane.tools.cli.common import Row, complain, print_json, say, say_silent
from tabane.tools.cli.places import placed
from tabane.tools.cli.sizes import scaled
from tabane.tools.client import Cluster

SHOWN_DIGITS = 12
LEAST_DIGITS = 4
"""Of a digest, to mean something by."""
REMOVE_TIMEOUT_S = 90.0


def ask(cluster: Cluster, path: str, kinds: tuple[str, ...], node: str | None) -> dict[str, Any]:
    """What the nodes have, or one of them: lists of these kinds, and who was `silent`."""
    answer: dict[str, Any] = cluster.get(path)
    if node is None:
        return answer
    key = find_node(cluster, node)
    if key in answer["silent"]:
        raise Unreachable(f"{key} does not answer")
    kept = {kind: [row for row in answer[kind] if row["node"] == key] for kind in kinds}
    return kept | {"silent": []}


def find_node(cluster: Cluster, name: str) -> str:
    """Its key, of one that is named with its data center or without. Raises `NotFound`."""
    for key in cluster.nodes:
        if name in (key, key.partition("/")[2]):
            return key
    raise NotFound(f"there is no node {name!r}, only {', '.join(cluster.nodes)}")


def digits(digest: str) -> str:
    """As lists show it."""
    return digest.removeprefix("sha256:")[:SHOWN_DIGITS]


def collect(cluster: Cluster, path: str, node: str | None, *, dry_run: bool) -> dict[str, Any]:
    """Have what is of no use removed, on one node or on all, or only told."""
    body = {"dry_run": dry_run, "node": find_node(cluster, node) if node else ""}
    answer: dict[str, Any] = cluster.post(path, body, timeout_s=REMOVE_TIMEOUT_S)
    return answer


def say_removed(
    command: str,
    rows: list[Row],
    silent: list[str],
    done: str,
    *,
    as_json: bool,
    stays: str = "",
) -> int:
    """What was `done` to what, on which node; if to nothing, what `stays` is told. Returns the
    command's exit code."""
    if as_json:
        print_json({"removed": [*map(placed, rows)], "silent": silent})
    for row in rows:
        if row["digests"] and not as_json:
            shown = ", ".join(map(digits, row["digests"]))
            say(f"{row['node']}: {shown} {done} ({scaled(row['bytes'])}B)")
        if row["problem"]:
            complain(f"{command}: {row['problem']}")
    if not as_json and not any(row["digests"] or row["problem"] for row in rows):
        say(f"nothing {done}{f' ({stays} stays)' if stays else ''}")
    code = say_silent(silent)
    return 1 if code or any(row["problem"] for row in rows) else 0
