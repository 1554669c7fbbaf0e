"""What an agent answers to the other processes of the cluster, one method for each message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tabane.errors import TabaneError, Unsupported
from tabane.gateway.waiting import why_waiting
from tabane.model import App, NodeName
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node import volumes
from tabane.node.orders import with_pause
from tabane.node.putting_away import save_as_told

if TYPE_CHECKING:
    from tabane.gateway.ledger import Away
    from tabane.node.agent import Agent
    from tabane.node.control import Request
    from tabane.node.replication import Follower

encode_json = msgspec.json.Encoder().encode


class Answers(NamedTuple):
    """What the nodes answered, by node, and who did not."""

    by_node: dict[NodeName, bytes]
    silent: tuple[NodeName, ...]


class Answering:
    """The agent's answers. Errors that are ours travel back as `Failure`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._table: dict[type, Callable[[str, Any], Awaitable[bytes | None]]] = {
            say.StartInstance: self._start,
            say.FreezeInstance: self._freeze,
            say.ThawInstance: self._thaw,
            say.StopInstance: self._stop,
            say.ReleaseInstance: self._release,
            say.Started: self._heard,
            say.Ended: self._heard,
            say.Awake: self._heard,
            say.Slow: self._heard,
            say.Asked: self._asked,
            say.Lower: self._asked,
            say.Hello: self._hello,
            say.Woke: self._woke,
            say.StoreFollow: self._follow,
            say.StorePage: self._page,
            say.StoreChanges: self._changes,
            say.DeployApp: self._control,
            say.DeployApps: self._control,
            say.RemoveApp: self._control,
            say.RemoveApps: self._control,
            say.ScaleApp: self._control,
            say.Happened: self._happened,
            say.AskInstances: self._instances,
            say.KeepNode: self._keep,
            say.AskKnown: self._known,
            wire.AskK2i: self._k2i,
            wire.MoreOfK2i: self._more_of_k2i,
            wire.ActK2i: self._act,
            wire.ActOnInstance: self._act,
            wire.FollowK2i: self._follow_k2i,
            wire.K2iChanges: self._k2i_changes,
            wire.UnfollowK2i: self._unfollow_k2i,
            say.AskRecords: self._records,
            say.AskApp: self._app,
            say.AskImages: self._images,
            say.RemoveImage: self._remove_image,
            say.CollectImages: self._collect_images,
            say.AskCheckpoints: self._checkpoints,
            say.RemoveCheckpoint: self._remove_checkpoint,
            say.CollectCheckpoints: self._collect_checkpoints,
            say.AskVolumes: self._volumes,
            say.DropVolume: self._drop_volume,
            say.ForgetVolumes: self._forget_volumes,
            say.FireTrigger: self._fire,
            say.Used: self._used,
        }

    async def answer(self, sender: str, body: say.Message) -> bytes | None:
        """Raises `Unsupported` for what an agent is never asked."""
        handler = self._table.get(type(body))
        if handler is None:
            raise Unsupported(f"an agent has no answer to {type(body).__name__}")
        try:
            return await handler(sender, body)
        except TabaneError as error:
            return say.encode(say.to_failure(error))

    async def _start(self, sender: str, body: say.StartInstance) -> None:
        now, executor = self._agent.clock.now(), self._agent.executor
        executor.start(body.app, body.instance, now, resume=body.resume)

    async def _freeze(self, sender: str, body: say.FreezeInstance) -> None:
        executor = self._agent.executor
        if body.save:
            save_as_told(executor, body.instance, body.number, ends=body.ends)
        else:
            executor.freezer.freeze(body.instance, body.number, body.reason)

    async def _thaw(self, sender: str, body: say.ThawInstance) -> None:
        self._agent.executor.freezer.thaw(body.instance)

    async def _stop(self, sender: str, body: say.StopInstance) -> None:
        self._agent.executor.stop(body.instance, body.reason)

    async def _release(self, sender: str, body: say.ReleaseInstance) -> None:
        self._agent.executor.release(body.instance)

    async def _heard(self, sender: str, body: say.FromExecutor) -> None:
        self._agent.hear_of_instance(body)

    async def _asked(self, sender: str, body: say.Asked | say.Lower) -> None:
        self._agent.home.about(body.event.app, body.event)

    async def _hello(self, sender: str, body: say.Hello) -> None:
        self._agent.gateways.greet(sender)

    async def _woke(self, sender: str, body: say.Woke) -> None:
        self._agent.wakes.add(body.record)

    async def _follow(self, sender: str, body: say.StoreFollow) -> None:
        if self._agent.publisher is None:
            raise Unsupported(f"{self._agent.config.key} does not hold the store")
        self._agent.publisher.follow(sender, body.after)

    async def _page(self, sender: str, body: say.StorePage) -> None:
        await self._follower().on_page(body)

    async def _changes(self, sender: str, body: say.StoreChanges) -> None:
        await self._follower().on_changes(body)

    def _follower(self) -> Follower:
        if self._agent.follower is None:
            raise Unsupported(f"{self._agent.config.key} holds the store, and follows nobody")
        return self._agent.follower

    async def _control(self, sender: str, body: Request) -> bytes:
        if self._agent.apps is None:
            raise Unsupported(f"{self._agent.config.key} does not hold the store")
        return say.encode(await self._agent.apps.perform(body))

    async def _happened(self, sender: str, body: say.Happened) -> None:
        self._agent.happenings.tell(body.transition)

    async def _keep(self, sender: str, body: say.KeepNode) -> None:
        if self._agent.leases is None:
            raise Unsupported(f"{self._agent.config.key} does not hold the store")
        await self._agent.leases.keep(body.node)

    async def _instances(self, sender: str, body: say.AskInstances) -> bytes:
        found = map(self._agent.activity.show, self._agent.executor.instances())
        instances = tuple(map(with_pause, found))
        saved = self._agent.checkpoints.told()
        return say.encode(say.Instances(instances, self._agent.clock.wall(), saved))

    async def _known(self, sender: str, body: say.AskKnown) -> bytes:
        await self._agent.wait_revision(body.revision)
        await self._agent.gateways.wait_told()
        await self._agent.tcp.wait_settled()
        return b""

    async def _k2i(self, sender: str, body: wire.AskK2i) -> bytes:
        return await self._agent.cluster_k2i.answer(body)

    async def _more_of_k2i(self, sender: str, body: wire.MoreOfK2i) -> bytes:
        return self._agent.cluster_k2i.pieces.piece(body.number, body.offset)

    async def _follow_k2i(self, sender: str, body: wire.FollowK2i) -> None:
        self._agent.cluster_k2i.following.begin(sender, body)

    async def _k2i_changes(self, sender: str, body: wire.K2iChanges) -> None:
        self._agent.cluster_k2i.following.hear(sender, body)

    async def _unfollow_k2i(self, sender: str, body: wire.UnfollowK2i) -> None:
        self._agent.cluster_k2i.following.stop(sender, body.key)

    async def _act(self, sender: str, body: wire.ActK2i | wire.ActOnInstance) -> bytes:
        return await self._agent.orders.act(sender, body)

    async def _records(self, sender: str, body: say.AskRecords) -> bytes:
        journal = self._agent.wakes if body.kind == "wakes" else self._agent.events
        return encode_json(journal.recent()[-body.limit :])

    async def _app(self, sender: str, body: say.AskApp) -> bytes:
        """What this node knows as the home of the app, or of cohorts of it."""
        app = self._agent.app(body.app)
        cohorts = app.cohorts() if app is not None else ()
        mine = (cohort for cohort in cohorts if self._agent.nodes.is_home(cohort.cohort))
        return encode_json([self._describe(cohort) for cohort in mine])

    async def _images(self, sender: str, body: say.AskImages) -> bytes:
        return encode_json(await self._agent.images.list_own())

    async def _remove_image(self, sender: str, body: say.RemoveImage) -> bytes:
        return say.encode(await self._agent.images.remove_own(body.digest))

    async def _collect_images(self, sender: str, body: say.CollectImages) -> bytes:
        return say.encode(await self._agent.images.collect_own(dry=body.dry))

    async def _checkpoints(self, sender: str, body: say.AskCheckpoints) -> bytes:
        return encode_json(self._agent.checkpoints.list_own())

    async def _remove_checkpoint(self, sender: str, body: say.RemoveCheckpoint) -> bytes:
        checkpoints, executor = self._agent.checkpoints, self._agent.executor
        there = [one.about for one in checkpoints.store.all() if one.digest == body.digest]
        removed = await checkpoints.remove_own(body.digest)
        for about in there if removed.digests else ():
            if about.kept is not None:
                executor.putting_away.lose(about, "what it was put away as was removed by order")
        return say.encode(removed)

    async def _collect_checkpoints(self, sender: str, body: say.CollectCheckpoints) -> bytes:
        return say.encode(await self._agent.checkpoints.collect_own(dry=body.dry))

    async def _volumes(self, sender: str, body: say.AskVolumes) -> bytes:
        return encode_json(await volumes.list_own(self._agent))

    async def _drop_volume(self, sender: str, body: say.DropVolume) -> bytes:
        return say.encode(await volumes.drop_own(self._agent, body.app, body.name))

    async def _forget_volumes(self, sender: str, body: say.ForgetVolumes) -> bytes:
        if self._agent.apps is None:
            raise Unsupported(f"{self._agent.config.key} does not hold the store")
        return say.encode(say.Committed(await self._agent.apps.forget_volumes(body.app)))

    async def _used(self, sender: str, body: say.Used) -> None:
        self._agent.watching.resources.hear(sender, body.instance, body.sessions)

    async def _fire(self, sender: str, body: say.FireTrigger) -> bytes:
        outcome = await self._agent.triggers.fire(body.app, body.trigger, body.moment)
        return say.encode(say.Fired(outcome))

    def _describe(self, cohort: App) -> dict[str, Any]:
        home, now = self._agent.home, self._agent.clock.now()
        choice, ledger = home.explain(cohort), home.ledger(cohort.cohort)
        setbacks = ledger.setbacks if ledger is not None else None
        return {
            "home": self._agent.config.key,
            "callers": cohort.trust,
            "failures": setbacks.count if setbacks else 0,
            "reason": setbacks.reason if setbacks else "",
            "problem": setbacks.describe(now) if setbacks else "",
            "unsaved": ledger.unsaved if ledger is not None else "",
            "away": [_tell_away(away, now) for away in ledger.away_ones()] if ledger else [],
            "trouble": home.trouble(cohort.cohort),
            "waiting": ledger.total_waiting() if ledger is not None else 0,
            "waits_for": why_waiting(ledger, now) if ledger is not None else "",
            "next": choice.node,
            "placement": choice.reasons,
        }


def _tell_away(away: Away, now: float) -> dict[str, Any]:
    """`problem`: why it does not go on just now."""
    problem = away.reason if now < away.not_before else ""
    idle_s = max(0.0, now - away.last_used)
    return {"instance": away.id, "node": away.node, "idle_s": idle_s, "problem": problem}
