"""What the control API does, without HTTP: each action takes an agent and who asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tabane import spec
from tabane.api.advice import advise
from tabane.api.checks import (
    check_command,
    check_container,
    check_env,
    check_instance,
    check_text,
)
from tabane.errors import NotFound, Unreachable, UsageError
from tabane.gateway.activation import StopAsked
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, Instance, InstanceId, NodeName, State
from tabane.node import messages as say
from tabane.node.config import HTTP_PORT, agent_of
from tabane.runtimes import registry
from tabane.runtimes.api import (
    Conversation,
    Execution,
    Handle,
    Image,
    TerminalSize,
    Transfer,
    User,
)
from tabane.runtimes.lookup import find_user
from tabane.scheduler.placement import NodeView
from tabane.security.audit import Line
from tabane.security.identity import Principal
from tabane.spec_fields import MAIN

if TYPE_CHECKING:
    from tabane.node.agent import Agent
    from tabane.node.running import Running

ASK_S = 2.0
"""How long nodes have to answer; one that is dead costs this once."""
APPS_AT_ONCE = 20
"""After so many that are described, others have their turn."""
EVENTS = 2000
"""So many back, an instance that has ended is looked for."""


async def list_apps(agent: Agent) -> dict[str, Any]:
    """Of all apps, written as they come: thousands of rows at once would take many times that."""
    found, silent = await _instances(agent)
    there = Counter(i.app for i in found)
    ready = Counter(i.app for i in found if i.state in STANDING)
    rows = bytearray(b"[")
    for number, app in enumerate(agent.all_apps()):
        told = {"ready": ready[app.key], "instances": there[app.key]}
        rows += b"," * bool(number) + msgspec.json.encode(_describe_here(agent, app) | told)
        if not number % APPS_AT_ONCE:
            await asyncio.sleep(0)  # sessions come meanwhile
    return {"apps": msgspec.Raw(bytes(rows + b"]")), "silent": silent}


async def show(agent: Agent, key: str) -> dict[str, Any]:
    """The app, its instances, what its homes know, its latest events and wakes."""
    app = agent.app(AppName(key))
    if app is None:
        raise NotFound(f"there is no app {key}")
    (aged, silent), homes, wakes, events = await asyncio.gather(  # a dead node costs ASK_S once
        _aged_instances(agent),
        agent.ask_all(say.AskApp(AppName(key)), ASK_S),
        records(agent, "wakes", 200),
        records(agent, "events", 500),
    )
    return {
        "app": _describe_here(agent, app),
        "advice": advise(app, agent.config.cluster.datacenters()),
        "instances": [_describe_aged(i, age_s) for i, age_s in aged if i.app == key],
        "homes": [home for data in homes.by_node.values() for home in msgspec.json.decode(data)],
        "wakes": [wake for wake in wakes["records"] if wake["app"] == key][-10:],
        "events": [event for event in events["records"] if event["app"] == key][-20:],
        "silent": sorted({*silent, *homes.silent, *wakes["silent"], *events["silent"]}),
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
    if app.pinned_to:
        added["volumes_on"] = app.pinned_to
    shown = spec.render_app(app)
    for row, container in zip(shown.get("containers", []), app.containers, strict=True):
        row["digest"] = container.image
    return shown | added


def _describe_here(agent: Agent, app: App) -> dict[str, Any]:
    """And why nodes take no sessions at its TCP ports, where they do not."""
    shown = describe_app(app)
    for row in shown.get("tcp", []):
        row["problems"] = agent.tcp.problems(row["port"])
    return shown


async def _instances(agent: Agent) -> tuple[list[Instance], list[str]]:
    aged, silent = await _aged_instances(agent)
    return [instance for instance, _ in aged], silent


async def _aged_instances(agent: Agent) -> tuple[list[tuple[Instance, float]], list[str]]:
    """With their ages in seconds, by their own nodes' clocks: ours may be another."""
    answers = await agent.ask_all(say.AskInstances(), ASK_S)
    found: list[tuple[Instance, float]] = []
    for told in map(say.parse, answers.by_node.values()):
        found += [
            (i, told.at - i.created_at) for i in told.instances if i.state is not State.ABSENT
        ]
    in_order = sorted(found, key=lambda one: (one[0].app, one[0].node, one[0].created_at))
    return in_order, list(answers.silent)


def _describe_aged(instance: Instance, age_s: float) -> dict[str, Any]:
    described: dict[str, Any] = msgspec.to_builtins(instance)
    return described | {"age_s": max(0.0, round(age_s, 1))}


def knows(agent: Agent, instance: InstanceId) -> bool:
    """Whether an instance, or what is left of it, is here."""
    runs = any(known.id == instance for known in agent.executor.instances())
    return runs or log_path(agent, instance).exists()


async def locate(agent: Agent, instance: InstanceId) -> NodeName:
    """The node that has an instance, or had it. Raises `NotFound`, or `Unreachable` when that may
    be one that does not answer."""
    found, silent = await _instances(agent)
    nodes = [i.node for i in found if i.id == instance]
    if not nodes:
        events = await records(agent, "events", EVENTS)
        nodes = [event["node"] for event in events["records"] if event["instance"] == instance]
    if nodes:
        return NodeName(nodes[-1])
    if silent:
        problem = f"instance {instance} is not on the nodes that answered"
        raise Unreachable(f"{problem} ({', '.join(silent)} did not)")
    raise NotFound(f"no node has an instance {instance}")


async def list_instances(agent: Agent) -> dict[str, Any]:
    found, silent = await _instances(agent)
    return {"instances": found, "silent": silent}


async def stop(agent: Agent, who: Principal, instance: str) -> dict[str, Any]:
    """Have the instance's home drain and stop it."""
    running = agent.executor.get(check_instance(instance))
    _audit(agent, who, "stop", f"{running.instance.app} instance {instance}")
    asked = StopAsked(running.instance.cohort, InstanceId(instance))
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
    *,
    user: str = "",
    workdir: str = "",
    env: dict[str, str] | None = None,
    stdin: bool = False,
    terminal: TerminalSize | None = None,
    container: str = "",
) -> Conversation:
    """Begin a command. `user` as in OCI: `name`, `name:group`, `uid`, `uid:gid`, of the image's
    own. `container`: in which of several; the main one."""
    check_command(argv)
    check_text("workdir", workdir)
    own = check_env(env or {})
    running, handle = await _entered(agent, instance)
    if workdir and not workdir.startswith("/"):
        raise UsageError(f"workdir: {workdir!r} is not an absolute path in the instance")
    name, image = container_of(running, container)
    execution = Execution(argv, _user_of(image, user), workdir, own, stdin, terminal, name)
    _audit(agent, who, "exec", f"{_describe(running, name)}: {' '.join(argv)}")
    return await running.driver.exec(handle, execution)


async def copy(
    agent: Agent,
    who: Principal,
    instance: str,
    path: str,
    *,
    inward: bool,
    as_named: bool = False,
    user: str = "",
    container: str = "",
) -> Conversation:
    """Begin to copy files as a tar stream, see `Transfer`."""
    if not check_text("path", path).startswith("/"):
        raise UsageError(f"path: {path!r} is not an absolute path in the instance")
    running, handle = await _entered(agent, instance)
    name, image = container_of(running, container)
    transfer = Transfer(path, inward, as_named, _user_of(image, user), name)
    action = "copy-in" if inward else "copy-out"
    _audit(agent, who, action, f"{_describe(running, name)}: {path}")
    return await running.driver.copy(handle, transfer)


async def _entered(agent: Agent, instance: str) -> tuple[Running, Handle]:
    """An instance in which something runs; it was thawed if need be."""
    running = agent.executor.get(check_instance(instance))
    await agent.executor.freezer.wait_awake(running)
    handle = running.record.handle
    if handle is None or running.instance.state is not State.READY:
        raise NotFound(f"instance {instance} is {running.instance.state}, nothing runs in it")
    return running, handle


def container_of(running: Running, container: str) -> tuple[str, Image]:
    """A container's name, which is empty for the main one's, and its image. Raises `NotFound`."""
    record = running.record
    images = {MAIN: record.image} | {each.name: each.image for each in record.sidecars}
    name = check_container(container) or MAIN
    if name not in images:
        there = f"instance {running.instance.id} of {record.app.key}"
        raise NotFound(f"{there} has no container {name} (it has: {', '.join(images)})")
    return "" if name == MAIN else name, images[name]


def _describe(running: Running, container: str) -> str:
    """For the audit log."""
    instance = f"{running.instance.app} instance {running.instance.id}"
    return f"{instance} container {container}" if container else instance


def _user_of(image: Image, user: str) -> User | None:
    return find_user(image.tree, check_text("user", user)) if user else None


def log_path(agent: Agent, instance: InstanceId) -> Path:
    return agent.config.paths.instance_logs / instance / "log"


async def records(agent: Agent, kind: str, limit: int) -> dict[str, Any]:
    """The latest `wakes` or `events` of all nodes, oldest first."""
    answers = await agent.ask_all(say.AskRecords(kind, limit), ASK_S)
    merged = [row for data in answers.by_node.values() for row in msgspec.json.decode(data)]
    merged.sort(key=lambda row: row["at"])
    return {"records": merged[-limit:], "silent": list(answers.silent)}


def describe_node(agent: Agent) -> dict[str, Any]:
    config = agent.config
    parts = [f"{config.key}/gateway-{n}" for n in range(config.gateways)]
    parts += [agent_of(peer.key) for peer in config.cluster.nodes]
    seen = agent.room.members
    linked = agent.session.is_open and len(agent.nodes.live_nodes()) == len(config.cluster.nodes)
    return {
        "node": config.key,
        "incarnation": config.incarnation,
        "revision": agent.replica.revision,
        "whole": linked
        and not agent.lag.behind(config.key)
        and all(part in seen and seen[part].known for part in parts),
    }


def members(agent: Agent) -> dict[str, Any]:
    """Nodes, whether their hub is linked to ours, and what they told of themselves; `behind`: how
    many revisions of the store a node has yet to hear of. `silent`: those whose agent no hub hears,
    whether it ended, hangs or is cut off."""
    live = set(agent.nodes.live_nodes())
    views = {view.name: view for view in agent.all_views()}
    rows, peers = [], agent.config.cluster.nodes
    for peer in peers:
        view = views.get(peer.key)
        rows.append(
            {
                "node": peer.key,
                "address": peer.address,
                "gateway": f"http://{peer.address}:{HTTP_PORT}",
                "linked": peer.key in live,
                "control": peer.key == agent.config.cluster.control,
                "asked": peer.key == agent.config.key,
                "drivers": _working(view),
                "instances": view.instances if view is not None else None,
                "behind": agent.lag.behind(peer.key),
            }
        )
    return {"members": rows, "silent": [peer.key for peer in peers if peer.key not in views]}


def _working(view: NodeView | None) -> tuple[str, ...]:
    return tuple(e.name for e in view.engines if not e.broken) if view is not None else ()


def doctor(agent: Agent) -> dict[str, Any]:
    """Every driver, whether it works here, and how it enforces the defaults."""
    probes = agent.engines.probes.items()
    rows = [registry.describe(agent.engines.drivers[name], probe) for name, probe in probes]
    return {"node": agent.config.key, "drivers": rows}


def note(agent: Agent, who: Principal, action: str, target: str) -> None:
    """Have it in the audit log."""
    _audit(agent, who, action, target)


def _audit(agent: Agent, who: Principal, action: str, target: str) -> None:
    line = Line(agent.clock.wall(), who.kind, who.uid, who.pid, action, target, via=who.via)
    agent.audit.add(line)
