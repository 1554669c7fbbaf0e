"""What once went wrong, and must not again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tabane.errors import Busy, Closed, Denied
from tabane.middlecon.session import Limits

WEB = "default/web-0123456789ab"


async def back(client):
    """Lose the session, and have it again."""
    connected = asyncio.Event()
    client.on_connected(connected.set)
    client.abort()
    await asyncio.wait_for(connected.wait(), 10)


async def test_a_room_that_is_not_allowed_any_more_locks_out_of_no_other(cluster, tmp_path, caplog):
    await cluster.hub()
    agent, path = await cluster.client("agent"), tmp_path / "web.sock"
    await agent.serve(path, name=WEB, rooms=["a", "b"])
    program = await cluster.client("p", url=f"unix://{path}")
    rooms = {name: await program.join(name) for name in "ab"}
    await agent.serve(path, name=WEB, rooms=["b"])
    await back(program)
    assert (await rooms["b"].say(b"")).acknowledged == ()
    with pytest.raises(Closed, match="not in the room a"):
        await rooms["a"].say(b"")
    with pytest.raises(Denied):
        await program.join("a")
    assert "not in a any more" in caplog.text
    await agent.serve(path, name=WEB, rooms=["a"])
    assert await program.join("a") is rooms["a"]
    assert (await rooms["a"].say(b"")).acknowledged == ()


async def test_a_limit_of_the_hub_locks_out_of_no_other_room(cluster, caplog):
    caplog.set_level(logging.CRITICAL)
    hub = await cluster.hub()
    x = await cluster.client("x")
    rooms = [await x.join(name) for name in "abc"]
    await hub.aclose()
    await cluster.hub(limits=Limits(rooms=2))
    await back(x)
    await rooms[0].cast(b"")
    await rooms[1].cast(b"")
    with pytest.raises(Closed):
        await rooms[2].cast(b"")
    with pytest.raises(Busy):
        await x.join("c")


async def test_the_reason_why_there_is_no_session_is_kept(cluster, eventually, monkeypatch):
    await cluster.hub()
    x = await cluster.client("x")

    async def restore():
        raise Denied("not for you")

    monkeypatch.setattr(x, "restore", restore)
    x.abort()
    await eventually(lambda: x.trouble == "not for you")
