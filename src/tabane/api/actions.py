"""What the control API does, without HTTP: each action takes an agent and who asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tabane import spec
from tabane.api.advice import advise
from tabane.api.checks import check_command, check_digest, check_instance, check_text
from tabane.errors import NotFound, UsageError
from tabane.gateway.activation import StopAsked
from tabane.model import App, AppName, Instance, InstanceId, State
from tabane.node import messages as say
from tabane.node.config import HTTP_PORT
from tabane.runtimes import registry
from tabane.runtimes.api import ExecResult
from tabane.runtimes.lookup import find_user
from tabane.security.audit import Line
from tabane.security.identity import Principal
from tabane.spec_fields import Mistake

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ASK_S = 2.0
"""How long nodes have to answer; one that is dead costs this once."""
LOG_BLOCK = 64 << 10
LOG_POLL_S = 0.2


async def deploy(
    agent: Agent, who: Principal, text: str, file: str, image: str, *, force: bool = False
) -> dict[str, Any]:
    """Store the app, unless it is as it was; then ask who knows it already."""
    app = spec.parse_app(check_text("text", text), file=check_text("file", file))
    try:
        _check_driver(agent, app)
    except Mistake as mistake:
        raise spec.error_of(mistake, file=file, text=text) from None
    if image != "host" and not agent.images.store.has(check_digest(image)):
        raise NotFound(f"image {image} is not on {agent.config.key}: send it first")
    app = msgspec.structs.replace(app, image=image, owner=max(who.uid, 0))
    deployed = await agent.control(say.DeployApp(app, force))
    _audit(agent, who, "deploy", f"{app.key} revision {deployed.app.revision}")
    said = {"changed": deployed.changed, "warnings": _warnings(agent, deployed)}
    return describe_app(deployed.app) | said | await _who_knows(agent, deployed.revision)


def _warnings(agent: Agent, deployed: say.Deployed) -> list[str]:
    warnings = advise(deployed.app, agent.config.cluster.datacenters())
    if (before := deployed.unscaled) is not None:
        now = deployed.app.reactive
        back = f"min is {now.min} and max {now.max} again, as the file says"
        warnings.append(f"{back}; `tabane scale` had set {before.min} and {before.max}")
    return warnings


def _check_driver(agent: Agent, app: App) -> None:
    """Refuse what no driver of this version can run, on whatever machine."""
    drivers = agent.engines.drivers
    classes = {driver.isolation for driver in drivers.values()}
    if app.isolation not in classes:
        known = ", ".join(sorted(classes))
        raise Mistake("class", f"no driver runs class {app.isolation} yet (there are: {known})")
    if app.driver and app.driver not in drivers:
        raise Mistake("driver", f"there is none named {app.driver} ({', '.join(drivers)})")
    if app.driver and drivers[app.driver].isolation is not app.isolation:
        raise Mistake("driver", f"{app.driver} does not run class {app.isolation}")


async def remove(agent: Agent, who: Principal, key: str) -> dict[str, Any]:
    deployed = await agent.control(say.RemoveApp(AppName(key)))
    _audit(agent, who, "remove", key)
    return {"name": key} | await _who_knows(agent, deployed.revision)


async def scale(
    agent: Agent, who: Principal, key: str, low: int | None, high: int | None
) -> dict[str, Any]:
    if low is None and high is None:
        raise UsageError("scale: give min, max, or both")
    deployed = await agent.control(say.ScaleApp(AppName(key), low, high))
    _audit(agent, who, "scale", f"{key} min {low} max {high}")
    return describe_app(deployed.app) | await _who_knows(agent, deployed.revision)


async def _who_knows(agent: Agent, revision: int) -> dict[str, Any]:
    """Data centers where every node has this revision, and those where one did not say so."""
    answers = await agent.ask_all(say.AskKnown(revision), ASK_S)
    silent = {node.partition("/")[0] for node in answers.silent}
    datacenters = agent.config.cluster.datacenters()
    return {
        "known": [dc for dc in datacenters if dc not in silent],
        "unreachable": sorted(silent),
    }


async def list_apps(agent: Agent) -> dict[str, Any]:
    found, silent = await _instances(agent)
    rows = []
    for app in agent.all_apps():
        mine = [i for i in found if i.app == app.key]
        ready = sum(i.state is State.READY for i in mine)
        rows.append(describe_app(app) | {"ready": ready, "instances": len(mine)})
    return {"apps": rows, "silent": silent}


async def show(agent: Agent, key: str) -> dict[str, Any]:
    """The app, its instances, what its homes know, its latest events and wakes."""
    app = agent.app(AppName(key))
    if app is None:
        raise NotFound(f"there is no app {key}")
    found, silent = await _instances(agent)
    homes = await agent.ask_all(say.AskApp(AppName(key)), ASK_S)
    wakes = await records(agent, "wakes", 200)
    events = await records(agent, "events", 500)
    return {
        "app": describe_app(app),
        "advice": advise(app, agent.config.cluster.datacenters()),
        "instances": [i for i in found if i.app == key],
        "homes": [msgspec.json.decode(data) for data in homes.by_node.values() if data],
        "wakes": [wake for wake in wakes["records"] if wake["app"] == key][-10:],
        "events": [event for event in events["records"] if event["app"] == key][-20:],
        "silent": sorted({*silent, *homes.silent}),
    }


def describe_app(app: App) -> dict[str, Any]:
    """An app as its author would write it, with what the cluster added."""
    added = {
        "namespace": app.namespace,
        "revision": app.revision,
        "class": app.isolation,
        "image": app.source or app.image,
        "digest": app.image,
        "deployed_at": app.deployed_at,
    }
    return spec.render_app(app) | added


async def _instances(agent: Agent) -> tuple[list[Instance], list[str]]:
    answers = await agent.ask_all(say.AskInstances(), ASK_S)
    found: list[Instance] = []
    for data in answers.by_node.values():
        found += [i for i in say.parse(data).instances if i.state is not State.ABSENT]
    return sorted(found, key=lambda i: (i.app, i.node, i.created_at)), list(answers.silent)


async def list_instances(agent: Agent) -> dict[str, Any]:
    found, silent = await _instances(agent)
    return {"instances": found, "silent": silent}


async def stop(agent: Agent, who: Principal, instance: str) -> dict[str, Any]:
    """Have the instance's home drain and stop it."""
    running = agent.executor.get(check_instance(instance))
    _audit(agent, who, "stop", f"{running.instance.app} instance {instance}")
    asked = StopAsked(running.instance.app, InstanceId(instance))
    await agent.ask_home(running.instance.app, asked)
    return {"instance": instance, "state": running.instance.state}


async def stop_instances(agent: Agent, who: Principal) -> dict[str, Any]:
    _audit(agent, who, "stop-instances", agent.config.key)
    count = len(agent.executor.instances())
    await agent.executor.stop_all()
    return {"node": agent.config.key, "stopped": count}


async def execute(
    agent: Agent,
    who: Principal,
    instance: str,
    argv: tuple[str, ...],
    timeout_s: float,
    *,
    user: str = "",
    workdir: str = "",
    stdin: AsyncIterator[bytes] | None = None,
) -> ExecResult:
    """`user` as in OCI: `name`, `name:group`, `uid`, `uid:gid`, of the image's own."""
    check_command(argv)
    check_text("user", user)
    check_text("workdir", workdir)
    running = agent.executor.get(check_instance(instance))
    handle = running.record.handle
    if handle is None or running.instance.state is not State.READY:
        raise NotFound(f"instance {instance} is {running.instance.state}, nothing runs in it")
    _audit(agent, who, "exec", f"{running.instance.app} instance {instance}: {' '.join(argv)}")
    if workdir and not workdir.startswith("/"):
        raise UsageError(f"workdir: {workdir!r} is not an absolute path in the instance")
    other = find_user(running.record.image.tree, user) if user else None
    return await running.driver.exec(
        handle, argv, timeout_s=timeout_s, stdin=stdin, user=other, workdir=workdir
    )


def read_log(agent: Agent, instance: str, *, tail: int, follow: bool) -> AsyncIterator[bytes]:
    """The log's lines; raises `NotFound` at once when this node never ran the instance."""
    path = agent.config.paths.instance_logs / check_instance(instance) / "log"
    runs = agent.executor.runs(InstanceId(instance))
    ran = any(event.instance == instance for event in agent.events.recent())
    if not (runs or ran or path.exists()):
        raise NotFound(f"{agent.config.key} has no log of an instance {instance}")
    return _read_log(path, tail, lambda: follow and agent.executor.runs(InstanceId(instance)))


async def _read_log(path: Path, tail: int, go_on: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The older file, then this one; when followed, what is added until the instance ends."""
    while not path.exists():
        if not go_on():
            return
        await asyncio.sleep(LOG_POLL_S)
    older = path.with_name(path.name + ".1")
    with path.open("rb") as file:
        lines = older.read_bytes().splitlines(True) if older.exists() else []
        lines += file.read().splitlines(True)
        for line in lines[-tail:] if tail else lines:
            yield line
        while True:
            alive = go_on()
            while block := file.read(LOG_BLOCK):
                yield block
            if not alive:
                return
            await asyncio.sleep(LOG_POLL_S)
            if file.tell() > path.stat().st_size:
                file.seek(0)


async def records(agent: Agent, kind: str, limit: int) -> dict[str, Any]:
    """The latest `wakes` or `events` of all nodes, oldest first."""
    answers = await agent.ask_all(say.AskRecords(kind, limit), ASK_S)
    merged = [row for data in answers.by_node.values() for row in msgspec.json.decode(data)]
    merged.sort(key=lambda row: row["at"])
    return {"records": merged[-limit:], "silent": list(answers.silent)}


async def processes(agent: Agent) -> bytes:
    """`{"processes": [...], "silent": [...]}`; the nodes' rows are joined without decoding them."""
    answers = await agent.ask_all(say.AskProcesses(), ASK_S)
    rows = b",".join(data[1:-1] for data in answers.by_node.values() if len(data) > 2)
    silent = msgspec.json.encode(answers.silent)
    return b'{"processes":[' + rows + b'],"silent":' + silent + b"}"


def describe_node(agent: Agent) -> dict[str, Any]:
    config = agent.config
    gateways = [f"{config.key}/gateway-{n}" for n in range(config.gateways)]
    linked = len(agent.nodes.live_nodes()) == len(config.cluster.nodes)
    return {
        "node": config.key,
        "incarnation": config.incarnation,
        "revision": agent.replica.revision,
        "whole": linked
        and not agent.lag.behind(config.key)
        and all(gateway in agent.room.members for gateway in gateways),
    }


def members(agent: Agent) -> dict[str, Any]:
    """Nodes, whether their hub is linked to ours, and what they told of themselves; `behind`: how
    many revisions of the store a node has yet to hear of."""
    live = set(agent.nodes.live_nodes())
    views = {view.name: view for view in agent.all_views()}
    rows = []
    for peer in agent.config.cluster.nodes:
        view = views.get(peer.key)
        rows.append(
            {
                "node": peer.key,
                "address": peer.address,
                "gateway": f"http://{peer.address}:{HTTP_PORT}",
                "linked": peer.key in live,
                "control": peer.key == agent.config.cluster.control,
                "asked": peer.key == agent.config.key,
                "drivers": view.drivers if view is not None else (),
                "instances": view.instances if view is not None else None,
                "behind": agent.lag.behind(peer.key),
            }
        )
    return {"members": rows}


def doctor(agent: Agent) -> dict[str, Any]:
    """Every driver, whether it works here, and how it enforces the defaults."""
    probes = agent.engines.probes.items()
    rows = [registry.describe(agent.engines.drivers[name], probe) for name, probe in probes]
    return {"node": agent.config.key, "drivers": rows}


def _audit(agent: Agent, who: Principal, action: str, target: str) -> None:
    agent.audit.add(Line(agent.clock.wall(), who.kind, who.uid, who.pid, action, target))
