"""`/v2` as HTTP has it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from tests.api.conftest import Api

from tabane.k2i import Part, Question
from tabane.k2i.v2 import Gathered
from tabane.security.identity import Principal


async def test_the_processes_of_this_node(api: Api) -> None:
    said = (await api.ask("GET", "/v2/processes")).json()
    assert list(said) == ["processes", "nodes", "silent", "at"]
    (node,) = said["nodes"]
    assert (node["node"], node["incarnation"]) == ("tokyo/tokyo-1", "first")
    assert 0 <= node["age_s"] < 60
    assert said["silent"] == []
    me = next(row for row in said["processes"] if row["pid"] == os.getpid())
    assert (me["dc"], me["node"], me["uid"]) == ("tokyo", "tokyo-1", os.geteuid())


async def test_one_process_with_the_fields_asked_for(api: Api) -> None:
    said = (await api.ask("GET", f"/v2/processes?pid={os.getpid()}&fields=pid,ppid,node")).json()
    assert said["processes"] == [{"pid": os.getpid(), "ppid": os.getppid(), "node": "tokyo-1"}]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("colour=red", "there is no parameter 'colour' here"),
        ("pid=1&pid=2", "pid is given twice"),
        ("scope=world", "scope: 'world' is neither node nor cluster"),
        ("pid=one", "pid: 'one' is no whole number"),
        ("scope=cluster", "belongs to no cluster"),
    ],
)
async def test_what_cannot_be_asked(api: Api, query: str, sentence: str) -> None:
    answer = await api.ask("GET", f"/v2/processes?{query}")
    assert (answer.status, answer.json()["error"]) == (400, "usage")
    assert sentence in answer.json()["message"]


async def test_the_cluster_is_asked_once_and_who_is_silent_is_named(api: Api) -> None:
    asked: list[Any] = []

    class Cluster:
        async def ask(self, question: Question, who: Principal) -> Gathered:
            asked.append((question, who.kind))
            parts: Sequence[Part] = [
                Part("tokyo/tokyo-1", "a", 0.1, b'[{"pid":1}]'),
                Part("osaka/osaka-1", "b", 0.3, b'[{"pid":2}]'),
            ]
            return Gathered(parts, ["nara/nara-1"])

    api = Api(api.agent.table, Cluster())
    try:
        said = (await api.ask("GET", "/v2/processes?scope=cluster&app=hello")).json()
    finally:
        api.agent.k2i.close()
    assert asked == [(Question("processes", {"app": "hello"}), "token")]
    assert said["processes"] == [{"pid": 1}, {"pid": 2}]
    assert [(node["node"], node["age_s"]) for node in said["nodes"]] == [
        ("tokyo/tokyo-1", 0.1),
        ("osaka/osaka-1", 0.3),
    ]
    assert said["silent"] == ["nara/nara-1"]
