"""Without a session with its hub an agent knows of nobody else, and says so."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.api.actions import describe_node
from tabane.api.deploying import remove
from tabane.clock import SYSTEM
from tabane.errors import Closed, NotFound
from tabane.middlecon.receipts import Replies
from tabane.middlecon.views import MemberInfo
from tabane.model import App, AppName
from tabane.node import messages as say
from tabane.node.agent import Agent
from tabane.node.config import agent_of
from tabane.node.gateways import Gateways
from tabane.node.session import HubSession
from tabane.node.spreading import spread
from tabane.security.identity import Principal

TOKYO, OSAKA = "tokyo/tokyo-1", "osaka/osaka-1"
FOREVER_S = 3600.0


SEEN = {
    name: MemberInfo(name, name.rpartition("/")[0])
    for name in (agent_of(TOKYO), agent_of(OSAKA), f"{TOKYO}/gateway-0")
}


class Room(SimpleNamespace):
    """Osaka's agent answers `answer`; the session is lost when that is an error."""

    async def ask(self, data: bytes, *, timeout_s: float) -> Replies:
        if isinstance(self.answer, Exception):
            raise self.answer
        return Replies(answers={agent_of(OSAKA): self.answer})


def make_agent(answer: bytes | Exception = b"", mine: bytes = b"") -> Any:
    async def answer_itself(sender: str, body: say.Message) -> bytes:
        return mine

    peers = [SimpleNamespace(key=node) for node in (TOKYO, OSAKA)]
    keys = (TOKYO, OSAKA)
    cluster = SimpleNamespace(nodes=peers, keys=keys, datacenters=lambda: ("tokyo", "osaka"))
    agent: Any = SimpleNamespace(
        session=HubSession(SYSTEM),
        config=SimpleNamespace(key=TOKYO, cluster=cluster, gateways=1, incarnation="first"),
        room=Room(answer=answer, members=SEEN),
        me=SimpleNamespace(name=agent_of(TOKYO)),
        answers=SimpleNamespace(answer=answer_itself),
        nodes=SimpleNamespace(live_nodes=lambda: [TOKYO, OSAKA]),
        audit=SimpleNamespace(add=lambda line: None),
        clock=SYSTEM,
        lag=SimpleNamespace(behind=lambda node: 0),
        replica=SimpleNamespace(revision=1),
    )
    for name in ("ask_all", "ask_others", "_ask_itself"):
        setattr(agent, name, getattr(Agent, name).__get__(agent))
    return agent


async def test_a_session_that_was_lost_just_so_is_waited_for():
    session = HubSession(SYSTEM)
    waiting = asyncio.create_task(session.wait(FOREVER_S))
    await asyncio.sleep(0)
    assert not session.is_open and not waiting.done()
    session.on_open()
    await waiting
    await session.wait(0.0)


async def test_one_that_is_not_back_in_time_is_waited_for_no_more():
    session = HubSession(SYSTEM)
    session.on_open()
    session.on_lost()
    with pytest.raises(Closed, match="no session with the hub"):
        await session.wait(0.0)


async def test_a_question_reaches_the_others_once_the_hub_is_back():
    agent = make_agent(answer=b"there", mine=b"here")
    asking = asyncio.create_task(agent.ask_all(say.AskInstances(), FOREVER_S))
    await asyncio.sleep(0)
    assert not asking.done()
    agent.session.on_open()
    assert await asking == ({TOKYO: b"here", OSAKA: b"there"}, ())


async def test_without_a_hub_the_others_are_silent():
    answers = await make_agent(mine=b"here").ask_all(say.AskInstances(), 0.0)
    assert answers == ({TOKYO: b"here"}, (OSAKA,))


async def test_a_session_lost_while_all_are_asked_makes_the_others_silent():
    agent = make_agent(answer=Closed("lost"), mine=b"here")
    agent.session.on_open()
    assert await agent.ask_all(say.AskInstances(), 1.0) == ({TOKYO: b"here"}, (OSAKA,))


async def test_this_node_is_silent_if_it_takes_too_long():
    agent = make_agent(answer=b"there")
    agent.session.on_open()

    async def never(sender: str, body: say.Message) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    agent.answers.answer = never
    assert await agent.ask_all(say.AskInstances(), 0.0) == ({OSAKA: b"there"}, (TOKYO,))


async def removed(agent: Any) -> dict[str, Any]:
    async def control(request: say.Message) -> say.Deployed:
        return say.Deployed(App("x", "host"), 7)

    agent.control = control
    return await remove(agent, Principal("token"), "default/x")


async def test_what_was_stored_is_no_failure_when_nobody_can_be_told():
    agent = make_agent(answer=Closed("lost"), mine=say.encode(say.to_failure(Closed("lost"))))
    agent.session.on_open()
    assert await removed(agent) == {
        "name": AppName("default/x"),
        "known": [],
        "unreachable": ["osaka", "tokyo"],
    }


async def test_who_answers_with_a_failure_does_not_know():
    agent = make_agent(answer=say.encode(say.to_failure(Closed("lost"))))
    agent.session.on_open()
    told = await removed(agent)
    assert (told["known"], told["unreachable"]) == (["tokyo"], ["osaka"])


async def test_a_node_without_a_hub_is_not_whole_whatever_it_saw_last():
    agent = make_agent()
    assert not describe_node(agent)["whole"]
    agent.session.on_open()
    assert describe_node(agent)["whole"]
    agent.session.on_lost()
    assert not describe_node(agent)["whole"]


@pytest.mark.parametrize("part", SEEN)
async def test_a_node_that_does_not_see_all_is_not_whole(part):
    agent = make_agent()
    agent.session.on_open()
    agent.room.members = {name: info for name, info in SEEN.items() if name != part}
    assert not describe_node(agent)["whole"]
    agent.room.members = SEEN | {part: MemberInfo(part, "x", known=False)}
    assert not describe_node(agent)["whole"]


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("error", [Closed("its session ended"), NotFound("no such member")])
async def test_gateways_that_serve_on_by_what_they_were_told_are_not_taken_for_told(error, is_open):
    async def send(member: str, data: bytes) -> None:
        raise error

    agent = make_agent()
    agent.send = send
    gateways = Gateways(agent)
    gateways._greeted.add(f"{TOKYO}/gateway-0")
    if is_open:
        agent.session.on_open()
    if isinstance(error, Closed) and not is_open:
        with pytest.raises(Closed):
            await gateways.wait_told()
    else:
        await gateways.wait_told()


@pytest.mark.parametrize("is_open", [True, False])
async def test_shares_are_not_moved_by_who_sees_only_itself(is_open):
    spreads = []

    async def store(datacenters, ready):
        spreads.append(datacenters)

    agent = make_agent()
    agent.replica.range = lambda prefix: []
    if is_open:
        agent.session.on_open()
    await spread(agent, SimpleNamespace(spread=store))
    assert spreads == ([["osaka", "tokyo"]] if is_open else [])
