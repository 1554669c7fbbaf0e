"""Those who follow events: one that does not read is ended, and harms nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from tabane.api.app import MAX_RECORDS, _follow_events
from tabane.supervise import Supervisor


class Node:
    """What following needs of an agent."""

    def __init__(self) -> None:
        self.followers: set[Callable[[bytes], None]] = set()

    def follow_events(self, take: Callable[[bytes], None]) -> Callable[[], None]:
        self.followers.add(take)
        return lambda: self.followers.discard(take)

    def happened(self, transition: bytes) -> None:
        for follower in tuple(self.followers):
            follower(transition)


async def test_who_does_not_read_is_ended_and_told_why() -> None:
    node = Node()
    lines = _follow_events(node)  # type: ignore[arg-type]
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", anext(lines))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        node.happened(b"first")
        assert await reading == b"first\n"
    for number in range(MAX_RECORDS + 10):
        node.happened(b"%d" % number)
    assert node.followers == set()
    read = [line async for line in lines]
    assert read[:-1] == [b"%d\n" % number for number in range(MAX_RECORDS)]
    last = json.loads(read[-1])
    assert last["error"] == "busy"
    assert "follow anew" in last["message"]
