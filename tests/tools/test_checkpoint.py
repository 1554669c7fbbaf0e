"""`tabane checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.tools.answers import CHECKPOINT, VAULT
from tests.tools.conftest import Pretended, Run, check_refusal, reply

from tabane.errors import NotFound, UsageError
from tabane.tools.cli.checkpoints import find

ONE, TWO, THREE = ("sha256:" + digits * 32 for digits in ("1a", "1b", "2c"))
FREE = {"is_warm": False, "is_wanted": True}
ROWS = [
    CHECKPOINT | {"digest": ONE, "app": "default/hello", "users": 2, "is_wanted": True}
    | {"kept": {"created_at": 1.0}},
    CHECKPOINT | {"digest": TWO, "app": "team/shop", "made_at": 1.0, "driver": "runc"} | FREE,
    CHECKPOINT | {"digest": THREE, "app": "default/hello", "made_at": 2.0, "driver": "runsc"}
    | {"node": "osaka/osaka-1", "is_wanted": False, "is_warm": True},
]  # fmt: skip
STORES = [
    VAULT | {"node": f"{dc}/{dc}-1", "used_bytes": 5 << 20, "limit_bytes": 1 << 30, "problem": ""}
    for dc in ("tokyo", "osaka")
]


class Node:
    """Answers as a node does; what it was asked is in `asked`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.stores = STORES
        self.removed = [
            {"node": "tokyo/tokyo-1", "digests": [ONE], "bytes": 5 << 20, "problem": ""},
            {"node": "osaka/osaka-1", "digests": [], "bytes": 0, "problem": "it is open, for 2"},
        ]

    def __call__(self, line: str, body: bytes) -> bytes:
        method, target = line.split()[:2]
        self.asked.append((f"{method} {target}", json.loads(body) if body else None))
        if method == "DELETE" or target.endswith("/gc"):
            return reply({"removed": self.removed, "silent": ["nara/nara-1"]})
        if target.endswith("/description"):
            return reply({"node": "osaka/osaka-1", "digest": THREE, "refusals": ["it is old"]})
        return reply({"checkpoints": ROWS, "stores": self.stores, "silent": []})


@pytest.fixture
def node(pretended: Pretended) -> Iterator[Node]:
    node = Node()
    pretended.begin(tokyo=node, osaka=node)
    yield node


def test_ls(tabane: Run, node: Node) -> None:
    ended = tabane("checkpoint", "ls")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.split("  ") for line in ended.out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows[0] == [
        *("DIGEST", "DC", "NODE", "APP", "REV", "CLASS", "DRIVER", "PUT AWAY"),
        *("SIZE", "ON DISK", "OPEN", "MADE", "USED"),
    ]
    assert [row[7] for row in rows[1:4]] == ["abc123", "-", "-"]
    assert rows[1][:4] == ["1a" * 6, "tokyo", "tokyo-1", "hello"] and rows[1][-3] == "2"
    assert rows[2][:7] == ["1b" * 6, "tokyo", "tokyo-1", "team/shop", "3", "container", "runc"]
    assert rows[2][-3] == "-"
    assert rows[3][:4] == ["2c" * 6, "osaka", "osaka-1", "hello (unused)"]
    assert rows[3][-3] == "warm"
    assert rows[5] == ["DC", "NODE", "USED", "QUOTA", "IN MEMORY", "MAY BE"]
    assert rows[6] == ["tokyo", "tokyo-1", "5.0Mi", "1.0Gi", "5B", "10B"]
    ended = tabane("checkpoint", "ls", "--node", "osaka-1", "--json")
    shown = json.loads(ended.out)
    assert [(row["digest"], row["class"]) for row in shown["checkpoints"]] == [(THREE, "container")]
    assert [store["node"] for store in shown["stores"]] == ["osaka-1"]


def test_why_a_node_has_none_is_said(tabane: Run, node: Node) -> None:
    node.stores = [STORES[0] | {"problem": "the key is another one"}]
    ended = tabane("checkpoint", "ls")
    assert ended.code == 0
    assert ended.err == "tabane: checkpoint: tokyo/tokyo-1 has none: the key is another one\n"


def test_what_was_found_damaged_is_said(tabane: Run, node: Node) -> None:
    node.stores = [STORES[0] | {"quarantined": 3}]
    ended = tabane("checkpoint", "ls")
    assert ended.code == 0
    assert ended.err == (
        "tabane: checkpoint: tokyo/tokyo-1 has found damaged ones (3 files): its log/node.log "
        "tells which\n"
    )


@pytest.mark.parametrize(
    ("name", "digests"),
    [
        ("1a1a", {ONE}),
        (ONE, {ONE}),
        (TWO[:20], {TWO}),
        ("hello", {ONE, THREE}),
        ("default/hello", {ONE, THREE}),
        ("team/shop", {TWO}),
        ("abc123", {ONE}),
    ],
)
def test_what_a_checkpoint_may_be_called(name: str, digests: set[str]) -> None:
    assert {row["digest"] for row in find(ROWS, name)} == digests


def test_what_no_checkpoint_or_several_are_called() -> None:
    for name in ("", "-", "1a1", "3333", "shop", "sha256:"):
        with pytest.raises(NotFound, match="no node has a checkpoint"):
            find(ROWS, name)
    rows = [CHECKPOINT | {"digest": "sha256:1234" + end * 60} for end in "ab"]
    with pytest.raises(UsageError, match="several checkpoints: write more of one of 1234aaaa"):
        find(rows, "1234")


def test_inspect_shows_the_latest_where_it_is(tabane: Run, node: Node) -> None:
    shown = json.loads(tabane("checkpoint", "inspect", "hello").out)
    assert (shown["dc"], shown["node"], shown["refusals"]) == ("osaka", "osaka-1", ["it is old"])
    assert node.asked[-1][0] == f"GET /api/v1/checkpoints/{THREE}/description"


def test_rm(tabane: Run, node: Node) -> None:
    ended = tabane("checkpoint", "rm", "hello", "1a1a")
    assert ended.code == 1
    assert ended.out == f"tokyo/tokyo-1: {'1a' * 6} removed (5.0MiB)\n" * 2
    assert "tabane: checkpoint: it is open, for 2\n" in ended.err
    assert "no answer from nara/nara-1" in ended.err
    assert [asked for asked, _ in node.asked if asked.startswith("DEL")] == [
        f"DELETE /api/v1/checkpoints/{ONE}",
        f"DELETE /api/v1/checkpoints/{THREE}",
    ]
    tabane("checkpoint", "rm", "2c2c", "--node", "osaka-1")
    assert node.asked[-1][0] == f"DELETE /api/v1/checkpoints/{THREE}?node=osaka/osaka-1"


def test_gc(tabane: Run, node: Node) -> None:
    ended = tabane("checkpoint", "gc", "-n", "--node", "osaka-1")
    assert f"tokyo/tokyo-1: {'1a' * 6} would be removed (5.0MiB)" in ended.out
    assert node.asked[-1] == (
        "POST /api/v1/checkpoints/gc",
        {"dry_run": True, "node": "osaka/osaka-1"},
    )
    node.removed = []
    assert tabane("checkpoint", "gc").out == "nothing removed\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "checkpoint:"),
        ("make x", "ACTION: 'make' is none of ls, inspect, rm, gc"),
        ("rm", "write: tabane checkpoint rm CHECKPOINT..."),
        ("inspect a b", "write: tabane checkpoint inspect CHECKPOINT"),
        ("ls x", "write: tabane checkpoint ls"),
        ("rm 1a1a -n", "rm has no option --dry-run"),
    ],
)
def test_bad_lines(tabane: Run, node: Node, line: str, words: str) -> None:
    check_refusal(tabane("checkpoint", *line.split()), 2, "tabane: ", words)


@pytest.mark.parametrize("line", ["ls --node mars", "rm 1a1a --node mars", "gc --node mars"])
def test_nodes_that_are_not_there(tabane: Run, node: Node, line: str) -> None:
    check_refusal(tabane("checkpoint", *line.split()), 1, "there is no node 'mars'")
