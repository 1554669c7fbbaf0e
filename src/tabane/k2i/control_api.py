"""k2i's REST routes that change something: orders to processes, and to instances.

`POST /v2/processes/VERB` is for many processes on any nodes, and answers with the outcome of each.
`POST /v2/processes/{pid}/VERB` is for one, and an outcome that is an error is the answer's status.
Bodies are strict: a word that is not known, or stands twice, is refused, so that no misspelled or
second `dry_run` kills.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, get_type_hints

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, create_model

from tabane.errors import SystemFault, error_of
from tabane.k2i import orders
from tabane.k2i.api import Who
from tabane.k2i.bodies import StrictRoute
from tabane.k2i.description import describe_order
from tabane.k2i.orders import (
    MAX_KEY,
    MAX_PID,
    MAX_TARGETS,
    Action,
    Gpid,
    InstanceAction,
    InstanceOrder,
    InstanceOutcome,
    InstanceTarget,
    Order,
    Outcome,
    parse_gpid,
    parse_signal,
)
from tabane.k2i.permission import MAX_LIMIT
from tabane.model import Generation, InstanceId, NodeName
from tabane.security.identity import Principal

LONGEST_NAME = 64
MOST_TICKS = (1 << 63) - 1
MOST_CPUS = 1 << 13


class Obeying(Protocol):
    """Who takes orders: a node of its own, or a whole cluster."""

    async def obey(self, order: Order, who: Principal) -> tuple[Outcome, ...]:
        """An outcome for each target, in their order. Raises what concerns the whole order."""

    async def obey_instance(self, order: InstanceOrder, who: Principal) -> InstanceOutcome:
        """Raises why it was not done."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class How(Body):
    """`force`: also what the node cannot do without, for root."""

    dry_run: bool = False
    force: bool = False
    idempotency_key: str = Field(default="", max_length=MAX_KEY)


class Place(Body):
    """Where a process is, and which start of its node, as its record in `/v2/processes` says."""

    dc: str = Field(default="", max_length=LONGEST_NAME)
    node: str = Field(default="", max_length=LONGEST_NAME)
    incarnation: str = Field(min_length=1, max_length=LONGEST_NAME)


class Life(Place):
    start_ticks: int = Field(ge=1, le=MOST_TICKS)


class Target(Life):
    pid: int = Field(ge=1, le=MAX_PID)


class InstanceLife(Place):
    """`counter` as in the instance's generation."""

    dry_run: bool = False
    idempotency_key: str = Field(default="", max_length=MAX_KEY)
    counter: int = Field(ge=0, le=MOST_TICKS)


class ConfineBody(InstanceLife):
    """`cpu` counts whole CPUs; what is left out stays as it is."""

    cpu: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    memory_bytes: int | None = Field(default=None, ge=1, le=MOST_TICKS)
    pids: int | None = Field(default=None, ge=1, le=MAX_PID)


class Many(How):
    targets: list[Target] = Field(min_length=1, max_length=MAX_TARGETS)


class One(How, Life):
    pass


class Args(Body, ABC):
    """What belongs to one action."""

    @abstractmethod
    def action(self) -> Action: ...


class SignalArgs(Args):
    """By number, or by name as `TERM`."""

    signal: int | str

    def action(self) -> Action:
        return orders.Signal(parse_signal(str(self.signal)))


class NiceArgs(Args):
    nice: int = Field(ge=-40, le=40)
    relative: bool = False

    def action(self) -> Action:
        return orders.Nice(self.nice, self.relative)


class AffinityArgs(Args):
    cpus: list[int] = Field(min_length=1, max_length=MOST_CPUS)

    def action(self) -> Action:
        return orders.Affinity(tuple(self.cpus))


class LimitBody(Body):
    """-1 is unlimited; what is left out stays as it is."""

    soft: int | None = Field(default=None, ge=-1, le=MAX_LIMIT)
    hard: int | None = Field(default=None, ge=-1, le=MAX_LIMIT)


class LimitsArgs(Args):
    """By the names of `prlimit`: `nofile`, `core`, `as`, ..."""

    limits: dict[str, LimitBody] = Field(min_length=1, max_length=len(orders.RESOURCES))

    def action(self) -> Action:
        limits = {name: orders.Limit(it.soft, it.hard) for name, it in self.limits.items()}
        return orders.Limits(limits)


class PauseArgs(Args):
    def action(self) -> Action:
        return orders.Pause()


class ResumeArgs(Args):
    def action(self) -> Action:
        return orders.Resume()


VERBS: dict[str, type[Args]] = {
    "signal": SignalArgs,
    "nice": NiceArgs,
    "affinity": AffinityArgs,
    "limits": LimitsArgs,
    "pause": PauseArgs,
    "resume": ResumeArgs,
}


def build_control_router(obeying: Obeying) -> APIRouter:
    """The routes over who obeys; the port's guard says who asks."""
    router = APIRouter(prefix="/v2", tags=["control"], route_class=StrictRoute)
    for verb, args in VERBS.items():
        _add_many(router, obeying, verb, args)
        _add_one(router, obeying, verb, args)
    _add_instances(router, obeying)
    return router


def _add_many(router: APIRouter, obeying: Obeying, verb: str, args: type[Args]) -> None:
    kind = create_model(f"{verb.title()}Many", __base__=(Many, args))

    async def act(body: Any, who: Who) -> Response:
        targets = tuple(_gpid(target, target.pid) for target in body.targets)
        outcomes = await obeying.obey(_order(targets, body), who)
        return _json({"outcomes": outcomes})

    _add_route(router, f"/processes/{verb}", act, kind, describe_order(Outcome, "outcomes"))


def _add_one(router: APIRouter, obeying: Obeying, verb: str, args: type[Args]) -> None:
    kind = create_model(f"{verb.title()}One", __base__=(One, args))

    async def act(pid: str, body: Any, who: Who) -> Response:
        target = _gpid(body, parse_gpid(pid).pid)
        (outcome,) = await obeying.obey(_order((target,), body), who)
        if not outcome.ok:
            raise error_of(outcome.error, outcome.message, otherwise=SystemFault)
        return _json(outcome)

    _add_route(router, f"/processes/{{pid}}/{verb}", act, kind, describe_order(Outcome))


def _add_route(
    router: APIRouter,
    path: str,
    act: Callable[..., Awaitable[Response]],
    body: type[BaseModel],
    responses: dict[int | str, dict[str, Any]],
) -> None:
    """The framework reads what a body is like from the handler's annotation."""
    hints = get_type_hints(act, include_extras=True) | {"body": body}
    act.__annotations__ = hints
    router.add_api_route(path, act, methods=["POST"], name=path, responses=responses)


def _order(targets: tuple[Gpid, ...], body: Any) -> Order:
    return Order(targets, body.action(), body.dry_run, body.force, body.idempotency_key)


def _gpid(life: Life, pid: int) -> Gpid:
    return Gpid(life.dc, life.node, life.incarnation, pid, life.start_ticks)


def _add_instances(router: APIRouter, obeying: Obeying) -> None:
    def order(instance: str, body: InstanceLife, action: InstanceAction) -> InstanceOrder:
        node = NodeName(f"{body.dc}/{body.node}")
        generation = Generation(body.incarnation, InstanceId(instance), body.counter)
        target = InstanceTarget(node, generation)
        return InstanceOrder(target, action, body.dry_run, body.idempotency_key)

    responses = describe_order(InstanceOutcome)

    @router.post("/instances/{instance}/pause", responses=responses)
    async def pause(instance: str, body: InstanceLife, who: Who) -> Response:
        """Freeze all of it. Its sessions wait, until they give up; stopping it works."""
        return _json(await obeying.obey_instance(order(instance, body, orders.Pause()), who))

    @router.post("/instances/{instance}/resume", responses=responses)
    async def resume(instance: str, body: InstanceLife, who: Who) -> Response:
        return _json(await obeying.obey_instance(order(instance, body, orders.Resume()), who))

    @router.post("/instances/{instance}/limits", responses=responses)
    async def limits(instance: str, body: ConfineBody, who: Who) -> Response:
        """Change the limits of its cgroup; beyond what its app declares for root only."""
        action = orders.Confine(body.cpu, body.memory_bytes, body.pids)
        return _json(await obeying.obey_instance(order(instance, body, action), who))


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
