"""What there is to know of one app, asked of all nodes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from tabane import spec
from tabane.api import actions
from tabane.model import AppName, Generation, Instance, InstanceId, NodeName, State, Volume
from tabane.node import messages as say

APP = spec.parse_app('name = "hello"\nimage = "host"\ncommand = ["true"]\n')


async def test_a_dead_node_costs_its_deadline_once() -> None:
    """All is asked at once: nobody answers before all four questions are there."""
    asked = asyncio.Event()
    questions: list[Any] = []

    async def ask_all(question: Any, timeout_s: float) -> Any:
        questions.append(question)
        if len(questions) == 4:
            asked.set()
        await asked.wait()
        return SimpleNamespace(by_node={}, silent=(f"nara/nara-{len(questions)}",))

    cluster = SimpleNamespace(datacenters=lambda: ["tokyo"])
    agent: Any = SimpleNamespace(
        app=lambda key: APP, ask_all=ask_all, config=SimpleNamespace(cluster=cluster)
    )
    async with asyncio.timeout(60):
        shown = await actions.show(agent, "default/hello")
    assert shown["silent"] == ["nara/nara-4"]


def _made_at(name: str, created_at: float) -> Instance:
    node, identity = NodeName(f"nara/{name}"), InstanceId(name)
    generation = Generation("first", identity, 1)
    app = AppName("default/hello")
    return Instance(identity, app, 1, node, generation, State.READY, created_at=created_at)


async def test_ages_are_by_the_clocks_of_the_nodes() -> None:
    """Though one is an hour ahead of the other."""
    one, two = _made_at("one", 5000.0), _made_at("two", 8600.0)
    told = {one.node: say.Instances((one,), 5060.0), two.node: say.Instances((two,), 8690.0)}

    async def ask_all(question: Any, timeout_s: float) -> Any:
        asks = isinstance(question, say.AskInstances)
        answers = {node: say.encode(answer) for node, answer in told.items()} if asks else {}
        return SimpleNamespace(by_node=answers, silent=())

    cluster = SimpleNamespace(datacenters=lambda: ["nara"])
    agent: Any = SimpleNamespace(
        app=lambda key: APP, ask_all=ask_all, config=SimpleNamespace(cluster=cluster)
    )
    shown = await actions.show(agent, "default/hello")
    assert [(row["id"], row["age_s"]) for row in shown["instances"]] == [("one", 60), ("two", 90)]


def test_an_app_with_volumes_says_where_they_are() -> None:
    pinned = replace(APP, volumes=(Volume("data", "/srv"),), pinned_to=NodeName("nara/nara-1"))
    shown = actions.describe_app(pinned)
    assert shown["volumes"] == [{"name": "data", "path": "/srv", "size": "1GiB"}]
    assert shown["volumes_on"] == "nara/nara-1"
    assert "volumes_on" not in actions.describe_app(APP)
