"""On the control node: the transactions on apps, and the controller that spreads `min`.

Keys in the store:

    apps/NAMESPACE/NAME     an `App`, the current revision
    hosts/HOST              the app that has this HTTP name
    tcp/PORT                the app that has this TCP port, at every gateway
    ids/BASE                the app that has this range of ids
    floors/NAMESPACE/NAME   how many instances each data center keeps of an app with a `min`
    volumes/NAMESPACE/NAME  the node that has the app's volumes; stays when the app is removed
    triggers/NAMESPACE/NAME/TRIGGER  which moments of a timer were begun (`tabane.node.timers`)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from tabane.clock import Clock
from tabane.errors import Conflict, Denied, NotFound, UsageError
from tabane.model import App, AppName, Class, NodeName
from tabane.node.messages import DeployApp, Deployed, RemoveApp, ScaleApp
from tabane.scheduler.placement import Choice, floors
from tabane.spec_readers import LARGEST
from tabane.store.api import Delete, Entry, Expect, Put, Store, Write

APPS = "apps/"
HOSTS = "hosts/"
TCP = "tcp/"
IDS = "ids/"
FLOORS = "floors/"
VOLUMES = "volumes/"
LAST_IDS = "last_ids"

FIRST_ID_BASE = 1 << 24
ID_RANGE = 1 << 16
ID_RANGES = (1 << 15) - (1 << 8)
"""Ranges of 65,536 ids between 2^24 and 2^31, where no distribution gives ids to people."""

LOWEST_FREE_PORT = 1024
SPREAD_WRITES = 1000
"""In one commit, which has to fit into one message to every node."""

log = logging.getLogger(__name__)

T = TypeVar("T")
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
    """Deploy, remove and scale, each one transaction; repeated when another came between. `place`
    picks the node for the volumes of an app that has none yet."""

    def __init__(self, store: Store, clock: Clock, place: Callable[[App], Choice]) -> None:
        self._store = store
        self._clock = clock
        self._place = place

    async def perform(self, request: DeployApp | RemoveApp | ScaleApp) -> Deployed:
        """Do what another node asks for."""
        match request:
            case DeployApp(app=wanted, force=force):
                return await self.deploy(wanted, force=force)
            case RemoveApp(app=key):
                return Deployed(*await self.remove(key))
            case ScaleApp(app=key, min=low, max=high):
                return Deployed(*await self.scale(key, low, high))

    async def deploy(self, wanted: App, *, force: bool = False) -> Deployed:
        """Store `wanted` as the next revision of its app, unless that is the same already (and not
        `force`). Raises `Conflict` when another app has one of its hosts or TCP ports, `Denied`
        for a port that takes root.
        """
        return await _repeat(lambda: self._deploy(wanted, force))

    async def _deploy(self, wanted: App, force: bool) -> Deployed:
        entry, old = await self._read(wanted.key)
        if entry is not None and old is not None and not force and is_as_declared(old, wanted):
            return Deployed(old, entry.version, changed=False)
        bases, writes, expect = await self._own_ids(wanted, old)
        pinned_to = await self._pin(wanted, old, writes, expect)
        app = msgspec.structs.replace(
            wanted,
            pinned_to=pinned_to,
            revision=old.revision + 1 if old else 1,
            id_base=bases[0],
            trusted_id_base=bases[1] if len(bases) > 1 else 0,
            deployed_at=self._clock.wall(),
        )
        await self._claim(app, old, writes, expect)
        writes.append(Put(APPS + app.key, encode(app)))
        expect.append(Expect(APPS + app.key, entry.version if entry else 0))
        unscaled = old.reactive if old is not None and old.declared is not None else None
        return Deployed(app, await self._commit(writes, expect), unscaled=unscaled)

    async def _claim(
        self, app: App, old: App | None, writes: list[Write], expect: list[Expect]
    ) -> None:
        """Its host names and TCP ports, each of which belongs to one app."""
        check_low_ports(app)
        for key, what in claims_of(app).items():
            taken = await self._store.get(key)
            if taken is not None and taken.value.decode() != app.key:
                other = taken.value.decode()
                raise Conflict(f"{what} leads to {other} already: remove it there first")
            writes.append(Put(key, app.key.encode()))
            expect.append(Expect(key, taken.version if taken else 0))
        dropped = claims_of(old).keys() - claims_of(app).keys() if old else set()
        writes += [Delete(key) for key in sorted(dropped)]

    async def _pin(
        self, wanted: App, old: App | None, writes: list[Write], expect: list[Expect]
    ) -> NodeName:
        """The node that has the app's volumes, or is to have them. Raises `UsageError`."""
        if not wanted.volumes:
            return NodeName("")
        _check_sizes(wanted, old)
        entry = await self._store.get(VOLUMES + wanted.key)
        if entry is not None:
            node = NodeName(entry.value.decode())
            if not wanted.placement.allows(node.partition("/")[0]):
                raise Conflict(f"placement: the app's volumes are on {node}, where it may not run")
            return node
        choice = self._place(wanted)
        if choice.node is None:
            raise UsageError(f"volumes: no node can have them: {'; '.join(choice.reasons)}")
        writes.append(Put(VOLUMES + wanted.key, choice.node.encode()))
        expect.append(Expect(VOLUMES + wanted.key, 0))
        return choice.node

    async def forget_volumes(self, key: AppName) -> int:
        """An app's volumes are gone, or given up: a node is picked anew when it has some again.
        Returns the commit. Raises `Conflict` when the app has some, `NotFound`."""
        return await _repeat(lambda: self._forget_volumes(key))

    async def _forget_volumes(self, key: AppName) -> int:
        app, entry = await self._store.get(APPS + key), await self._store.get(VOLUMES + key)
        if app is not None and parse_app(app.value).volumes:
            raise Conflict(f"{key} uses its volumes: remove the app first, or deploy it without")
        if entry is None:
            raise NotFound(f"{key} has no volumes")
        expect = [Expect(APPS + key, app.version if app else 0)]
        expect.append(Expect(VOLUMES + key, entry.version))
        return await self._commit([Delete(VOLUMES + key)], expect)

    async def remove(self, key: AppName) -> tuple[App, int]:
        """Remove an app; returns it as it was, and the commit. Raises `NotFound`."""
        return await _repeat(lambda: self._remove(key))

    async def _remove(self, key: AppName) -> tuple[App, int]:
        entry, app = await self._read_known(key)
        writes: list[Write] = [Delete(claim) for claim in claims_of(app)]
        writes += [Delete(IDS + str(base)) for base in app.id_bases]
        writes += [Delete(APPS + key), Delete(FLOORS + key)]
        return app, await self._commit(writes, [Expect(APPS + key, entry.version)])

    async def scale(self, key: AppName, low: int | None, high: int | None) -> tuple[App, int]:
        """Change `min` and `max` of the current revision; without `high`, `max` is raised to a
        larger `min`. Raises `NotFound`, `UsageError`."""
        return await _repeat(lambda: self._scale(key, low, high))

    async def _scale(self, key: AppName, low: int | None, high: int | None) -> tuple[App, int]:
        entry, app = await self._read_known(key)
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
        app = msgspec.structs.replace(app, reactive=reactive, declared=declared)
        writes = [Put(APPS + key, encode(app))]
        return app, await self._commit(writes, [Expect(APPS + key, entry.version)])

    async def spread(self, datacenters: Iterable[str], ready: Ready) -> None:
        """Store each app's share of `min` by data center, where it changed."""
        live = tuple(datacenters)
        while await _repeat(lambda: self._spread(live, ready)):
            pass

    async def _spread(self, live: tuple[str, ...], ready: Ready) -> bool:
        """One commit's worth of it; whether there was anything to store."""
        _, apps = await self._store.range(APPS)
        _, stored = await self._store.range(FLOORS)
        known = {entry.key: entry.value for entry in stored}
        writes: list[Write] = []
        expect = []
        for entry in apps:
            if (app := sound_app(entry.key, entry.value)) is None:
                continue
            key = FLOORS + app.key
            shares = floors(app, live, ready.get(app.key, {}))
            wanted = encode(shares) if app.reactive.min else None
            if wanted != known.pop(key, None):
                writes.append(Put(key, wanted) if wanted is not None else Delete(key))
                expect.append(Expect(entry.key, entry.version))
        writes += [Delete(key) for key in known]  # of apps that are gone
        if writes:
            await self._commit(writes[:SPREAD_WRITES], expect[:SPREAD_WRITES])
        return bool(writes)

    async def _own_ids(
        self, wanted: App, old: App | None
    ) -> tuple[list[int], list[Write], list[Expect]]:
        """The ranges of ids that an app has or takes now: one, or of class `auto` one for each
        cohort. What it once had it keeps."""
        bases = list(old.id_bases) if old is not None else []
        missing = (2 if wanted.isolation is Class.AUTO else 1) - len(bases)
        if missing <= 0:
            return bases, [], []
        taken, writes, expect = await self._take_ids(wanted.key, missing)
        return bases + taken, writes, expect

    async def _take_ids(
        self, key: AppName, count: int
    ) -> tuple[list[int], list[Write], list[Expect]]:
        """So many that nobody has, from behind the last that was taken. Raises `Conflict`."""
        last = await self._store.get(LAST_IDS)
        first, bases = int(last.value) if last is not None else 0, list[int]()
        for step in range(ID_RANGES):
            base = FIRST_ID_BASE + (first + step) % ID_RANGES * ID_RANGE
            if await self._store.get(IDS + str(base)) is None:
                bases.append(base)
            if len(bases) == count:
                following = str((first + step + 1) % ID_RANGES).encode()
                writes: list[Write] = [Put(IDS + str(base), key.encode()) for base in bases]
                writes.append(Put(LAST_IDS, following))
                return bases, writes, [Expect(LAST_IDS, last.version if last else 0)]
        raise Conflict(f"all {ID_RANGES} id ranges are taken: remove apps that are not needed")

    async def _read(self, key: AppName) -> tuple[Entry | None, App | None]:
        entry = await self._store.get(APPS + key)
        return entry, parse_app(entry.value) if entry is not None else None

    async def _read_known(self, key: AppName) -> tuple[Entry, App]:
        entry, app = await self._read(key)
        if entry is None or app is None:
            raise NotFound(f"there is no app {key}")
        return entry, app

    async def _commit(self, writes: Sequence[Write], expect: Sequence[Expect]) -> int:
        try:
            return await self._store.commit(writes, expect)
        except Conflict as conflict:
            raise _Overtaken from conflict


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
    added = (*ids, "pinned_to", "revision", "owner", "deployed_at", "declared")
    same = {name: getattr(plain, name) for name in added}
    return msgspec.structs.replace(declared, **same) == msgspec.structs.replace(wanted, **same)


def _check_sizes(wanted: App, old: App | None) -> None:
    before = {volume.name: volume.size_bytes for volume in old.volumes} if old is not None else {}
    for volume in wanted.volumes:
        if volume.size_bytes < before.get(volume.name, 0):
            raise UsageError(f"volumes: {volume.name} cannot shrink: leave its size, or enlarge it")


class _Overtaken(Exception):
    """Another transaction came between read and commit."""


async def _repeat(attempt: Callable[[], Awaitable[T]]) -> T:
    """Read and commit, again when overtaken; each round one of those who compete gets through."""
    while True:
        try:
            return await attempt()
        except _Overtaken:
            await asyncio.sleep(0)
