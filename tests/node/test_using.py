"""A command, a copy or a terminal holds its instance, wherever the app's home is."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.gateway.messages import StillUsed
from tabane.model import AppName, Generation, Instance, InstanceId, NodeName, State
from tabane.node.config import agent_of
from tabane.node.using import AGAIN_S, FOR_S, keep_in_use
from tabane.testing.clock import VirtualClock

OWN, OTHER = NodeName("tokyo/tokyo-1"), NodeName("tokyo/tokyo-2")
ID, APP = InstanceId("a"), AppName("default/web")
INSTANCE = Instance(ID, APP, 1, OWN, Generation("one", ID, 1), State.READY, driver="fake")


@pytest.mark.parametrize("home", [OWN, OTHER])
async def test_the_home_is_told_again_and_again_until_it_ends(home: NodeName) -> None:
    clock, told = VirtualClock(), asyncio.Queue[tuple[str, Any]]()
    held: list[Any] = []
    agent: Any = SimpleNamespace(
        clock=clock,
        watching=SimpleNamespace(resources=SimpleNamespace(in_use=lambda _: nullcontext())),
        executor=SimpleNamespace(
            runs=lambda instance: instance == ID,
            get=lambda _: SimpleNamespace(instance=INSTANCE),
            freezer=SimpleNamespace(hold=held.append),
        ),
        config=SimpleNamespace(key=OWN),
        nodes=SimpleNamespace(is_home=lambda app: home == OWN, home_of=lambda app: home),
        home=SimpleNamespace(hear=lambda *said: told.put_nowait(said)),
        tell=lambda *said: told.put_nowait(said),
    )
    task = asyncio.create_task(keep_in_use(agent, ID))
    for _ in range(3):
        assert await told.get() == (agent_of(home), StillUsed(APP, ID, -FOR_S))
        await asyncio.sleep(0)
        clock.advance(AGAIN_S)
    assert len(held) == 3
    task.cancel()
    await asyncio.wait({task})
    clock.advance(2 * AGAIN_S)
    assert told.empty()
