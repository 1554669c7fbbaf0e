"""What there is to know of one app, asked of all nodes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from tabane import spec
from tabane.api import actions
from tabane.model import NodeName, Volume

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
    async with asyncio.timeout(30):
        shown = await actions.show(agent, "default/hello")
    assert shown["silent"] == ["nara/nara-4"]


def test_an_app_with_volumes_says_where_they_are() -> None:
    pinned = replace(APP, volumes=(Volume("data", "/srv"),), pinned_to=NodeName("nara/nara-1"))
    shown = actions.describe_app(pinned)
    assert shown["volumes"] == [{"name": "data", "path": "/srv", "size": "1GiB"}]
    assert shown["volumes_on"] == "nara/nara-1"
    assert "volumes_on" not in actions.describe_app(APP)
