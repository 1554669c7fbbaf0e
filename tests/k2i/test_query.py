"""Rows chosen, grouped, ordered and cut, on one node and joined from several."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tabane.errors import UsageError
from tabane.k2i import Process
from tabane.k2i import query as ask


class Thing(msgspec.Struct, frozen=True):
    dc: str
    node: str
    uid: int
    user: str
    app: str
    pid: int
    name: str
    size: int
    share: float | None = None
    isolation: str = msgspec.field(name="class", default="")


KNOWN = {**ask.PLACE, **ask.OWNER, **ask.SHAPE, **ask.GROUPS}
ROWS = [
    Thing("tokyo", "t1", 0, "root", "", 1, "init", 10, 0.5),
    Thing("tokyo", "t1", 7, "ann", "default/a", 2, "a,b", 30, None, "container"),
    Thing("tokyo", "t1", 7, "ann", "web/a", 3, "c", 20, 1.5, "vm"),
]
OTHERS = [
    Thing("osaka", "o1", 7, "ann", "default/a", 2, "c", 5, 2.0, "container"),
    Thing("osaka", "o1", 0, "root", "", 1, "init", 11, None),
]


def query(**params: str) -> ask.Query:
    return ask.parse_query(params, KNOWN, Thing)


def rows_of(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(data)
    return rows


@pytest.mark.parametrize(
    ("params", "pids"),
    [
        ({}, [1, 2, 3]),
        ({"app": "a"}, [2]),
        ({"app": "a,web/a"}, [2, 3]),
        ({"user": "ann"}, [2, 3]),
        ({"user": "0"}, [1]),
        ({"class": "vm"}, [3]),
        ({"node": "t1"}, [1, 2, 3]),
        ({"node": "tokyo/t1", "pid": "3,1"}, [1, 3]),
        ({"node": "osaka/t1"}, []),
        ({"dc": "osaka"}, []),
        ({"name": "a,b"}, [2]),
        ({"sort": "-size"}, [2, 3, 1]),
        ({"sort": "user,-size"}, [2, 3, 1]),
        ({"sort": "share"}, [1, 3, 2]),
        ({"sort": "-share"}, [3, 1, 2]),
        ({"sort": "-size", "limit": "2"}, [2, 3]),
    ],
)
def test_choosing_and_ordering(params: dict[str, str], pids: list[int]) -> None:
    wanted = query(**params)
    data = ask.arrange(ask.choose(ROWS, wanted.filters), wanted, Thing)
    assert [row["pid"] for row in rows_of(data)] == pids


def test_the_fields_asked_for_in_their_order() -> None:
    wanted = query(fields="pid,class,dc")
    rows = rows_of(ask.arrange(ROWS[1:2], wanted, Thing))
    assert [list(row.items()) for row in rows] == [
        [("pid", 2), ("class", "container"), ("dc", "tokyo")]
    ]


def test_groups_count_and_sum_what_is_known() -> None:
    wanted = query(group="user", sum="size,share")
    rows = rows_of(ask.arrange(ROWS, wanted, Thing))
    assert rows == [
        {"user": "root", "count": 1, "size": 10, "share": 0.5},
        {"user": "ann", "count": 2, "size": 50, "share": 1.5},
    ]


def test_a_sum_of_all() -> None:
    wanted = query(sum="size")
    parts = [ask.arrange(rows, wanted, Thing) for rows in (ROWS, OTHERS)]
    assert rows_of(ask.merge(parts, wanted)) == [{"count": 5, "size": 76}]


def test_several_nodes_answers_are_joined() -> None:
    wanted = query()
    parts = [ask.arrange(rows, wanted, Thing) for rows in (ROWS, [], OTHERS)]
    assert [row["node"] for row in rows_of(ask.merge(parts, wanted))] == ["t1"] * 3 + ["o1"] * 2
    assert ask.merge([], wanted) == b"[]"


def test_groups_of_several_nodes_are_added() -> None:
    wanted = query(group="app", sum="size", sort="-size", limit="2")
    parts = [ask.arrange(rows, query(group="app", sum="size"), Thing) for rows in (ROWS, OTHERS)]
    assert rows_of(ask.merge(parts, wanted)) == [
        {"app": "default/a", "count": 2, "size": 35},
        {"app": "", "count": 2, "size": 21},
    ]


def test_a_limit_holds_for_all_nodes_together() -> None:
    wanted = query(sort="-size", limit="2", fields="size")
    parts = [ask.arrange(rows, wanted, Thing) for rows in (OTHERS, ROWS)]
    assert rows_of(ask.merge(parts, wanted)) == [{"size": 30}, {"size": 20}]


def test_rows_are_sorted_by_what_they_do_not_show() -> None:
    wanted = query(sort="-size", limit="2", fields="pid")
    own, other = (ask.arrange(rows, wanted, Thing) for rows in (ROWS, OTHERS))
    shown = [{"pid": row.pid} for row in sorted(ROWS, key=lambda row: -row.size)]
    assert rows_of(ask.merge([own], wanted)) == shown[:2]
    largest = sorted((*ROWS, *OTHERS), key=lambda row: -row.size)[:2]
    assert rows_of(ask.merge([other, own], wanted)) == [{"pid": row.pid} for row in largest]


def test_a_group_that_one_node_would_cut_off_is_whole_in_the_sum() -> None:
    wanted = query(group="app", sum="size", sort="-size", limit="1")
    parts = [ask.arrange(rows, wanted, Thing) for rows in (ROWS, OTHERS)]
    assert rows_of(ask.merge(parts, wanted)) == [{"app": "default/a", "count": 2, "size": 35}]


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"color": "red"}, "no parameter 'color'"),
        ({"pid": "x"}, "pid: 'x' is no whole number"),
        ({"pid": "1,"}, "pid: a value between two commas is empty"),
        ({"pid": "1" * 30}, "no whole number"),
        ({"pid": ",".join(["1"] * 1001)}, "more than 1000 values"),
        ({"fields": "pid,colour"}, "fields: there is no field colour"),
        ({"fields": "pid,pid"}, "named twice"),
        ({"fields": "-pid"}, "no field"),
        ({"group": "nothing"}, "group: there is no field nothing"),
        ({"group": "app", "sum": "user"}, "sum: user is no number"),
        ({"group": "pid", "sum": "pid"}, "sum: pid is what is grouped by"),
        ({"group": "app", "fields": "pid"}, "not with group"),
        ({"group": "app", "sort": "pid"}, "sort: rows have no pid"),
        ({"sort": "PID"}, "no field's name"),
        ({"limit": "0"}, "limit: 0 is not from 1"),
        ({"limit": "-1"}, "no whole number"),
        ({"limit": "1.5"}, "no whole number"),
        ({"app": ""}, "empty"),
        ({"name": ""}, "name: it is empty"),
    ],
)
def test_what_cannot_be_asked(params: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        query(**params)


def test_a_unit_may_be_left_out() -> None:
    params = {"group": "app", "sum": "rss,cpu_s", "sort": "-rss,app"}
    query = ask.parse_query(params, KNOWN, Process)
    assert query.sums == ("rss_kib", "cpu_s")
    assert query.sort == (("rss_kib", True), ("app", False))
    assert ask.parse_query({"fields": "elapsed,pid"}, KNOWN, Process).fields == ("elapsed_s", "pid")
    for twice in ({"sum": "rss,rss_kib"}, {"sort": "rss,-rss_kib"}):
        with pytest.raises(UsageError, match="named twice, with its unit and without"):
            ask.parse_query(twice, KNOWN, Process)
