"""A hub is killed and started again, with links and members on all sides: everybody is back."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests.middlecon.conftest import until

from tabane.middlecon import Client, Hub
from tabane.middlecon.client import connect
from tabane.middlecon.linking import Peer

HUBS = {"a1": "a", "b1": "b", "b2": "b", "c1": "c"}
"""By data center: `b1` is linked to all others, `b2` to it alone, and `c1` by `b1` or `a1`."""
PER_HUB = 3


class Machines:
    """Hubs that can die as a killed process does, while what listens for them stays open."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.hubs: dict[str, Hub] = {}
        self.members: list[Client] = []

    def url(self, name: str) -> str:
        return f"unix://{self._directory}/{name}"

    async def start(self, name: str) -> None:
        hub = Hub(name, listen=[self.url(name)], datacenter=HUBS[name])
        self.hubs[name] = await self._stack.enter_async_context(hub)

    def link(self, name: str) -> None:
        """As the nodes of a cluster do: dial those of one's own data center and of earlier ones."""
        before = [n for n in HUBS if HUBS[n] < HUBS[name] or (HUBS[n] == HUBS[name] and n != name)]
        after = [n for n in HUBS if n not in (name, *before)]
        peers = [Peer(n, self.url(n), HUBS[n]) for n in before] + [Peer(n) for n in after]
        self.hubs[name].set_peers(peers)

    async def kill(self, name: str) -> None:
        """No goodbye: all its connections are reset at once."""
        hub = self.hubs.pop(name)
        hub._closing = True
        for wire in list(hub._guests):
            wire.transport.abort()
        await hub.aclose()

    async def connect(self, name: str, hub: str) -> None:
        member = await connect(self.url(hub), name=name)
        self.members.append(await self._stack.enter_async_context(member))
        (await member.join("r")).on_message(lambda message: member.name.encode())

    def _known_at(self, hub: Hub) -> dict[str, str]:
        members = hub._directory.members.values()
        return {member.name: member.hub for member in members if member.port is not None}

    async def everybody_is_back(self) -> None:
        """All sessions are there, all hubs know of all, and each member hears from all others."""
        where = {member.name: member.name.partition("/")[0] for member in self.members}
        await until(lambda: all(member.connected and member._numbered for member in self.members))
        await until(lambda: all(self._known_at(hub) == where for hub in self.hubs.values()))
        for member in self.members:
            room = member._rooms["r"]
            await until(lambda room=room: set(room.members) == set(where))
            await until(lambda room=room: all(info.known for info in room.members.values()))
            answers = (await room.ask(b"", timeout_s=5.0)).answers
            assert answers == {name: name.encode() for name in where if name != member.name}


@pytest.fixture
async def machines(tmp_path: Path):
    async with AsyncExitStack() as stack:
        made = Machines(tmp_path, stack)
        for hub in HUBS:
            await made.start(hub)
        for hub in HUBS:
            made.link(hub)
        for hub, number in itertools.product(HUBS, range(PER_HUB)):
            await made.connect(f"{hub}/{number}", hub)
        await made.everybody_is_back()
        yield made


@pytest.mark.parametrize("links_first", [True, False], ids=["links first", "members first"])
@pytest.mark.parametrize("killed", HUBS)
async def test_all_are_back_after_a_hub_was_killed(machines, killed, links_first):
    own = [member for member in machines.members if member.hub == killed]
    for _ in range(3):
        await machines.kill(killed)
        await until(lambda: not any(member.connected for member in own))
        await machines.start(killed)
        if not links_first:
            await until(lambda: all(member.connected for member in own))
        machines.link(killed)
        await machines.everybody_is_back()


@pytest.mark.parametrize("order", [*itertools.permutations(("a1", "b1", "c1"))], ids="-".join)
async def test_all_are_back_after_hubs_died_in_turn(machines, order):
    """Each while the one before is not back, or just so."""
    for hub in order:
        await machines.kill(hub)
        if hub == order[1]:
            await machines.start(order[0])
            machines.link(order[0])
    for hub in order[1:]:
        await machines.start(hub)
        machines.link(hub)
    await machines.everybody_is_back()


@pytest.mark.parametrize("turns", range(12))
async def test_a_hub_that_dies_again_while_all_come_back(machines, turns):
    """After so many turns of the loop: while members are welcomed, let into rooms, links open."""
    await machines.kill("b1")
    await machines.start("b1")
    machines.link("b1")
    await until(lambda: machines.hubs["b1"]._directory.sessions)
    for _ in range(turns):
        await asyncio.sleep(0)
    await machines.kill("b1")
    await machines.start("b1")
    machines.link("b1")
    await machines.everybody_is_back()


async def test_links_of_others_outlive_the_return_of_a_hub(machines):
    """It may dial a far hub before its neighbour is there, which has a link there already."""
    await machines.kill("b2")
    links = machines.hubs["b1"]._directory.links
    await until(lambda: "a1" in links)
    before = links["a1"]
    for _ in range(5):
        await machines.start("b2")
        machines.link("b2")
        await machines.everybody_is_back()
        await until(lambda: links.keys() >= {"a1", "b2"})
        assert links["a1"] is before
        await machines.kill("b2")


async def test_a_session_lost_as_soon_as_it_is_restored_is_not_told_as_there(machines):
    member, told, restores = machines.members[0], [], []
    restore = member.restore

    async def restore_and_lose() -> None:
        await restore()
        restores.append(1)
        if len(restores) == 1:
            member.abort()

    member.restore = restore_and_lose
    member.on_connected(lambda: told.append(member.connected))
    member.abort()
    await until(lambda: told)
    assert told == [True] and len(restores) == 2
