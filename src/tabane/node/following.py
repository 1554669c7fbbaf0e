"""What changes among the processes of all nodes, for those who follow it at one of them.

Who follows has all agents told so (`FollowK2i`), again every few seconds, so that nodes that come
later begin by themselves. Each node sends its messages to the agent that asked, each when the one
before was taken: so nothing waits between the nodes, who reads too slowly is noticed where it is
read, and a node whose messages are not taken any more ends.

How long a message was on its way nobody can say, for two machines' clocks are not compared. But it
was made so long after a request was heard, by the clock of who made it; and that was not heard
before it was sent, by the clock of who reads. So an age is never told too small, and too large by
no more than the request was on its way.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from tabane.errors import Closed, NotFound, TabaneError, Unavailable
from tabane.k2i.service import Question
from tabane.k2i.stream import Event
from tabane.k2i.watch import Outbox, check_room, user_of
from tabane.model import NodeName
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node.config import agent_of, node_of
from tabane.security.identity import Principal

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

RENEW_S = 5.0
ASK_S = 2.0
TAKE_S = 10.0
"""How long a message may take to be taken."""
PIECE_BYTES = 900 << 10


@dataclass
class _Follow:
    """One who follows here. `pieces`: of a node's message that has not all come."""

    message: wire.FollowK2i
    outbox: Outbox
    heard: set[NodeName] = field(default_factory=set)
    silent: set[NodeName] = field(default_factory=set)
    pieces: dict[str, bytes] = field(default_factory=dict)


@dataclass
class _Sending:
    """To one who follows elsewhere: their last request, and when it was heard."""

    message: wire.FollowK2i
    heard_at: float
    task: asyncio.Task[None] | None = None


class Following:
    """Both ends: those who follow here, and what is sent from here to others."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._follows: dict[str, _Follow] = {}
        self._sending: dict[tuple[str, str], _Sending] = {}

    # Those who follow here

    async def follow(self, question: Question, who: Principal) -> AsyncGenerator[Event, None]:
        """See `tabane.k2i.v2.Cluster`."""
        agent = self._agent
        check_room([user_of(follow.message.who) for follow in self._follows.values()], who)
        message = wire.FollowK2i(uuid.uuid4().hex, question, who)
        follow = _Follow(message, Outbox(agent.clock))
        self._follows[message.key] = follow
        tasks = [
            agent.tasks.start(f"follow own {message.key}", self._follow_own(follow)),
            agent.tasks.start(f"follow {message.key}", self._renew(follow)),
        ]
        try:
            async for event in follow.outbox:
                yield event
        finally:
            for task in tasks:
                task.cancel()
            del self._follows[message.key]
            agent.tasks.start(f"unfollow {message.key}", self._unfollow(message.key))

    async def _follow_own(self, follow: _Follow) -> None:
        message = follow.message
        try:
            async with aclosing(self._agent.k2i.follow(message.question, message.who)) as events:
                async for _, data in events:
                    follow.outbox.put(self._agent.clock.now(), data)
        except TabaneError as error:
            follow.outbox.end(error)

    async def _renew(self, follow: _Follow) -> None:
        while True:
            reached = await self._reach(say.encode(self._request(follow)))
            for peer in self._agent.config.cluster.nodes:
                if peer.key != self._agent.config.key and agent_of(peer.key) not in reached:
                    self._miss(follow, peer.key)
            await asyncio.sleep(RENEW_S)

    def _request(self, follow: _Follow) -> wire.FollowK2i:
        return replace(follow.message, asked_at=self._agent.clock.now())

    async def _reach(self, data: bytes) -> set[str]:
        try:
            receipt = await self._agent.room.say(data, timeout_s=ASK_S)
        except (Closed, Unavailable) as error:
            log.info("no other node could be asked what changes there: %s", error)
            return set()
        return set(receipt.acknowledged)

    async def _unfollow(self, key: str) -> None:
        try:
            await self._agent.room.cast(say.encode(wire.UnfollowK2i(key)))
        except Closed:
            log.info("no hub session: the others notice by themselves that %s is over", key)

    def on_presence(self, member: str, *, came: bool) -> None:
        """An agent came, or went, or cannot be seen."""
        node = node_of(member)
        if member != agent_of(node) or node == self._agent.config.key:
            return
        for follow in self._follows.values():
            if came:
                self._agent.tell(member, self._request(follow))
            else:
                self._miss(follow, node)
        if not came:
            for sender, key in tuple(self._sending):
                if sender == member:
                    self.stop(sender, key)

    def _miss(self, follow: _Follow, node: NodeName) -> None:
        """Say once that nothing is heard of it, until something is."""
        if node not in follow.silent:
            follow.silent.add(node)
            follow.pieces.pop(agent_of(node), None)
            data = msgspec.json.encode({"node": node})
            follow.outbox.put(self._agent.clock.now(), data, "silent")

    def hear(self, sender: str, message: wire.K2iChanges) -> None:
        """Raises `NotFound` when nobody here follows any more."""
        follow = self._follows.get(message.key)
        if follow is None or follow.outbox.ended:
            raise NotFound(f"nobody at {self._agent.config.key} follows {message.key} any more")
        if message.ended:
            self._miss(follow, node_of(sender))
            return
        whole = follow.pieces.pop(sender, b"") + message.data
        if message.more:
            follow.pieces[sender] = whole
            return
        follow.silent.discard(node_of(sender))
        right_at = message.asked_at + message.after_s
        follow.outbox.put(min(right_at, self._agent.clock.now()), whole)

    # What is sent from here

    def begin(self, sender: str, message: wire.FollowK2i) -> None:
        """Send from now on, or go on. It ends by itself when a message is not taken, and there is
        one at least every few seconds."""
        place, now = (sender, message.key), self._agent.clock.now()
        sending = self._sending.get(place)
        if sending is not None:
            sending.message, sending.heard_at = message, now
            return
        sending = self._sending[place] = _Sending(message, now)
        sending.task = self._agent.tasks.start(f"changes for {sender}", self._send(sender, sending))
        sending.task.add_done_callback(lambda _: self._forget(place, sending))

    def _forget(self, place: tuple[str, str], sending: _Sending) -> None:
        if self._sending.get(place) is sending:
            del self._sending[place]

    def stop(self, sender: str, key: str) -> None:
        """Idempotent."""
        sending = self._sending.pop((sender, key), None)
        if sending is not None and sending.task is not None:
            sending.task.cancel()

    async def _send(self, sender: str, sending: _Sending) -> None:
        """Until it is stopped, or not taken."""
        question, who = sending.message.question, sending.message.who
        try:
            async with aclosing(self._agent.k2i.follow(question, who)) as events:
                async for _, data in events:
                    await self._send_whole(sender, sending, data)
        except TabaneError as error:
            log.info("%s is told no more of what changes here: %s", sender, error)
            ended = wire.K2iChanges(sending.message.key, b"", ended=True)
            with suppress(TabaneError):  # it may be that which is gone
                await self._agent.me.send(sender, say.encode(ended), timeout_s=TAKE_S)

    async def _send_whole(self, sender: str, sending: _Sending, data: bytes) -> None:
        request, after_s = sending.message, self._agent.clock.now() - sending.heard_at
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            more = start + PIECE_BYTES < len(data)
            body = wire.K2iChanges(request.key, piece, more, request.asked_at, after_s)
            await self._agent.me.send(sender, say.encode(body), timeout_s=TAKE_S)
