"""k2i of several nodes, whose messages go by function calls: what is large, late, lost, and whose
clock is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.clock import SystemClock
from tabane.errors import Busy, NotFound, TabaneError, TimedOut, Unreachable
from tabane.k2i import K2i, Part, ProcessTable, Question, watch
from tabane.k2i import service as k2i_service
from tabane.k2i.procfs import Procfs
from tabane.model import NodeName
from tabane.node import following
from tabane.node import k2i as node_k2i
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node.config import agent_of
from tabane.node.k2i import ClusterK2i, about
from tabane.security.identity import Principal
from tabane.supervise import Later, Supervisor

ROOT = Principal("token")
NODES = [NodeName("tokyo/t1"), NodeName("osaka/o1"), NodeName("nara/n1")]


class OffClock(SystemClock):
    """Wrong by some hours on the wall, like nobody's in between. Its machine was started at another
    time than the others."""

    def __init__(self, off_s: float) -> None:
        self._off_s = off_s
        self.passed_s = 0.0

    def now(self) -> float:
        return super().now() + abs(self._off_s) + self.passed_s

    def wall(self) -> float:
        return super().wall() + self._off_s


class Node:
    """An agent of straw: its table, and its end of the messages."""

    def __init__(self, net: Net, key: NodeName, off_s: float) -> None:
        self.net = net
        self.clock = OffClock(off_s)
        self.tasks = Supervisor(key)
        self.later = Later()
        peers = tuple(SimpleNamespace(key=node) for node in NODES)
        self.config = SimpleNamespace(key=key, cluster=SimpleNamespace(nodes=peers, keys=NODES))
        files = Procfs(keep=50)  # three nodes share this process's open files
        self.table = ProcessTable(key, f"life of {key}", procfs=files, clock=self.clock)
        self.k2i = K2i(self.table, node=key, incarnation=f"life of {key}", clock=self.clock)
        self.k2i.start(self.tasks)
        self.me = self.room = self
        agent: Any = self
        self.cluster_k2i = ClusterK2i(agent)

    async def call(self, member: str, data: bytes, *, timeout_s: float) -> bytes:
        return await self.net.deliver(self, member, data) or b""

    async def send(self, member: str, data: bytes, *, timeout_s: float) -> None:
        await self.net.deliver(self, member, data)

    async def ask(self, data: bytes, *, timeout_s: float) -> Any:
        answers = {}
        for node in self.net.up:
            if node is not self:
                answers[agent_of(node.config.key)] = await node.hear(self, data) or b""
        return SimpleNamespace(answers=answers, acknowledged=tuple(answers))

    say = ask

    async def ask_others(self, data: bytes, timeout_s: float) -> dict[str, bytes]:
        answers: dict[str, bytes] = (await self.ask(data, timeout_s=timeout_s)).answers
        return answers

    async def cast(self, data: bytes) -> None:
        await self.ask(data, timeout_s=1)

    def tell(self, member: str, message: say.Message) -> None:
        self.tasks.start("tell", self.send(member, say.encode(message), timeout_s=1))

    async def hear(self, sender: Node, data: bytes) -> bytes | None:
        name = agent_of(sender.config.key)
        match say.parse(data):
            case wire.AskK2i() as body:
                return await self.cluster_k2i.answer(body)
            case wire.MoreOfK2i(number, offset):
                return self.cluster_k2i.pieces.piece(number, offset)
            case wire.FollowK2i() as body:
                self.cluster_k2i.following.begin(name, body)
            case wire.K2iChanges() as body:
                self.cluster_k2i.following.hear(name, body)
            case wire.UnfollowK2i(key):
                self.cluster_k2i.following.stop(name, key)
        return None

    async def aclose(self) -> None:
        self.later.close()
        await self.tasks.aclose()
        self.k2i.close()
        self.table.close()


class Net:
    """`late_s`: how long messages of changes are on their way, as who gets them sees it."""

    def __init__(self) -> None:
        self.late_s = 0.0
        self.nodes = {key: Node(self, key, off_s) for key, off_s in zip(NODES, OFF_S, strict=True)}
        self.up = list(self.nodes.values())

    async def deliver(self, sender: Node, member: str, data: bytes) -> bytes | None:
        for node in self.up:
            if agent_of(node.config.key) == member:
                if isinstance(say.parse(data), wire.K2iChanges):
                    node.clock.passed_s += self.late_s
                return await node.hear(sender, data)
        raise Unreachable(f"{member} is down")

    def cut(self, key: NodeName) -> Node:
        node = self.nodes[key]
        self.up.remove(node)
        return node


OFF_S = (0.0, 3600.0, -7200.0)


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    for node in net.nodes.values():
        await node.aclose()


def render(net: Net, question: Question, parts: Any, silent: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(k2i_service.render(question, parts, silent, 0.0))
    return answer


async def ask(net: Net, **params: str) -> dict[str, Any]:
    question = Question("processes", params)
    parts, silent = await net.nodes[NODES[0]].cluster_k2i.ask(question, ROOT)
    return render(net, question, parts, silent)


async def test_clocks_that_are_hours_off_confuse_nothing(net: Net) -> None:
    answer = await ask(net, pid=str(os.getpid()))
    rows = answer["processes"]
    assert [row["node"] for row in rows] == ["t1", "o1", "n1"]
    assert len({row["start_ticks"] for row in rows}) == 1
    elapsed = [row["elapsed_s"] for row in rows]
    assert max(elapsed) - min(elapsed) < 60
    assert all(0 <= node["age_s"] < 60 for node in answer["nodes"])
    started = [row["started_at"] - rows[0]["started_at"] for row in rows]
    assert [round(off, -2) for off in started] == list(OFF_S)  # for people only


async def test_who_is_down_is_silent(net: Net) -> None:
    net.cut(NODES[1])
    answer = await ask(net, pid=str(os.getpid()))
    assert answer["silent"] == [NODES[1]]
    assert [row["node"] for row in answer["processes"]] == ["t1", "n1"]
    alone = await ask(net, node="o1")
    assert (alone["silent"], alone["nodes"]) == ([NODES[1]], [])


async def test_without_a_hub_there_is_still_this_node(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(data: bytes, timeout_s: float) -> dict[str, bytes]:
        return {}

    monkeypatch.setattr(net.nodes[NODES[0]], "ask_others", nobody)
    answer = await ask(net, pid=str(os.getpid()))
    assert answer["silent"] == NODES[1:]
    assert [node["node"] for node in answer["nodes"]] == NODES[:1]


async def test_its_own_slowness_hides_no_other_node(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def part(question: Question, who: Principal) -> Any:
        raise TimedOut("processes could not be read within 10 s")

    monkeypatch.setattr(net.nodes[NODES[0]].k2i, "part", part)
    answer = await ask(net, pid=str(os.getpid()))
    assert answer["silent"] == NODES[:1]
    assert [node["node"] for node in answer["nodes"]] == NODES[1:]


async def test_what_waits_for_others_is_older_for_it(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = net.nodes[NODES[0]]
    waited = node.ask_others

    async def late(data: bytes, timeout_s: float) -> dict[str, bytes]:
        answers = await waited(data, timeout_s)
        node.clock.passed_s += timeout_s
        return answers

    monkeypatch.setattr(node, "ask_others", late)
    answer = await ask(net, pid=str(os.getpid()))
    assert [node_k2i.ASK_S <= part["age_s"] < 60 for part in answer["nodes"]] == [True] * 3


async def test_an_answer_of_many_messages_is_put_together(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_k2i, "PIECE_BYTES", 700)
    whole = await ask(net)
    monkeypatch.undo()
    pids = {(row["node"], row["pid"]) for row in whole["processes"]}
    assert whole["silent"] == []
    assert {(node, os.getpid()) for node in ("t1", "o1", "n1")} <= pids


async def test_a_node_that_ends_within_its_answer_is_silent(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_k2i, "PIECE_BYTES", 700)
    osaka = net.nodes[NODES[1]]

    def gone(number: int, offset: int) -> bytes:
        raise NotFound("started anew")

    monkeypatch.setattr(osaka.cluster_k2i.pieces, "piece", gone)
    answer = await ask(net)
    assert answer["silent"] == [NODES[1]]


async def test_what_is_kept_is_bounded(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_k2i, "PIECE_BYTES", 100)
    monkeypatch.setattr(node_k2i, "MOST_KEPT_BYTES", 5000)
    pieces = net.nodes[NODES[0]].cluster_k2i.pieces
    large = random.Random(1).randbytes(2000)
    cut = [pieces.cut(Part("", "", 0.0, large)) for _ in range(4)]
    assert all(part.more and part.size > 2000 for part in cut)
    assert pieces.piece(cut[-1].more, 100)
    with pytest.raises(NotFound, match="ask again"):
        pieces.piece(cut[0].more, 100)


def test_which_nodes_a_question_is_about() -> None:
    def of(**params: str) -> list[NodeName]:
        return about(Question("processes", params), NODES)

    assert of() == NODES
    assert of(dc="osaka,nara") == NODES[1:]
    assert of(node="t1") == of(node="tokyo/t1") == NODES[:1]
    assert of(dc="osaka", node="t1") == []
    for name in ("osaka/t1", "t1,nope"):
        with pytest.raises(NotFound, match=r"there is no node '.*', only tokyo/t1, osaka/o1"):
            of(node=name)
    with pytest.raises(NotFound, match="there is no data center 'nope', only tokyo, osaka, nara"):
        of(dc="nope,tokyo")


async def follow(net: Net, **params: str) -> Any:
    return net.nodes[NODES[0]].cluster_k2i.follow(Question("changes", params), ROOT)


def said(event: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(event.data)
    return data


async def test_changes_of_all_nodes(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PIECE_BYTES", 200)
    async with aclosing(await follow(net, pid=str(os.getpid()))) as events:
        first = [said(await anext(events)) for _ in NODES]
        assert {data["node"] for data in first} == set(NODES)
        assert all(data["first"] and data["born"][0]["pid"] == os.getpid() for data in first)
        assert all(0 <= data["age_s"] < 60 for data in first)


async def test_a_user_follows_only_so_often(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_OF_ONE", 1)
    tokyo, ann = net.nodes[NODES[0]].cluster_k2i, Principal("peer", 54001)
    async with aclosing(tokyo.follow(Question("changes"), ann)) as events:
        await anext(events)
        with pytest.raises(Busy, match="you follow 1 times already"):
            await anext(tokyo.follow(Question("changes"), ann))


async def test_a_node_that_tells_no_more_is_said_to_be_silent(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MOST_OF_ONE", 1)
    tokyo, osaka = (net.nodes[node] for node in NODES[:2])
    question, ann = Question("changes", {"pid": str(os.getpid())}), Principal("peer", 54001)
    async with aclosing(osaka.k2i.follow(question, ann)) as first:
        await anext(first)
        async with aclosing(tokyo.cluster_k2i.follow(question, ann)) as events:
            assert await until(events, "silent") == {"node": NODES[1]}
            await first.aclose()
            tokyo.cluster_k2i.following.on_presence(agent_of(NODES[1]), came=True)
            assert (await until(events, "changes", NODES[1]))["first"]


async def test_changes_that_were_long_on_their_way_are_as_old(net: Net) -> None:
    net.late_s = 500.0
    async with aclosing(await follow(net, pid=str(os.getpid()))) as events:
        for _ in range(2):
            assert (await until(events, "changes", NODES[1]))["age_s"] >= 500


async def test_a_node_that_goes_is_said_to_once_and_begins_anew(net: Net) -> None:
    tokyo = net.nodes[NODES[0]]
    async with aclosing(await follow(net, pid=str(os.getpid()))) as events:
        for _ in NODES:
            await anext(events)
        osaka = net.cut(NODES[1])
        for _ in range(2):
            tokyo.cluster_k2i.following.on_presence(agent_of(NODES[1]), came=False)
        assert await until(events, "silent") == {"node": NODES[1]}
        osaka.cluster_k2i.following.on_presence(agent_of(NODES[0]), came=False)
        net.up.append(osaka)
        tokyo.cluster_k2i.following.on_presence(agent_of(NODES[1]), came=True)
        assert (await until(events, "changes", NODES[1]))["first"]


async def until(events: Any, name: str, node: str = "") -> dict[str, Any]:
    async for event in events:
        if event.name == name and node in ("", said(event)["node"]):
            return said(event)
    raise AssertionError(f"the stream ended before {name} {node}")


async def test_who_follows_no_more_is_told_nothing(net: Net) -> None:
    osaka = net.nodes[NODES[1]].cluster_k2i.following
    events = await follow(net)
    await anext(events)
    sending = list(osaka._sending.values())
    assert sending
    await events.aclose()
    with pytest.raises(NotFound):
        net.nodes[NODES[0]].cluster_k2i.following.hear("x/agent", wire.K2iChanges("none", b"{}"))
    async with asyncio.timeout(60):
        await asyncio.gather(*(each.task for each in sending), return_exceptions=True)
    assert not osaka._sending


async def test_a_node_that_ends_tells_its_followers(net: Net) -> None:
    events = await follow(net)
    await anext(events)
    net.nodes[NODES[0]].k2i.close()
    with pytest.raises(TabaneError):
        async for _ in events:
            pass
