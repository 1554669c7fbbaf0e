"""On the control node: the transactions on apps, and the controller that spreads `min`.

Keys in the store:

    apps/NAMESPACE/NAME     an `App`, the current revision
    hosts/HOST              the app that has this HTTP name
    tcp/PORT                the app that has this TCP port, at every gateway
    ids/BASE                the app that has this range of ids
    floors/NAMESPACE/NAME   how many instances each data center keeps of an app with a `min`; of
                            others there is none
    volumes/NAMESPACE/NAME  the node that has the app's volumes; stays when the app is removed
    triggers/NAMESPACE/NAME/TRIGGER  which moments of a timer were begun (`tabane.node.timers`)
    last_ids                behind which range of ids the next is looked for
    last_revision           the latest revision that an app had which was removed; those of new apps
                            come after it, so that nothing which a node knows of a revision, or has
                            running or saved of it, passes for one of another app of that name
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from tabane.clock import Clock
from tabane.errors import Conflict, Denied, NotFound, TabaneError, UsageError
from tabane.model import App, AppName, Class, NodeName
from tabane.node.messages import (
    DeployApp,
    DeployApps,
    Deployed,
    DeployedApps,
    RemoveApp,
    RemoveApps,
    ScaleApp,
)
from tabane.scheduler.placement import Choice, floors
from tabane.spec_readers import LARGEST
from tabane.store.api import Entry, Store
from tabane.store.edit import Edit, Overtaken

APPS = "apps/"
HOSTS = "hosts/"
TCP = "tcp/"
IDS = "ids/"
FLOORS = "floors/"
VOLUMES = "volumes/"
LAST_IDS = "last_ids"
LAST_REVISION = "last_revision"

FIRST_ID_BASE = 1 << 24
ID_RANGE = 1 << 16
ID_RANGES = (1 << 15) - (1 << 8)
"""Ranges of 65,536 ids between 2^24 and 2^31, where no distribution gives ids to people."""

SAME_OWNER = -1
"""The owner of an app that is to be deployed: whose it was, or else root."""
LOWEST_FREE_PORT = 1024
SPREAD_WRITES = 1000
"""In one commit, which has to fit into one message to every node."""

log = logging.getLogger(__name__)

T = TypeVar("T")
Request = DeployApp | DeployApps | RemoveApp | RemoveApps | ScaleApp
Ready = Mapping[AppName, Mapping[str, int]]
"""Ready instances of each app by data center."""

encode = msgspec.json.Encoder().encode
parse_app = msgspec.json.Decoder(App).decode
parse_floors = msgspec.json.Decoder(dict[str, int]).decode


def sound_app(key: str, value: bytes) -> App | None:
    """The app stored under `key`; None, with a word in the log, if no node can work with it."""
    try:
        app = parse_app(value)
    except msgspec.DecodeError as error:
        log.error("%s is left out: %s", key, error)
        return None
    reactive = app.reactive
    numbers = (reactive.min, reactive.max, reactive.concurrency, reactive.queue)
    if all(0 <= number <= LARGEST for number in numbers):
        return app
    log.error("%s is left out: its numbers %s are not from 0 to %d", key, numbers, LARGEST)
    return None


class Apps:
    """Deploy, remove and scale, each one transaction, however many apps it is for; repeated when
    another came between. `place` picks the node for the volumes of an app that has none yet."""

    def __init__(self, store: Store, clock: Clock, place: Callable[[App], Choice]) -> None:
        self._store = store
        self._clock = clock
        self._place = place

    async def perform(self, request: Request) -> Deployed | DeployedApps:
        """Do what another node asks for."""
        match request:
            case DeployApp(app=wanted, force=force):
                return await self.deploy(wanted, force=force)
            case DeployApps(apps=all_wanted, force=force):
                return DeployedApps(tuple(await self.deploy_all(all_wanted, force=force)))
            case RemoveApp(app=key):
                return Deployed(*await self.remove(key))
            case RemoveApps(apps=keys):
                removed, revision = await self.remove_all(keys)
                return DeployedApps(tuple(Deployed(app, revision) for app in removed))
            case ScaleApp(app=key, min=low, max=high):
                return Deployed(*await self.scale(key, low, high))

    async def deploy(self, wanted: App, *, force: bool = False) -> Deployed:
        """Store `wanted` as the next revision of its app, unless that is the same already (and not
        `force`). Raises `Conflict` when another app has one of its hosts or TCP ports, `Denied`
        for a port that takes root.
        """
        return (await self.deploy_all([wanted], force=force))[0]

    async def deploy_all(self, wanted: Sequence[App], *, force: bool = False) -> list[Deployed]:
        """The same of many, in one commit; none is stored when one cannot be."""
        return await self._edit(lambda edit: self._deploy_all(edit, wanted, force))

    async def _deploy_all(
        self, edit: Edit, wanted: Sequence[App], force: bool
    ) -> Callable[[int], list[Deployed]]:
        done = []
        for app in wanted:
            with _naming(app.key, one_of=len(wanted)):
                done.append(await self._deploy(edit, app, force))
        return lambda revision: [finish(revision) for finish in done]

    async def _deploy(self, edit: Edit, wanted: App, force: bool) -> Callable[[int], Deployed]:
        entry, old = await _read(edit, wanted.key)
        if wanted.owner == SAME_OWNER:
            wanted = msgspec.structs.replace(wanted, owner=old.owner if old is not None else 0)
        if entry is not None and old is not None and not force and is_as_declared(old, wanted):
            unchanged = Deployed(old, entry.version, changed=False)
            return lambda revision: unchanged
        bases = await self._own_ids(edit, wanted, old)
        app = msgspec.structs.replace(
            wanted,
            pinned_to=await self._pin(edit, wanted, old),
            revision=(old.revision if old is not None else await _last_revision(edit)) + 1,
            id_base=bases[0],
            trusted_id_base=bases[1] if len(bases) > 1 else 0,
            deployed_at=self._clock.wall(),
        )
        await self._claim(edit, app, old)
        await _put(edit, app)
        unscaled = old.reactive if old is not None and old.declared is not None else None
        return lambda revision: Deployed(app, revision, unscaled=unscaled)

    async def _claim(self, edit: Edit, app: App, old: App | None) -> None:
        """Its host names and TCP ports, each of which belongs to one app."""
        check_low_ports(app)
        for key, what in claims_of(app).items():
            taken = await edit.get(key)
            if taken is not None and taken.value.decode() != app.key:
                other = taken.value.decode()
                raise Conflict(f"{what} leads to {other} already: remove it there first")
            edit.put(key, app.key.encode())
        for key in sorted(claims_of(old).keys() - claims_of(app).keys()) if old else ():
            edit.delete(key)

    async def _pin(self, edit: Edit, wanted: App, old: App | None) -> NodeName:
        """The node that has the app's volumes, or is to have them. Raises `UsageError`."""
        if not wanted.volumes:
            return NodeName("")
        _check_sizes(wanted, old)
        entry = await edit.get(VOLUMES + wanted.key)
        if entry is not None:
            node = NodeName(entry.value.decode())
            if not wanted.placement.allows(node.partition("/")[0]):
                raise Conflict(f"placement: the app's volumes are on {node}, where it may not run")
            return node
        choice = self._place(wanted)
        if choice.node is None:
            raise UsageError(f"volumes: no node can have them: {'; '.join(choice.reasons)}")
        edit.put(VOLUMES + wanted.key, choice.node.encode())
        return choice.node

    async def forget_volumes(self, key: AppName) -> int:
        """An app's volumes are gone, or given up: a node is picked anew when it has some again.
        Returns the commit. Raises `Conflict` when the app has some, `NotFound`."""
        return await self._edit(lambda edit: self._forget_volumes(edit, key))

    async def _forget_volumes(self, edit: Edit, key: AppName) -> Callable[[int], int]:
        _, app = await _read(edit, key)
        if app is not None and app.volumes:
            raise Conflict(f"{key} uses its volumes: remove the app first, or deploy it without")
        if await edit.get(VOLUMES + key) is None:
            raise NotFound(f"{key} has no volumes")
        edit.delete(VOLUMES + key)
        return lambda revision: revision

    async def remove(self, key: AppName) -> tuple[App, int]:
        """Remove an app; returns it as it was, and the commit. Raises `NotFound`."""
        (app,), revision = await self.remove_all([key])
        return app, revision

    async def remove_all(self, keys: Sequence[AppName]) -> tuple[list[App], int]:
        """The same of many, in one commit; none is removed when one is not there."""
        return await self._edit(lambda edit: self._remove_all(edit, keys))

    async def _remove_all(
        self, edit: Edit, keys: Sequence[AppName]
    ) -> Callable[[int], tuple[list[App], int]]:
        removed = []
        for key in keys:
            app = await _read_known(edit, key)
            for what in (*claims_of(app), *(IDS + str(base) for base in app.id_bases)):
                edit.delete(what)
            edit.delete(APPS + key)
            edit.delete(FLOORS + key)
            removed.append(app)
        latest = max((app.revision for app in removed), default=0)
        if latest > await _last_revision(edit):
            edit.put(LAST_REVISION, str(latest).encode())
        return lambda revision: (removed, revision)

    async def scale(self, key: AppName, low: int | None, high: int | None) -> tuple[App, int]:
        """Change `min` and `max` of the current revision; without `high`, `max` is raised to a
        larger `min`. Raises `NotFound`, `UsageError`."""
        return await self._edit(lambda edit: self._scale(edit, key, low, high))

    async def _scale(
        self, edit: Edit, key: AppName, low: int | None, high: int | None
    ) -> Callable[[int], tuple[App, int]]:
        app = await _read_known(edit, key)
        low = app.reactive.min if low is None else low
        high = max(app.reactive.max, low) if high is None else high
        if not 0 <= low <= high or high < 1:
            problem = f"min {low} and max {high} do not fit: 0 <= min <= max, and max at least 1"
            raise UsageError(f"{key}: {problem}")
        if high > LARGEST:
            raise UsageError(f"{key}: {high} is too many: at most {LARGEST}")
        if app.volumes and high > 1:
            raise UsageError(f"{key}: it has volumes, so there is one instance at most")
        reactive = msgspec.structs.replace(app.reactive, min=low, max=high)
        before = app.declared or app.reactive
        declared = before if before != reactive else None
        scaled = msgspec.structs.replace(app, reactive=reactive, declared=declared)
        await _put(edit, scaled)
        return lambda revision: (scaled, revision)

    async def spread(self, datacenters: Iterable[str], ready: Ready) -> None:
        """Store each app's share of `min` by data center, where it changed."""
        live = tuple(datacenters)
        while await self._edit(lambda edit: self._spread(edit, live, ready)):
            pass

    async def _spread(
        self, edit: Edit, live: tuple[str, ...], ready: Ready
    ) -> Callable[[int], bool]:
        """One commit's worth of it; whether there was anything to store."""
        _, stored = await self._store.range(FLOORS)
        for entry in stored:
            if len(edit) == SPREAD_WRITES:
                break
            known = await edit.get(entry.key)
            app = await _read_sound(edit, AppName(entry.key.removeprefix(FLOORS)))
            if app is None or not app.reactive.min:
                edit.delete(entry.key)
                continue
            shares = encode(floors(app, live, ready.get(app.key, {})))
            if known is None or shares != known.value:
                edit.put(entry.key, shares)
        return lambda revision: bool(edit)

    async def _own_ids(self, edit: Edit, wanted: App, old: App | None) -> list[int]:
        """The ranges of ids that an app has or takes now: one, or of class `auto` one for each
        cohort. What it once had it keeps."""
        bases = list(old.id_bases) if old is not None else []
        missing = (2 if wanted.isolation is Class.AUTO else 1) - len(bases)
        return bases + (await _take_ids(edit, wanted.key, missing) if missing > 0 else [])

    async def _edit(self, change: Callable[[Edit], Awaitable[Callable[[int], T]]]) -> T:
        """Read and commit, again when overtaken; each round one of those who compete gets through.
        `change` returns what its commit's revision makes of it."""
        while True:
            edit = Edit(self._store)
            finish = await change(edit)
            try:
                return finish(await edit.commit() if edit else 0)
            except Overtaken:
                await asyncio.sleep(0)


async def _put(edit: Edit, app: App) -> None:
    """An app's new text; those with a `min`, and no others, have floors."""
    edit.put(APPS + app.key, encode(app))
    has_floors = await edit.get(FLOORS + app.key) is not None
    if app.reactive.min and not has_floors:
        edit.put(FLOORS + app.key, encode({}))
    elif has_floors and not app.reactive.min:
        edit.delete(FLOORS + app.key)


async def _take_ids(edit: Edit, key: AppName, count: int) -> list[int]:
    """So many that nobody has, from behind the last that was taken. Raises `Conflict`."""
    last = await edit.get(LAST_IDS)
    first, bases = int(last.value) if last is not None else 0, list[int]()
    for step in range(ID_RANGES):
        base = FIRST_ID_BASE + (first + step) % ID_RANGES * ID_RANGE
        if await edit.get(IDS + str(base)) is None:
            bases.append(base)
            edit.put(IDS + str(base), key.encode())
        if len(bases) == count:
            edit.put(LAST_IDS, str((first + step + 1) % ID_RANGES).encode())
            return bases
    raise Conflict(f"all {ID_RANGES} id ranges are taken: remove apps that are not needed")


async def _last_revision(edit: Edit) -> int:
    last = await edit.get(LAST_REVISION)
    return int(last.value) if last is not None else 0


async def _read(edit: Edit, key: AppName) -> tuple[Entry | None, App | None]:
    entry = await edit.get(APPS + key)
    return entry, parse_app(entry.value) if entry is not None else None


async def _read_known(edit: Edit, key: AppName) -> App:
    _, app = await _read(edit, key)
    if app is None:
        raise NotFound(f"there is no app {key}")
    return app


async def _read_sound(edit: Edit, key: AppName) -> App | None:
    entry = await edit.get(APPS + key)
    return sound_app(entry.key, entry.value) if entry is not None else None


@contextmanager
def _naming(key: AppName, *, one_of: int) -> Iterator[None]:
    """Have an error say which of several apps it is about."""
    try:
        yield
    except TabaneError as error:
        if one_of > 1:
            raise type(error)(f"{key}: {error.message}") from None
        raise


def claims_of(app: App) -> dict[str, str]:
    """The keys of what only one app can have, and what each is in words."""
    hosts = {HOSTS + host: f"hosts: {host}" for host in app.hosts}
    return hosts | {f"{TCP}{each.port}": f"tcp: port {each.port}" for each in app.tcp}


def check_low_ports(app: App) -> None:
    """As elsewhere in UNIX, the ports of well-known services are root's to give away. Raises
    `Denied`."""
    low = [each.port for each in app.tcp if each.port < LOWEST_FREE_PORT]
    if low and app.owner:
        whose = f"below {LOWEST_FREE_PORT} only root may have ports"
        raise Denied(f"tcp: port {low[0]}: {whose}: take another one, or deploy as root")


def is_as_declared(stored: App, wanted: App) -> bool:
    """Whether `wanted` says what the stored app's file said; what `scale` did since does not
    count, nor what the cluster added."""
    declared = msgspec.structs.replace(stored, reactive=stored.declared or stored.reactive)
    plain = App("", "")
    ids = ("id_base", "trusted_id_base")
    added = (*ids, "pinned_to", "revision", "deployed_at", "declared")
    same = {name: getattr(plain, name) for name in added}
    return msgspec.structs.replace(declared, **same) == msgspec.structs.replace(wanted, **same)


def _check_sizes(wanted: App, old: App | None) -> None:
    before = {volume.name: volume.size_bytes for volume in old.volumes} if old is not None else {}
    for volume in wanted.volumes:
        if volume.size_bytes < before.get(volume.name, 0):
            raise UsageError(f"volumes: {volume.name} cannot shrink: leave its size, or enlarge it")
