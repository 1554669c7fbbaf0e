"""How apps are stored and go again: an app file, or many of them in one commit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tabane import spec
from tabane.api.actions import ASK_S, describe_app, note
from tabane.api.advice import advise, doubt
from tabane.api.checks import check_digest, check_text
from tabane.errors import Denied, NotFound, UsageError
from tabane.images.oci import LINUX, SOLO5
from tabane.images.store import HOST
from tabane.model import App, AppName, Class
from tabane.node import messages as say
from tabane.node.control import SAME_OWNER
from tabane.runtimes.api import Image
from tabane.runtimes.lookup import resolve
from tabane.runtimes.unikernel.manifest import parse_unikernel
from tabane.scheduler.engines import EngineView, misfit
from tabane.scheduler.placement import NodeView
from tabane.security.identity import Principal
from tabane.spec_readers import Mistake
from tabane.units import shorten

if TYPE_CHECKING:
    from tabane.node.agent import Agent

MOST_BYTES = 512 << 10
"""Of all files of one commit, which goes to every node in one message of at most 1 MiB."""


class AppFile(NamedTuple):
    """An app file's text and name, the digest of its image (or `host`), and those of its containers
    that have one of their own; the uid of whose it is to be, if that was told."""

    text: str
    file: str
    image: str
    images: Mapping[str, str] = MappingProxyType({})
    owner: int | None = None


async def deploy(
    agent: Agent, who: Principal, file: AppFile, *, force: bool = False
) -> dict[str, Any]:
    """Store the app, unless it is as it was; then ask who knows it already."""
    app = await _read(agent, who, file)
    deployed = await agent.control(say.DeployApp(app, force))
    _note(agent, who, deployed)
    said = {"changed": deployed.changed, "warnings": _warnings(agent, deployed, agent.all_views())}
    return describe_app(deployed.app) | said | await _who_knows(agent, deployed.revision)


async def deploy_all(
    agent: Agent, who: Principal, files: Sequence[AppFile], *, force: bool = False
) -> dict[str, Any]:
    """The same of many, in one commit; none of them is stored when one cannot be. Of each is told
    what became of it, not what it is."""
    if (size := sum(len(file.text.encode(errors="replace")) for file in files)) > MOST_BYTES:
        together = f"these {len(files)} files have {size} bytes together"
        raise UsageError(f"{together}: send at most {MOST_BYTES} at once")
    apps: dict[AppName, App] = {}
    for file in files:
        app = await _read(agent, who, file)
        if apps.setdefault(app.key, app) is not app:
            raise UsageError(f"{file.file}: another of these files is for {app.key}, too")
        await asyncio.sleep(0)  # sessions come meanwhile
    deployed = (await agent.control(say.DeployApps(tuple(apps.values()), force))).apps
    views, rows = agent.all_views(), []
    for each in deployed:
        _note(agent, who, each)
        row = {"namespace": each.app.namespace, "name": each.app.name}
        row |= {"revision": each.app.revision, "changed": each.changed}
        rows.append(row | {"warnings": _warnings(agent, each, views)})
        await asyncio.sleep(0)
    revision = max((each.revision for each in deployed), default=0)
    return {"apps": rows} | await _who_knows(agent, revision)


async def _read(agent: Agent, who: Principal, given: AppFile) -> App:
    """The app that a file declares, if it can be run; with what the cluster knows of its images."""
    text, file = check_text("text", given.text), check_text("file", given.file)
    app = with_digests(spec.parse_app(text, file=file), given.image, given.images)
    for digest, _ in app.images():
        if digest != HOST and not agent.images.store.has(check_digest(digest)):
            raise NotFound(f"image {digest} is not on {agent.config.key}: send it first")
    kind = agent.images.kind_of(given.image)
    app = msgspec.structs.replace(app, image_kind=kind, owner=owner_for(who, given.owner))
    try:
        _check_driver(agent, app)
        await _check_image(agent, app)
    except Mistake as mistake:
        raise spec.error_of(mistake, file=file, text=text) from None
    return app


def owner_for(who: Principal, wanted: int | None) -> int:
    """Whose an app is to be that is deployed by `who`. Raises `Denied` for another's name."""
    own = SAME_OWNER if who.is_root else who.uid
    if wanted in (None, who.uid) or who.is_root:
        return own if wanted is None else wanted
    raise Denied(f"owner: uid {who.uid} may not deploy in the name of uid {wanted}: use sudo")


def _note(agent: Agent, who: Principal, deployed: say.Deployed) -> None:
    note(agent, who, "deploy", f"{deployed.app.key} revision {deployed.app.revision}")


def with_digests(app: App, image: str, images: Mapping[str, str]) -> App:
    """The app with what its images are now. Raises `UsageError` when these do not fit it."""
    wanted = {each.name for each in app.containers if each.source}
    if wanted != images.keys():
        names = ", ".join(sorted(wanted)) or "none"
        raise UsageError(f"images: the containers with one of their own are: {names}")
    containers = tuple(
        msgspec.structs.replace(each, image=images.get(each.name, image)) for each in app.containers
    )
    return msgspec.structs.replace(app, image=image, containers=containers)


def _warnings(agent: Agent, deployed: say.Deployed, views: Sequence[NodeView]) -> list[str]:
    warnings = advise(deployed.app, agent.config.cluster.datacenters())
    warnings += doubt(deployed.app, views)
    if (before := deployed.unscaled) is not None:
        now = deployed.app.reactive
        back = f"min is {now.min} and max {now.max} again, as the file says"
        warnings.append(f"{back}; `tabane scale` had set {before.min} and {before.max}")
    return warnings


def _check_driver(agent: Agent, app: App) -> None:
    """Refuse what no driver of this version can run, on whatever machine."""
    drivers = agent.engines.drivers
    classes = {driver.isolation for driver in drivers.values()}
    if app.isolation is Class.AUTO:
        return
    if app.isolation not in classes:
        known = ", ".join(sorted(classes))
        raise Mistake("class", f"no driver runs class {app.isolation} yet (there are: {known})")
    if app.driver and app.driver not in drivers:
        raise Mistake("driver", f"there is none named {app.driver} ({', '.join(drivers)})")
    if app.driver and drivers[app.driver].isolation is not app.isolation:
        raise Mistake("driver", f"{app.driver} does not run class {app.isolation}")
    fit = [driver for name, driver in drivers.items() if driver.isolation is app.isolation]
    fit = [driver for driver in fit if app.driver in ("", driver.name)]
    if app.containers and not any(driver.capabilities.pods for driver in fit):
        able = sorted({each.isolation for each in drivers.values() if each.capabilities.pods})
        who = f"driver {app.driver}" if app.driver else f"class {app.isolation}"
        raise Mistake("containers", f"{who} has only the main one: class {' or '.join(able)} can")


async def _check_image(agent: Agent, app: App) -> None:
    """Refuse an image that the app's class does not run; one that is a program must be one."""
    drivers = agent.engines.drivers.values()
    views = (EngineView(d.name, d.isolation, d.capabilities.images) for d in drivers)
    if reason := misfit(app, views):
        raise Mistake("image", f"{shorten(app.source)} {reason}")
    if app.image_kind != LINUX:
        try:
            image = await agent.images.prepare(app.image, app.source)
            if app.image_kind == SOLO5:
                await asyncio.to_thread(_check_unikernel, image)
        except UsageError as error:
            raise Mistake("image", error.message) from None
    for number, container in enumerate(app.containers, 1):
        if (kind := agent.images.kind_of(container.image)) != LINUX:
            problem = f"is a {kind} image: what runs beside a main program is one of Linux"
            raise Mistake(f"containers[{number}].image", problem)


def _check_unikernel(image: Image) -> None:
    """Raises `UsageError` for a file without what solo5 writes into each unikernel."""
    path = resolve(image.tree, image.entrypoint[0])
    assert path is not None
    parse_unikernel(path.read_bytes())


async def remove(agent: Agent, who: Principal, key: str) -> dict[str, Any]:
    deployed = await agent.control(say.RemoveApp(AppName(key)))
    note(agent, who, "remove", key)
    return {"name": key} | await _who_knows(agent, deployed.revision)


async def remove_all(agent: Agent, who: Principal, keys: Sequence[str]) -> dict[str, Any]:
    """The same of many, in one commit; none of them is removed when one is not there."""
    names = tuple(dict.fromkeys(map(AppName, keys)))
    removed = (await agent.control(say.RemoveApps(names))).apps
    for name in names:
        note(agent, who, "remove", name)
    revision = max((each.revision for each in removed), default=0)
    return {"names": names} | await _who_knows(agent, revision)


async def scale(
    agent: Agent, who: Principal, key: str, low: int | None, high: int | None
) -> dict[str, Any]:
    if low is None and high is None:
        raise UsageError("scale: give min, max, or both")
    deployed = await agent.control(say.ScaleApp(AppName(key), low, high))
    note(agent, who, "scale", f"{key} min {low} max {high}")
    return describe_app(deployed.app) | await _who_knows(agent, deployed.revision)


async def _who_knows(agent: Agent, revision: int) -> dict[str, Any]:
    """Data centers where every node has this revision, and those where one did not say so."""
    answers = await agent.ask_all(say.AskKnown(revision), ASK_S)
    failed = [node for node, answer in answers.by_node.items() if answer]
    silent = {node.partition("/")[0] for node in (*answers.silent, *failed)}
    datacenters = agent.config.cluster.datacenters()
    return {
        "known": [dc for dc in datacenters if dc not in silent],
        "unreachable": sorted(silent),
    }
