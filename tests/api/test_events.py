"""Those who follow events: one that does not read is ended, and harms nobody."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from tabane.api.app import MAX_RECORDS, _follow_events
from tabane.node.happenings import Happenings
from tabane.supervise import Supervisor


async def test_who_does_not_read_is_ended_and_told_why() -> None:
    agent: Any = SimpleNamespace()
    happenings = agent.happenings = Happenings(agent)
    lines = _follow_events(agent, around=False)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", anext(lines))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        happenings.tell(b"first")
        assert await reading == b"first\n"
    for number in range(MAX_RECORDS + 10):
        happenings.tell(b"%d" % number)
    assert happenings._followers == set()
    read = [line async for line in lines]
    assert read[:-1] == [b"%d\n" % number for number in range(MAX_RECORDS)]
    last = json.loads(read[-1])
    assert last["error"] == "busy"
    assert "follow anew" in last["message"]
