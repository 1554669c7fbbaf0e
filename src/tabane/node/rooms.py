"""Brings apps the messages of the rooms that they have triggers for.

For each such app one node is a member of its rooms, in its stead: the one that all who see the same
nodes compute, among those of the data centers that may run it. What is said there becomes a request
to the app by that node's gateway. The message is acknowledged once the app has answered it well,
and has failed otherwise, with the reason: nothing is kept for later, and who said it knows.
Messages of one sender are brought in order, those of several at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from tabane.errors import NotFound, Refused
from tabane.middlecon import Message, connect
from tabane.model import App, AppName
from tabane.node.requesting import MAX_BODY_BYTES, Request, ask_app
from tabane.reactions import Trigger
from tabane.scheduler.placement import home_of

if TYPE_CHECKING:
    from tabane.node.agent import Agent

SETTLE_S = 0.2
"""After a node came or went: others may, too."""
HUB_TIMEOUT_S = 30.0
PLAIN = "!#$&'()*+,/:;=?@[]~"
"""What of a member's name may stand in a header field as it is, beside letters and digits."""


class Rooms:
    """See the module's text. `apps` are all with triggers."""

    def __init__(self, agent: Agent, apps: Mapping[AppName, App]) -> None:
        self._agent, self._apps = agent, apps
        self._members: dict[AppName, tuple[tuple[str, ...], asyncio.Task[None]]] = {}
        """In which rooms, for each app."""

    def start(self) -> None:
        self._agent.me.on_hub(lambda hub, is_open: self.settle_soon(SETTLE_S))
        self.settle_soon()

    def settle_soon(self, delay_s: float = 0.0) -> None:
        """Apps changed, or nodes came or went."""
        self._agent.later.call("rooms", delay_s, self._settle)

    def _settle(self) -> None:
        """Be a member where this node is to be one, and nowhere else."""
        wanted = {key: rooms for key, app in self._apps.items() if (rooms := self._rooms_of(app))}
        for key, (rooms, member) in list(self._members.items()):
            if wanted.get(key) != rooms:
                member.cancel()
                del self._members[key]
        for key in wanted.keys() - self._members.keys():
            listen = partial(self._listen, key, wanted[key])
            member = self._agent.tasks.keep(f"rooms of {key}", listen)
            self._members[key] = (wanted[key], member)

    def _rooms_of(self, app: App) -> tuple[str, ...]:
        """Those that this node is to be in for it."""
        rooms = tuple(trigger.room for trigger in app.triggers if trigger.room)
        if not rooms:
            return ()
        live = self._agent.nodes.live_nodes()
        able = [node for node in live if app.allows(node.partition("/")[0])]
        return rooms if home_of(app.key, able) == self._agent.config.key else ()

    async def _listen(self, key: AppName, rooms: tuple[str, ...]) -> None:
        config = self._agent.config
        name = f"{key}@{config.key}"
        async with await connect(
            f"unix://{config.paths.hub}", name=name, timeout_s=HUB_TIMEOUT_S
        ) as me:
            for one in rooms:
                room = await me.join(one, member=False, watch=False)
                room.on_message(partial(self._bring, key))
                await me.join(one, watch=False)
            await asyncio.Event().wait()

    async def _bring(self, key: AppName, message: Message) -> bytes:
        app, trigger = self._find(key, message.room)
        fields = {
            "X-Tabane-Trigger": trigger.key,
            "X-Tabane-Room": quote(trigger.room, safe=PLAIN),
            "X-Tabane-Sender": quote(message.sender, safe=PLAIN),
            "Content-Type": "application/octet-stream",
        }
        request = Request(trigger.method, trigger.path, fields, message.data)
        response = await ask_app(self._agent, app, request)
        if not 200 <= response.status < 300:
            raise Refused(f"{app.key} answered {response.status}")
        if len(response.body) > MAX_BODY_BYTES:
            raise Refused(f"{app.key} answered more than {MAX_BODY_BYTES >> 20} MiB")
        return response.body

    def _find(self, key: AppName, room: str | None) -> tuple[App, Trigger]:
        app = self._apps.get(key)
        for trigger in app.triggers if app is not None else ():
            if app is not None and trigger.room == room:
                return app, trigger
        raise NotFound(f"{key} has no trigger for this room any more")
