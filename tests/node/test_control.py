"""The transactions on apps, over the stores they run on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tabane.errors import Conflict, Denied, NotFound, UsageError
from tabane.model import (
    App,
    AppName,
    NodeName,
    Placement,
    Reactive,
    TcpPort,
    Volume,
)
from tabane.node import control as module
from tabane.node.control import (
    FIRST_ID_BASE,
    ID_RANGE,
    SAME_OWNER,
    Apps,
    parse_app,
    parse_floors,
)
from tabane.node.messages import DeployApp, Deployed, RemoveApp, ScaleApp
from tabane.scheduler.placement import Choice
from tabane.store import Expect, MemoryStore, Put, SqliteStore, Store, Write
from tabane.testing import VirtualClock

WALL = 1_700_000_000.0
KEY = AppName("default/hello")


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    memory = request.param == "memory"
    store = MemoryStore() if memory else await SqliteStore.open(tmp_path / "store.db")
    yield store
    await store.aclose()


@pytest.fixture
def apps(store: Store) -> Apps:
    return Apps(store, VirtualClock(wall=WALL), pick)


def pick(app: App) -> Choice:
    """Where its volumes go."""
    return Choice(NodeName("tokyo/tokyo-1"), ())


def app(name: str = "hello", **more: Any) -> App:
    return App(name, "host", **more)


async def read(store: Store, prefix: str) -> dict[str, bytes]:
    _, entries = await store.range(prefix)
    return {entry.key: entry.value for entry in entries}


async def check_books(store: Store) -> None:
    """Hosts, ids and floors are those of the apps, and nobody else's."""
    apps = {entry.key: entry for entry in map(parse_app, (await read(store, "apps/")).values())}
    hosts = {f"hosts/{host}": a.key.encode() for a in apps.values() for host in a.hosts}
    assert await read(store, "hosts/") == hosts
    ports = {f"tcp/{each.port}": a.key.encode() for a in apps.values() for each in a.tcp}
    assert await read(store, "tcp/") == ports
    ids = {f"ids/{base}": a.key.encode() for a in apps.values() for base in a.id_bases}
    assert await read(store, "ids/") == ids
    assert len(ids) == sum(len(a.id_bases) for a in apps.values())
    assert all(a.id_base for a in apps.values())
    assert {key.removeprefix("floors/") for key in await read(store, "floors/")} <= set(apps)


class Rival:
    """A store in which another's commit comes just before each of the first `times` commits."""

    def __init__(self, store: Store, times: int, rival: Any) -> None:
        self._store = store
        self._left = times
        self._rival = rival

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        if self._left:
            self._left -= 1
            await self._rival()
        return await self._store.commit(writes, expect)


def rivalled(store: Store, rival: Any, times: int = 1) -> Apps:
    return Apps(Rival(store, times, rival), VirtualClock(), pick)  # type: ignore[arg-type]


async def test_a_deploy_is_stored_as_told(apps: Apps, store: Store) -> None:
    wanted = app(hosts=("hello.test", "hi.test"), port=80, revision=99, id_base=5, deployed_at=1.0)
    stored = await apps.deploy(wanted)
    deployed, revision = stored.app, stored.revision
    assert deployed == msgspec.structs.replace(
        wanted, revision=1, id_base=FIRST_ID_BASE, deployed_at=WALL
    )
    entry = await store.get("apps/default/hello")
    assert entry is not None
    assert (parse_app(entry.value), entry.version) == (deployed, revision)
    await check_books(store)


async def test_a_deploy_of_what_is_there_is_its_next_revision(apps: Apps, store: Store) -> None:
    first = (await apps.deploy(app(hosts=("a.test", "b.test")))).app
    second = (await apps.deploy(app(hosts=("b.test", "c.test"), port=80))).app
    assert (first.revision, second.revision) == (1, 2)
    assert second.id_base == first.id_base
    assert sorted(await read(store, "hosts/")) == ["hosts/b.test", "hosts/c.test"]
    await check_books(store)


async def test_a_host_of_another_app_is_refused_and_nothing_changed(
    apps: Apps, store: Store
) -> None:
    await apps.deploy(app("first", hosts=("a.test",)))
    await apps.deploy(app("second", hosts=("b.test",)))
    before = await read(store, "")
    for hosts in (("c.test", "a.test"), ("a.test", "b.test")):
        with pytest.raises(Conflict, match=r"hosts: a\.test leads to default/first already"):
            await apps.deploy(app("second", hosts=hosts))
    assert await read(store, "") == before


async def test_a_tcp_port_belongs_to_one_app(apps: Apps, store: Store) -> None:
    mail = app("mail", tcp=(TcpPort(25, 2525), TcpPort(587, 587)))
    await apps.deploy(mail)
    with pytest.raises(Conflict, match=r"tcp: port 587 leads to default/mail already"):
        await apps.deploy(app("other", tcp=(TcpPort(587, 25),)))
    await apps.deploy(app("mail", tcp=(TcpPort(25, 25),)))
    await apps.deploy(app("other", tcp=(TcpPort(587, 25),)))
    await check_books(store)
    await apps.remove(AppName("default/mail"))
    await apps.remove(AppName("default/other"))
    assert await read(store, "tcp/") == {}


async def test_low_ports_take_root(apps: Apps, store: Store) -> None:
    with pytest.raises(Denied, match=r"tcp: port 1023: below 1024 only root"):
        await apps.deploy(app(tcp=(TcpPort(1024, 25), TcpPort(1023, 25)), owner=1000))
    assert await read(store, "") == {}
    await apps.deploy(app(tcp=(TcpPort(1024, 25),), owner=1000))
    await check_books(store)


async def test_a_host_is_free_again_when_its_app_lets_go(apps: Apps, store: Store) -> None:
    await apps.deploy(app("first", hosts=("a.test",)))
    await apps.deploy(app("first"))
    await apps.deploy(app("second", hosts=("a.test",)))
    await apps.remove(AppName("default/second"))
    await apps.deploy(app("third", hosts=("a.test",)))
    assert await read(store, "hosts/") == {"hosts/a.test": b"default/third"}
    await check_books(store)


async def test_a_removed_app_leaves_nothing(apps: Apps, store: Store) -> None:
    deployed = (await apps.deploy(app(hosts=("a.test",), reactive=Reactive(min=2)))).app
    await apps.spread(["tokyo"], {})
    removed, revision = await apps.remove(KEY)
    assert removed == deployed
    assert revision == (await store.range(""))[0]
    assert list(await read(store, "")) == ["last_ids", "last_revision"]
    with pytest.raises(NotFound, match="there is no app default/hello"):
        await apps.remove(KEY)


async def test_apps_of_one_name_in_two_namespaces_are_two(apps: Apps, store: Store) -> None:
    one = (await apps.deploy(app(hosts=("a.test",)))).app
    other = (await apps.deploy(app(namespace="test"))).app
    assert (one.revision, other.revision) == (1, 1)
    assert one.id_base != other.id_base
    with pytest.raises(Conflict, match="default/hello"):
        await apps.deploy(app(namespace="test", hosts=("a.test",)))
    await check_books(store)


async def test_deploys_at_once_of_many_apps_share_no_ids(apps: Apps, store: Store) -> None:
    found = await asyncio.gather(*(apps.deploy(app(f"app{n}")) for n in range(30)))
    bases = {deployed.app.id_base for deployed in found}
    assert len(bases) == 30
    assert len({deployed.revision for deployed in found}) == 30
    await check_books(store)


async def test_deploys_at_once_of_one_app_each_count(apps: Apps, store: Store) -> None:
    found = await asyncio.gather(*(apps.deploy(app(hosts=(f"h{n}.test",))) for n in range(20)))
    assert sorted(deployed.app.revision for deployed in found) == list(range(1, 21))
    assert len({deployed.app.id_base for deployed in found}) == 1
    assert len(await read(store, "hosts/")) == 1
    await check_books(store)


async def test_of_those_who_want_a_host_at_once_one_gets_it(apps: Apps, store: Store) -> None:
    wanted = [apps.deploy(app(f"app{n}", hosts=("a.test",))) for n in range(20)]
    found = await asyncio.gather(*wanted, return_exceptions=True)
    refused = [result for result in found if isinstance(result, Conflict)]
    assert len(refused) == 19
    assert len(await read(store, "apps/")) == len(await read(store, "hosts/")) == 1
    await check_books(store)


async def test_whatever_comes_at_once_leaves_the_books_right(apps: Apps, store: Store) -> None:
    chance = random.Random(7)

    def any_request() -> Any:
        name = f"app{chance.randrange(4)}"
        hosts = tuple(chance.sample(["a.test", "b.test", "c.test", "d.test"], k=2))
        match chance.randrange(4):
            case 0:
                reactive = Reactive(min=chance.randrange(3))
                return apps.deploy(app(name, hosts=hosts, reactive=reactive))
            case 1:
                return apps.remove(AppName(f"default/{name}"))
            case 2:
                return apps.scale(AppName(f"default/{name}"), chance.randrange(3), None)
        return apps.spread(chance.sample(["tokyo", "osaka"], k=chance.randrange(3)), {})

    for _ in range(30):
        results = await asyncio.gather(*(any_request() for _ in range(8)), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(error, Conflict | NotFound) for error in errors), errors
        await check_books(store)
    await apps.spread(["tokyo", "osaka"], {})
    wanting = {
        a.key for a in map(parse_app, (await read(store, "apps/")).values()) if a.reactive.min
    }
    assert {key.removeprefix("floors/") for key in await read(store, "floors/")} == wanting


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (3, None, (3, 10)),
        (None, 5, (1, 5)),
        (0, 1, (0, 1)),
        (20, None, (20, 20)),
        (None, None, (1, 10)),
    ],
)
async def test_scaling(
    apps: Apps, store: Store, low: int | None, high: int | None, wanted: tuple[int, int]
) -> None:
    deployed = (await apps.deploy(app(reactive=Reactive(min=1, max=10, queue=5)))).app
    scaled, revision = await apps.scale(KEY, low, high)
    assert (scaled.reactive.min, scaled.reactive.max) == wanted
    reactive = msgspec.structs.replace(deployed.reactive, min=wanted[0], max=wanted[1])
    declared = deployed.reactive if deployed.reactive != reactive else None
    assert scaled == msgspec.structs.replace(deployed, reactive=reactive, declared=declared)
    entry = await store.get("apps/default/hello")
    assert entry is not None
    assert (parse_app(entry.value), entry.version) == (scaled, revision)


@pytest.mark.parametrize(("low", "high"), [(-1, None), (5, 4), (0, 0), (None, 0), (-2, -1)])
async def test_scaling_to_nonsense_is_refused(
    apps: Apps, store: Store, low: int | None, high: int | None
) -> None:
    await apps.deploy(app(reactive=Reactive(min=1, max=10)))
    before = await read(store, "")
    with pytest.raises(UsageError, match="0 <= min <= max, and max at least 1"):
        await apps.scale(KEY, low, high)
    assert await read(store, "") == before


async def test_scaling_beyond_what_an_app_file_may_say_is_refused(apps: Apps, store: Store) -> None:
    await apps.deploy(app(reactive=Reactive(min=1, max=10)))
    before = await read(store, "")
    for low, high in ((10**30, None), (1_000_001, None), (0, 1_000_001)):
        with pytest.raises(UsageError, match="too many: at most 1000000"):
            await apps.scale(KEY, low, high)
    assert await read(store, "") == before


async def test_a_stored_app_that_nobody_can_work_with_is_no_hindrance(
    apps: Apps, store: Store
) -> None:
    bad = app("bad", reactive=Reactive(min=10**30))
    await store.commit([Put("apps/default/bad", msgspec.json.encode(bad))])
    await apps.deploy(app(reactive=Reactive(min=2)))
    await apps.spread(["tokyo"], {})
    assert set(await read(store, "floors/")) == {"floors/default/hello"}
    await apps.remove(AppName("default/bad"))


async def test_scaling_what_is_not_there_is_refused(apps: Apps) -> None:
    with pytest.raises(NotFound, match="there is no app default/hello"):
        await apps.scale(KEY, 1, None)


async def test_what_was_not_told_is_kept_as_a_rival_left_it(apps: Apps, store: Store) -> None:
    await apps.deploy(app(reactive=Reactive(min=1, max=10)))
    scaled, _ = await rivalled(store, lambda: apps.scale(KEY, None, 30)).scale(KEY, 2, None)
    assert (scaled.reactive.min, scaled.reactive.max) == (2, 30)


async def test_an_overtaken_deploy_is_tried_again(apps: Apps, store: Store) -> None:
    others = iter(range(100))

    async def rival() -> None:
        await apps.deploy(app(f"rival{next(others)}"))

    deployed = (await rivalled(store, rival, times=5).deploy(app())).app
    assert deployed.id_base == FIRST_ID_BASE + 5 * ID_RANGE
    deployed = (await rivalled(store, lambda: apps.remove(KEY)).deploy(app(port=80))).app
    assert (deployed.revision, deployed.id_base) == (2, FIRST_ID_BASE + 6 * ID_RANGE)
    with pytest.raises(NotFound):
        await rivalled(store, lambda: apps.remove(KEY)).remove(KEY)
    await check_books(store)


async def test_min_is_spread_over_the_live_datacenters(apps: Apps, store: Store) -> None:
    only = Placement(("osaka", "nara"))
    await apps.deploy(app("wide", reactive=Reactive(min=5)))
    await apps.deploy(app("narrow", reactive=Reactive(min=2), placement=only))
    await apps.deploy(app("none"))

    async def shares(*live: str) -> dict[str, dict[str, int]]:
        await apps.spread(live, {})
        floors = await read(store, "floors/")
        return {key.rpartition("/")[2]: parse_floors(value) for key, value in floors.items()}

    found = await shares("tokyo", "osaka")
    assert found == {"wide": {"osaka": 3, "tokyo": 2}, "narrow": {"osaka": 2}}
    found = await shares("tokyo")
    assert found == {"wide": {"tokyo": 5}, "narrow": {}}
    await apps.scale(AppName("default/wide"), 0, None)
    await apps.scale(AppName("default/none"), 1, None)
    found = await shares("osaka", "tokyo")
    assert found == {"none": {"osaka": 1, "tokyo": 0}, "narrow": {"osaka": 2}}


async def test_spreading_what_is_spread_commits_nothing(apps: Apps, store: Store) -> None:
    await apps.deploy(app(reactive=Reactive(min=2)))
    await apps.spread(["tokyo", "osaka"], {})
    revision, _ = await store.range("")
    await apps.spread(["osaka", "tokyo"], {})
    assert (await store.range(""))[0] == revision


async def test_spreading_many_comes_in_commits_of_a_size(
    apps: Apps, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPREAD_WRITES", 3)
    for number in range(7):
        await apps.deploy(app(f"app{number}", reactive=Reactive(min=1)))
    before, _ = await store.range("")
    async with store.watch("floors/", after=before) as watch:
        await apps.spread(["tokyo"], {})
        commits = aiter(watch)
        assert [len(await anext(commits)) for _ in range(3)] == [3, 3, 1]
    assert len(await read(store, "floors/")) == 7


async def test_an_app_that_goes_while_it_is_spread_leaves_no_floor(
    apps: Apps, store: Store
) -> None:
    await apps.deploy(app(reactive=Reactive(min=2)))
    await rivalled(store, lambda: apps.remove(KEY)).spread(["tokyo"], {})
    assert await read(store, "floors/") == {}


async def test_floors_of_apps_that_are_gone_are_cleared_away(apps: Apps, store: Store) -> None:
    await store.commit([Put("floors/default/gone", b'{"tokyo":1}')])
    await apps.spread(["tokyo"], {})
    assert await read(store, "floors/") == {}


async def test_what_other_nodes_ask_for_is_done(apps: Apps) -> None:
    deployed = await apps.perform(DeployApp(app()))
    assert (deployed.app.revision, deployed.app.key) == (1, KEY)
    scaled = await apps.perform(ScaleApp(KEY, min=2))
    assert scaled.app.reactive.min == 2
    assert await apps.perform(RemoveApp(KEY)) == Deployed(scaled.app, scaled.revision + 1)


async def test_what_was_deployed_outlives_a_restart(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    stored = await Apps(store, VirtualClock(), pick).deploy(app(hosts=("a.test",)))
    deployed, revision = stored.app, stored.revision
    await store.aclose()
    store = await SqliteStore.open(tmp_path / "store.db")
    assert (await store.range(""))[0] == revision
    again = (await Apps(store, VirtualClock(), pick).deploy(app("other"))).app
    assert again.id_base == deployed.id_base + ID_RANGE
    await check_books(store)
    await store.aclose()


async def test_an_unchanged_deploy_changes_nothing(apps: Apps, store: Store) -> None:
    first = await apps.deploy(app(hosts=("a.test",), reactive=Reactive(min=1)))
    again = await apps.deploy(app(hosts=("a.test",), reactive=Reactive(min=1), owner=SAME_OWNER))
    assert again == Deployed(first.app, first.revision, changed=False)
    forced = await apps.deploy(app(hosts=("a.test",), reactive=Reactive(min=1)), force=True)
    assert (forced.app.revision, forced.changed) == (2, True)
    await check_books(store)


async def test_an_unchanged_deploy_does_not_undo_a_scale(apps: Apps) -> None:
    await apps.deploy(app(reactive=Reactive(min=1)))
    await apps.scale(KEY, 3, None)
    scaled, _ = await apps.scale(KEY, 4, 20)
    again = await apps.deploy(app(reactive=Reactive(min=1)))
    assert (again.app, again.changed, again.unscaled) == (scaled, False, None)
    other = await apps.deploy(app(reactive=Reactive(min=1), port=80))
    assert (other.app.reactive, other.app.declared) == (Reactive(min=1), None)
    assert other.unscaled == scaled.reactive


async def test_scaled_back_is_as_declared(apps: Apps) -> None:
    await apps.deploy(app(reactive=Reactive(min=1)))
    assert (await apps.scale(KEY, 3, None))[0].declared == Reactive(min=1)
    assert (await apps.scale(KEY, 1, None))[0].declared is None
    assert (await apps.deploy(app(port=80))).unscaled is None


DATA = Volume("data", "/data", 1 << 30)


async def test_volumes_are_on_one_node_for_good(apps: Apps, store: Store) -> None:
    first = await apps.deploy(app(volumes=(DATA,)))
    assert first.app.pinned_to == "tokyo/tokyo-1"
    elsewhere = Apps(store, VirtualClock(), lambda app: Choice(NodeName("osaka/osaka-1"), ()))
    second = await elsewhere.deploy(app(volumes=(DATA,), port=80))
    assert second.app.pinned_to == "tokyo/tokyo-1"
    await apps.remove(KEY)
    back = await elsewhere.deploy(app(volumes=(DATA,)))
    assert back.app.pinned_to == "tokyo/tokyo-1", "its data is there still"


async def test_who_has_no_volumes_is_free_to_go(apps: Apps) -> None:
    await apps.deploy(app(volumes=(DATA,)))
    assert (await apps.deploy(app())).app.pinned_to == ""


async def test_the_same_file_with_volumes_is_no_new_revision(apps: Apps) -> None:
    await apps.deploy(app(volumes=(DATA,)))
    assert not (await apps.deploy(app(volumes=(DATA,)))).changed


async def test_volumes_that_no_node_can_have_are_refused(store: Store) -> None:
    apps = Apps(store, VirtualClock(), lambda app: Choice(None, ("tokyo/tokyo-1: is too small",)))
    with pytest.raises(UsageError, match="no node can have them: tokyo/tokyo-1: is too small"):
        await apps.deploy(app(volumes=(DATA,)))
    assert await read(store, "") == {}


async def test_an_app_must_be_allowed_where_its_volumes_are(apps: Apps) -> None:
    await apps.deploy(app(volumes=(DATA,)))
    with pytest.raises(Conflict, match="volumes are on tokyo/tokyo-1, where it may not run"):
        await apps.deploy(app(volumes=(DATA,), placement=Placement(("osaka",))))


async def test_a_volume_cannot_shrink(apps: Apps) -> None:
    await apps.deploy(app(volumes=(DATA,)))
    with pytest.raises(UsageError, match="data cannot shrink"):
        await apps.deploy(app(volumes=(Volume("data", "/data", 1 << 20),)))
    await apps.deploy(app(volumes=(Volume("data", "/data", 1 << 31),)))


async def test_an_app_with_volumes_has_one_instance(apps: Apps) -> None:
    await apps.deploy(app(volumes=(DATA,), reactive=Reactive(max=1)))
    with pytest.raises(UsageError, match="one instance at most"):
        await apps.scale(KEY, 0, 2)


async def test_volumes_are_forgotten_when_no_app_uses_them(apps: Apps, store: Store) -> None:
    await apps.deploy(app(volumes=(DATA,)))
    with pytest.raises(Conflict, match="remove the app first"):
        await apps.forget_volumes(KEY)
    await apps.remove(KEY)
    await apps.forget_volumes(KEY)
    assert await read(store, "volumes/") == {}
    with pytest.raises(NotFound):
        await apps.forget_volumes(KEY)


async def test_an_app_stays_whose_it_is_unless_told_otherwise(apps: Apps) -> None:
    async def deploy(owner: int) -> tuple[int, bool]:
        deployed = await apps.deploy(app(owner=owner))
        return deployed.app.owner, deployed.changed

    assert await deploy(SAME_OWNER) == (0, True)
    assert await deploy(1000) == (1000, True)
    assert await deploy(SAME_OWNER) == (1000, False)
    assert await deploy(0) == (0, True)
