"""The volumes of the cluster's nodes: which there are, and how one is removed for good.

Which node has an app's volumes is stored (`control.VOLUMES`); the files are the node's own. A
volume is removed by itself only, never with its app: data is the last thing to lose by mistake.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from tabane.errors import Conflict, NotFound, Unreachable
from tabane.model import AppName, NodeName, Value
from tabane.node import messages as say
from tabane.node.calling import call
from tabane.node.control import VOLUMES

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ASK_S = 2.0
DROP_S = 30.0
"""A large file takes its file system a while to remove."""
HINT = "look with `tabane volume ls`, and do it again if need be"


class VolumeView(Value, frozen=True):
    """A volume as its node tells of it. `disk_bytes`: what it takes of the node's disk."""

    node: NodeName
    app: AppName
    name: str
    size_bytes: int
    disk_bytes: int
    deployed: bool
    """The app is deployed, with this volume."""
    in_use: str
    """The instance that has it mounted; empty: none."""


async def list_own(agent: Agent) -> list[VolumeView]:
    """Those of this node."""
    found = await asyncio.to_thread(lambda: list(agent.executor.volumes.sizes()))
    return [
        VolumeView(
            agent.config.key,
            AppName(key),
            name,
            size_bytes,
            disk_bytes,
            _is_deployed(agent, AppName(key), name),
            agent.executor.volume_holder(AppName(key)),
        )
        for key, name, size_bytes, disk_bytes in found
    ]


def _is_deployed(agent: Agent, key: AppName, name: str) -> bool:
    app = agent.app(key)
    return app is not None and any(volume.name == name for volume in app.volumes)


async def list_all(agent: Agent) -> tuple[list[VolumeView], list[str]]:
    """Those of all nodes, and which nodes did not say."""
    answers = await agent.ask_all(say.AskVolumes(), ASK_S)
    rows = [
        row
        for data in answers.by_node.values()
        for row in msgspec.json.decode(data, type=list[VolumeView])
    ]
    return sorted(rows, key=lambda row: (row.app, row.name)), list(answers.silent)


async def drop_own(agent: Agent, key: AppName, name: str) -> say.VolumesLeft:
    """Remove a volume of this node. Raises `Conflict` when it is in use, `NotFound`."""
    files = agent.executor.volumes
    if _is_deployed(agent, key, name):
        raise Conflict(f"{key} uses its volume {name}: deploy it without, or remove it, first")
    if user := agent.executor.volume_user(key):
        raise Conflict(f"instance {user} of {key} still has its volumes: wait until it is gone")
    if not files.file(key, name).exists():
        raise NotFound(f"{key} has no volume {name} on {agent.config.key}")
    await asyncio.to_thread(files.remove, key, name)
    return say.VolumesLeft(tuple(row.name for row in await list_own(agent) if row.app == key))


async def drop(agent: Agent, key: AppName, name: str) -> NodeName:
    """Remove a volume, wherever it is; returns where it was."""
    node = node_of_volumes(agent, key)
    if node == agent.config.key:
        left = await drop_own(agent, key, name)
    else:
        left = await call(agent, node, say.DropVolume(key, name), timeout_s=DROP_S, hint=HINT)
    if not left.names:
        await _forget(agent, key)
    return node


async def give_up(agent: Agent, key: AppName) -> NodeName:
    """Forget the volumes of an app, as their node is lost. Raises `Conflict` when it is there."""
    node = node_of_volumes(agent, key)
    rows, silent = await list_all(agent)
    if node not in silent:
        names = ", ".join(row.name for row in rows if row.app == key) or "none"
        raise Conflict(f"{node} is there, with volumes of {key} ({names}): remove them by name")
    await _forget(agent, key)
    return node


def node_of_volumes(agent: Agent, key: AppName) -> NodeName:
    """Raises `NotFound`."""
    entry = agent.replica.get(VOLUMES + key)
    if entry is None:
        raise NotFound(f"{key} has no volumes")
    return NodeName(entry.value.decode())


async def _forget(agent: Agent, key: AppName) -> None:
    if agent.apps is not None:
        await agent.apps.forget_volumes(key)
        return
    control = agent.config.cluster.control
    try:
        await call(agent, control, say.ForgetVolumes(key), timeout_s=DROP_S, hint=HINT)
    except Unreachable as error:
        problem = f"the volume is gone, but {control} could not be told so: {error}"
        raise Unreachable(problem, retry_after_s=error.retry_after_s) from error
