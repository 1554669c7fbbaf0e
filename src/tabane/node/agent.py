"""The agent of a node: runs its instances, is the home of its share of the apps, answers its peers.

It can be killed at any moment. What must survive is elsewhere: sockets and exit statuses at the
holder, instances and their records on disk, the store on the control node, grants at the gateways
(which report them again when the agent is back). `start()` puts it together in this order:
replica, instances, hub session, home.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec

from tabane.clock import Clock
from tabane.errors import Closed, Unavailable
from tabane.gateway.activation import (
    InstanceAwake,
    InstanceEnded,
    InstanceReady,
    StillStarting,
    StopAsked,
)
from tabane.gateway.messages import (
    Broken,
    Demand,
    Report,
    Returned,
    StartTrace,
    StillUsed,
)
from tabane.k2i import EventFeed, K2i, ProcessTable
from tabane.middlecon import Change, Client, Message, Room, connect
from tabane.model import App, AppName, NodeName, State, WakeRecord
from tabane.network import NetworkPool, prepare_node
from tabane.node import messages as say
from tabane.node.activity import activity_of
from tabane.node.answering import Answering, Answers
from tabane.node.calling import call
from tabane.node.catalog import Catalog, StoredApps
from tabane.node.checkpoints import NodeCheckpoints
from tabane.node.config import NodeConfig, agent_of, event_socket
from tabane.node.control import Apps, Request
from tabane.node.engines import Engines, boot_id
from tabane.node.figures import Figures
from tabane.node.gateways import Gateways
from tabane.node.happenings import Happenings
from tabane.node.home import Home
from tabane.node.images import NodeImages
from tabane.node.instances import Executor
from tabane.node.journal import Journal
from tabane.node.k2i import ClusterK2i
from tabane.node.lag import Lag
from tabane.node.leases import NodeLeases, Nodes, keep_lease
from tabane.node.membership import Membership, Terms
from tabane.node.memory import pressure_of
from tabane.node.meters import Meters
from tabane.node.moves import Moves
from tabane.node.orders import Orders
from tabane.node.performing import Performing
from tabane.node.quotas import QuotaFile
from tabane.node.replication import Follower, Publisher
from tabane.node.reports import Reports
from tabane.node.running import Transition
from tabane.node.services import NodeServices
from tabane.node.session import HubSession
from tabane.node.settling import SETTLE_S, Settling
from tabane.node.spawner import HolderSpawner
from tabane.node.spreading import spread
from tabane.node.tcp_ports import TcpPorts
from tabane.node.triggers import Triggers
from tabane.node.watching import Watching
from tabane.runtimes.volumes import VolumeFiles
from tabane.scheduler.placement import NodeView, place
from tabane.security.audit import AuditLog
from tabane.store.feed import StoreFeed
from tabane.store.replica import Replica
from tabane.store.sqlite import SqliteStore
from tabane.store.view import View
from tabane.supervise import Later, Supervisor

log = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 10.0
HUB_TIMEOUT_S = 30.0
HYSTERESIS_S = 5.0
"""A node that cannot be seen for less than this keeps its instances, and its share of `min`."""
GATEWAY_MESSAGES = (Demand, Returned, StillUsed, Broken, Report)


class Agent:
    """See the module's text."""

    def __init__(self, config: NodeConfig, clock: Clock, tasks: Supervisor) -> None:
        self.config = config
        self.clock, self.tasks = clock, tasks
        self.token = config.token()
        paths = config.paths
        self.spawner = HolderSpawner(paths.holder, lambda end: self.happenings.on_part_end(end))
        self.engines = Engines(config, self.spawner)
        self.images = NodeImages(self)
        self.checkpoints = NodeCheckpoints(self)
        self.events: Journal[Transition] = Journal(paths.events, Transition)
        self.wakes: Journal[WakeRecord] = Journal(paths.wakes, WakeRecord)
        self.meters = Meters(self)
        self.audit = AuditLog(paths.audit)
        self.pool = NetworkPool(self.spawner, config.key, paths.directory, size=config.pool)
        self.services, self.activity = NodeServices(), activity_of(self)
        self.session = HubSession(clock)
        self.gateways, self.tcp = Gateways(self), TcpPorts(self)
        self.executor = self._make_executor(clock, tasks)
        self.catalog = Catalog(self)
        self.settling, self.reports = Settling(self), Reports(self)
        self.home = Home(
            Performing(self),
            clock,
            app_of=self.catalog.cohort,
            nodes=self._node_views,
            revision=lambda: self.replica.revision,
            may_go_elsewhere=self._may_go_elsewhere,
        )
        self.apps: Apps | None = None
        self.leases: NodeLeases | None = None
        self.members = Nodes(self)
        self.publisher: Publisher | None = None
        self.follower: Follower | None = None
        self.table = ProcessTable(config.key, config.incarnation, clock=clock)
        collector = event_socket(Path(config.root))
        self.process_events = EventFeed(self.table, collector=collector, clock=clock)
        self.watching = Watching(self)
        self.k2i = self._make_k2i()
        self.pressure = pressure_of(self)
        self.cluster_k2i, self.orders = ClusterK2i(self), Orders(self)
        self.figures, self.triggers = Figures(self), Triggers(self)
        self.answers = Answering(self)
        self.later = Later()
        self.happenings = Happenings(self)
        self.terms = Terms(clock, self.later, self.reports.on_term_over, HYSTERESIS_S)

    def _make_executor(self, clock: Clock, tasks: Supervisor) -> Executor:
        config, paths = self.config, self.config.paths
        return Executor(
            *(config.key, config.incarnation, paths.run, paths.instance_logs, config.cgroup),
            links=self.pool,
            services=self.services,
            volumes=VolumeFiles(paths.volumes),
            images=self.images,
            checkpoints=self.checkpoints,
            driver_for=self.engines.driver_for,
            driver_named=self.engines.drivers.__getitem__,
            clock=clock,
            tasks=tasks,
            notify=self._on_instance,
            on_change=self._on_transition,
            on_begin=Moves().foresee,
            on_over=self.gateways.tell_over,
            kernel=boot_id(),
            quotas=QuotaFile(Path(config.root) / "limits.toml").current,
        )

    def _make_k2i(self) -> K2i:
        return K2i(
            self.table,
            node=self.config.key,
            incarnation=self.config.incarnation,
            instances=self.executor.instances,
            inside=self.watching.insides.processes,
            inside_age_s=self.watching.insides.age_s,
            facts=self.watching.collection.rows,
            clock=self.clock,
        )

    # Life

    async def start(self) -> None:
        """Recover what there is and join the others."""
        paths = self.config.paths
        await self.spawner.connect()
        self.replica = await self._open_store()
        self.replica.subscribe(self.catalog.on_changes)
        self.replica.subscribe(self.members.on_changes)
        self.replica.subscribe(self.happenings.on_changes)
        self.replica.subscribe(self.tcp.on_changes)
        await asyncio.gather(
            self.engines.probe(machines=False),
            self.catalog.prepare_image("host"),
            self.checkpoints.load(),
            prepare_node([self.config.cluster.network.network], self.tcp.wanted()),
        )
        await self.executor.recover(self.events.recent())
        self.watching.begin()
        hub = f"unix://{paths.hub}"
        self.me: Client = await connect(
            hub, name=agent_of(self.config.key), timeout_s=HUB_TIMEOUT_S
        )
        await self.services.hub.restore(self.me)
        self.nodes = Membership(self.config, self.me.hubs)
        self.me.on_hub(self._on_hub)
        self.me.on_connected(self._on_connected)
        self.me.on_disconnected(self.session.on_lost)
        self.room: Room = await self.me.join(say.NODES, member=False)
        self.me.on_message(concurrent=True)(self._on_message)
        self.room.on_message(concurrent=True)(self._on_message)
        self.room.on_presence(lambda presence: self._on_presence(presence.member, presence.change))
        self.room.on_presence(self.happenings.on_presence)
        self.reports.begin_home()
        await self.me.join(say.NODES)  # now the others see this agent, and tell it how things stand
        self.session.on_open()
        self.lag = Lag(self)
        await self._resync()
        self.tasks.keep("tcp ports", self.tcp.follow)
        self.tasks.keep("lease", lambda: keep_lease(self.clock, self.members.keep))
        self.process_events.start(self.tasks)
        self.k2i.start(self.tasks, self.process_events)
        self.tasks.keep("figures", self.figures.watch)
        self.tasks.keep("pressure", self.pressure.watch)
        self.tasks.start("machines", self.figures.try_machines())
        self.triggers.start()
        self.catalog.prefetch(self.all_apps())

    async def _open_store(self) -> View:
        """The control node's store, or this node's replica of it."""
        if not self.config.is_control:
            replica = await Replica.open(self.config.paths.replica, "")
            self.follower = Follower(replica)
            return replica
        self.store = await SqliteStore.open(self.config.paths.store)
        self.apps = Apps(self.store, self.clock, lambda app: place(app, self.all_views(), {}))
        self.leases = NodeLeases(self.store)
        feed = StoreFeed(self.store)
        self.publisher = Publisher(
            feed, self.send, self.tasks, self.clock, lambda member: member in self.room.members
        )
        return self.store.view

    async def aclose(self) -> None:
        """Leave everything running; the next agent of this node takes over."""
        self.home.close()
        self.later.close()
        await self.me.aclose()
        await self.tasks.aclose()
        await self.pool.aclose()
        await (self.store if self.follower is None else self.follower).aclose()
        self.process_events.close()
        self.k2i.close()
        self.table.close()
        self.spawner.close()
        self.events.close()
        self.wakes.close()
        self.audit.close()

    # What is known

    def app(self, key: AppName) -> App | None:
        return self.catalog.app(key)

    def all_apps(self) -> StoredApps:
        return self.catalog.all_apps()

    def all_views(self) -> list[NodeView]:
        """What each live node told of itself."""
        return self._views(self.nodes.live_nodes())

    def _may_go_elsewhere(self, app: App) -> bool:
        others = {node.partition("/")[0] for node in self.nodes.live_nodes()}
        return any(map(app.allows, others - {self.config.node.datacenter}))

    def _node_views(self) -> list[NodeView]:
        return self._views(self.nodes.neighbours())

    def _views(self, nodes: list[NodeName]) -> list[NodeView]:
        views = {self.config.key: self.figures.view()}
        for node in nodes:
            told = self.room.state.get(agent_of(node), {}).get("node")
            if told is not None and node != self.config.key:
                views[node] = msgspec.msgpack.decode(told, type=NodeView)
        return list(views.values())

    # Changes

    def _on_connected(self) -> None:
        """A new hub session: learn what was missed, say what is here."""
        self.session.on_open()
        self.tasks.start("hub sockets", self.services.hub.restore(self.me))
        self.tasks.start("resync", self._resync())

    async def _resync(self) -> None:
        if not self.config.is_control:
            follow = say.StoreFollow(self.replica.revision)
            self.tell(agent_of(self.config.cluster.control), follow)
        await self.members.tell()
        await self.figures.tell()
        for member in tuple(self.room.members):
            self._on_presence(member, Change.JOINED)
        self.happenings.begin_anew()
        self.home.expect(self.nodes.gateways() - self.room.members.keys())
        self._take_over()
        self.later.call("spread", SETTLE_S, self._start_spread)

    def _on_presence(self, member: str, change: Change) -> None:
        """An agent or gateway came, went, or cannot be seen."""
        node, _, part = member.rpartition("/")
        came = change in (Change.JOINED, Change.BACK)
        self.cluster_k2i.following.on_presence(member, came=came)
        if part.startswith("gateway") and not came:
            self.watching.resources.on_gateway_gone(member)
        if part.startswith("gateway") and self.nodes.is_near(node):
            self.home.on_gateway(member, joined=came)
        if came and member == agent_of(self.config.cluster.control) and not self.config.is_control:
            self.tell(member, say.StoreFollow(self.replica.revision))
        if part == "agent" and came and self.nodes.is_near(node):
            self.reports.ask(NodeName(node))

    def _on_hub(self, hub: str, is_open: bool) -> None:
        """A node came or went: homes move, and `min` is spread anew."""
        self._take_over()
        self.later.call("spread", SETTLE_S if is_open else HYSTERESIS_S, self._start_spread)
        for node in self.nodes.neighbours():
            self.reports.ask(node)
        if self.nodes.is_near(hub):
            self.terms.on_hub(hub, is_open)

    def _take_over(self) -> None:
        """Become home of what is ours now, and forget what is not."""
        for key in self.home.apps():
            if not self.nodes.is_home(key):
                self.home.forget(key)
        self.reports.tell_own()
        self.settling.begin()

    def spread_soon(self) -> None:
        """Apps changed, and with them perhaps what each data center keeps."""
        if self.joined:
            self.later.call("spread", 0.0, self._start_spread)

    def _start_spread(self) -> None:
        if self.apps is not None:
            self.tasks.start("spread", spread(self, self.apps))

    # Instances

    def _on_transition(self, transition: Transition) -> None:
        self.happenings.record(transition)
        self.pressure.follow(transition)
        self.watching.follow(transition.instance, transition.state)
        if transition.state is State.ABSENT:
            self.gateways.tell_instances()
            self._tell_figures()

    def _tell_figures(self) -> None:
        if self.joined:
            self.tasks.start("figures", self.figures.tell())

    def _on_instance(
        self, event: InstanceReady | InstanceEnded | InstanceAwake | StillStarting
    ) -> None:
        if isinstance(event, StillStarting):
            self._notify_home(say.Slow(event))
        elif isinstance(event, InstanceAwake):
            self._notify_home(say.Awake(event))
        elif isinstance(event, InstanceReady):
            self.gateways.tell_ready(event.instance)
            if (trace := event.trace) is not None:
                self.engines.note_start(event.instance.driver, trace)
            trace = trace or StartTrace({}, 0)
            told = trace.phases_us, trace.total_us, trace.option, trace.note
            self._notify_home(say.Started(event.instance, *told))
            self._tell_figures()
        else:
            self._notify_home(say.Ended(event))

    def _notify_home(self, message: say.FromExecutor) -> None:
        if not self.joined:
            return  # after the start, `_take_over` tells all
        app = message.instance.cohort if isinstance(message, say.Started) else message.event.app
        if self.nodes.is_home(app):
            self.hear_of_instance(message)
        else:
            self.tell(agent_of(self.nodes.home_of(app)), message)

    def hear_of_instance(self, message: say.FromExecutor) -> None:
        if not isinstance(message, say.Started):
            self.home.about(message.event.app, message.event)
            return
        told = message.phases_us, message.total_us, message.option, message.note
        trace = StartTrace(*told) if message.phases_us else None
        self.home.about(message.instance.cohort, InstanceReady(message.instance, trace))

    @property
    def joined(self) -> bool:
        return hasattr(self, "room")

    # For those who ask

    async def wait_revision(self, revision: int) -> None:
        """Return once this node's replica has that revision of the store."""
        reached = asyncio.Event()

        def look(_: object = None) -> None:
            if self.replica.revision >= revision:
                reached.set()

        end = self.replica.subscribe(look)
        try:
            look()
            await reached.wait()
        finally:
            end()

    # Messages

    def tell(self, member: str, message: say.Message) -> None:
        """In order, without an answer; when it cannot be delivered, presence says the rest."""
        try:
            self.me.send_nowait(member, say.encode(message), urgent=True)
        except Closed:
            log.info("no hub session: %s is not told of %s", member, type(message).__name__)

    async def send(self, member: str, data: bytes) -> None:
        await self.me.send(member, data, timeout_s=CONTROL_TIMEOUT_S)

    def _on_message(self, message: Message) -> Awaitable[bytes | None] | None:
        body = say.parse(message.data)
        if isinstance(body, GATEWAY_MESSAGES):
            self.home.hear(message.sender, body)
            return None
        return self.answers.answer(message.sender, body)

    async def ask_home(self, app: AppName, asked: StopAsked) -> None:
        """Tell an app's home what a person wants."""
        if self.nodes.is_home(app):
            self.home.about(app, asked)
        else:
            await self.send(agent_of(self.nodes.home_of(app)), say.encode(say.Asked(asked)))

    async def control(self, request: Request) -> Any:
        """Have the control node change apps; what it answers. Raises its refusal, or as `call`."""
        if self.apps is not None:
            return await self.apps.perform(request)
        control, hint = self.config.cluster.control, "look with `tabane apps`, or do it again"
        return await call(self, control, request, timeout_s=CONTROL_TIMEOUT_S, hint=hint)

    async def ask_all(self, request: say.Message, timeout_s: float) -> Answers:
        """Ask every agent, this one included; who did not answer is said. A session with
        our hub that was lost just so is waited for; without one nobody else is asked."""
        others, mine = await asyncio.gather(
            self.ask_others(say.encode(request), timeout_s),
            self._ask_itself(request, timeout_s),
        )
        given = others | mine
        everyone = self.config.cluster.keys
        return Answers(
            {node: given[agent_of(node)] for node in everyone if agent_of(node) in given},
            tuple(node for node in everyone if agent_of(node) not in given),
        )

    async def ask_others(self, data: bytes, timeout_s: float) -> dict[str, bytes]:
        """The answers of the other agents, by member: see `ask_all`."""
        try:
            await self.session.wait(timeout_s)
            return (await self.room.ask(data, timeout_s=timeout_s)).answers
        except (Closed, Unavailable) as error:
            log.info("no other node could be asked: %s", error)
            return {}

    async def _ask_itself(self, request: say.Message, timeout_s: float) -> dict[str, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                return {self.me.name: await self.answers.answer(self.me.name, request) or b""}
        except TimeoutError:
            return {}
