"""What brings apps sessions beside their callers, on this node: moments, and who tries one out.

Moments are decided on by the control node (`tabane.node.timers`), which has a node near the app
make the request: one of a data center that may run it, its own if it can. The request goes to that
node's gateway and is a session as any other; who asks is not known to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tabane.errors import NotFound, Unreachable
from tabane.model import App, AppName, NodeName
from tabane.node import messages as say
from tabane.node.calling import call
from tabane.node.control import APPS, sound_app
from tabane.node.requesting import GRACE_S, Request, ask_app
from tabane.node.rooms import Rooms
from tabane.node.timers import TRIGGERS, Timers, parse_mark
from tabane.reactions import Trigger
from tabane.scheduler.placement import home_of
from tabane.scheduler.timers import Mark
from tabane.store.api import Change

if TYPE_CHECKING:
    from tabane.node.agent import Agent


class Triggers:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._apps: dict[AppName, App] = {}
        """Those with triggers."""
        self._timers: Timers | None = None
        self._rooms = Rooms(agent, self._apps)

    def start(self) -> None:
        """Learn what is deployed, be in apps' rooms, and on the control node carry moments out."""
        agent = self._agent
        self._take(agent.all_apps())
        agent.replica.subscribe(self.on_changes)
        self._rooms.start()
        if agent.config.is_control:
            self._timers = Timers(
                agent.store, agent.clock, agent.tasks, apps=self._apps.values, send=self._send
            )
            agent.tasks.keep("timers", self._timers.run)

    def on_changes(self, changes: tuple[Change, ...]) -> None:
        """The replica has changed."""
        for change in changes:
            if not change.key.startswith(APPS):
                continue
            app = sound_app(change.key, change.value) if change.value is not None else None
            self._apps.pop(AppName(change.key.removeprefix(APPS)), None)
            self._take([app] if app is not None else [])
        self._rooms.settle_soon()
        if self._timers is not None:
            self._timers.look_soon()

    def _take(self, apps: Iterable[App]) -> None:
        self._apps |= {app.key: app for app in apps if app.triggers}

    def mark(self, app: AppName, trigger: Trigger) -> Mark:
        """What this node's replica has of a timer's moments."""
        entry = self._agent.replica.get(f"{TRIGGERS}{app}/{trigger.key}")
        return parse_mark(entry.value) if entry is not None else Mark()

    def find(self, app: AppName, name: str) -> tuple[App, Trigger]:
        """Raises `NotFound`."""
        found = self._agent.app(app)
        if found is None:
            raise NotFound(f"there is no app {app}")
        for trigger in found.triggers:
            if trigger.key == name:
                return found, trigger
        there = ", ".join(each.key for each in found.triggers) or "it has none"
        raise NotFound(f"{app} has no trigger {name!r} ({there})")

    async def fire(self, key: AppName, name: str, moment: float) -> str:
        """Make a trigger's request by this node's gateway; what became of it. Raises `Unavailable`
        or `PeerError` when the app may not have got it."""
        app, trigger = self.find(key, name)
        fields = {
            "X-Tabane-Trigger": trigger.key,
            "X-Tabane-Moment": datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds"),
        }
        request = Request(trigger.method, trigger.path, fields, trigger.body.encode())
        response = await ask_app(self._agent, app, request)
        return f"answered {response.status}"

    async def _send(self, app: App, trigger: Trigger, moment: float) -> str:
        node = self._pick_node(app)
        if node == self._agent.config.key:
            return await self.fire(app.key, trigger.key, moment)
        reactive = app.reactive
        timeout_s = reactive.start_timeout_s + reactive.response_timeout_s + 2 * GRACE_S
        fire = say.FireTrigger(app.key, trigger.key, moment)
        hint = "it is made again"
        fired: say.Fired = await call(self._agent, node, fire, timeout_s=timeout_s, hint=hint)
        return fired.outcome

    def _pick_node(self, app: App) -> NodeName:
        live = self._agent.nodes.live_nodes()
        order = [self._agent.config.node.datacenter, *self._agent.config.cluster.datacenters()]
        for datacenter in order:
            near = [node for node in live if node.startswith(f"{datacenter}/")]
            if near and app.allows(datacenter) and (node := home_of(app.key, near)) is not None:
                return node
        raise Unreachable(f"no node of a data center that may run {app.key} can be seen")
