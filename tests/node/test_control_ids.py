"""The ranges of ids that apps own: one each, or one for each cohort."""

from __future__ import annotations

import pytest

from tabane.errors import Conflict
from tabane.model import App, AppName, Class, Trust
from tabane.node import control as module
from tabane.node.control import FIRST_ID_BASE, ID_RANGE, ID_RANGES, Apps
from tabane.scheduler.placement import Choice
from tabane.store import MemoryStore, Store
from tabane.testing import VirtualClock

KEY = AppName("default/hello")


@pytest.fixture
def store() -> Store:
    return MemoryStore()


@pytest.fixture
def apps(store: Store) -> Apps:
    return Apps(store, VirtualClock(), lambda app: Choice(None, ()))


def app(name: str = "hello", **more: object) -> App:
    return App(name, "host", **more)


async def check_books(store: Store) -> None:
    """Whose the ranges are is stored as the apps have them, and nothing else."""
    _, taken = await store.range("ids/")
    _, stored = await store.range("apps/")
    owned = {
        f"ids/{base}": app.key.encode()
        for app in (module.parse_app(entry.value) for entry in stored)
        for base in app.id_bases
    }
    assert {entry.key: entry.value for entry in taken} == owned


def test_id_ranges_stay_below_two_to_the_31() -> None:
    assert FIRST_ID_BASE % ID_RANGE == 0
    assert FIRST_ID_BASE + ID_RANGES * ID_RANGE == 1 << 31


async def test_ids_are_used_again_as_late_as_possible(
    apps: Apps, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ID_RANGES", 3)

    async def deploy(name: str) -> int:
        deployed = (await apps.deploy(app(name))).app
        return (deployed.id_base - FIRST_ID_BASE) // ID_RANGE

    assert [await deploy("a"), await deploy("b")] == [0, 1]
    await apps.remove(AppName("default/a"))
    assert [await deploy("c"), await deploy("d")] == [2, 0]
    with pytest.raises(Conflict, match="all 3 id ranges are taken"):
        await deploy("e")
    assert (await apps.deploy(app("b"), force=True)).app.revision == 2
    await apps.remove(AppName("default/b"))
    assert await deploy("e") == 1
    await check_books(store)


async def test_no_revision_of_a_name_comes_twice(apps: Apps) -> None:
    """Nodes know programs, copies and what runs by an app's name and revision."""
    for port in (80, 81, 82):
        assert (await apps.deploy(app(port=port))).app.revision == port - 79
    await apps.remove(KEY)
    assert (await apps.deploy(app(port=83))).app.revision == 4
    await apps.deploy(app("other"))
    await apps.remove(KEY)
    await apps.remove(AppName("default/other"))
    assert (await apps.deploy(app(port=84))).app.revision == 5


async def test_each_cohort_of_a_chosen_class_has_ids_of_its_own(apps: Apps, store: Store) -> None:
    deployed = (await apps.deploy(app(isolation=Class.AUTO))).app
    bases = {cohort.trust: cohort.id_base for cohort in deployed.cohorts()}
    assert bases == {Trust.ANONYMOUS: FIRST_ID_BASE, Trust.TRUSTED: FIRST_ID_BASE + ID_RANGE}
    assert (await apps.deploy(app("other"))).app.id_base == FIRST_ID_BASE + 2 * ID_RANGE
    assert not (await apps.deploy(app(isolation=Class.AUTO))).changed
    await check_books(store)
    await apps.remove(KEY)
    await check_books(store)


async def test_an_app_whose_class_is_chosen_from_now_on_keeps_its_ids_and_gets_more(
    apps: Apps, store: Store
) -> None:
    first = (await apps.deploy(app())).app
    await apps.deploy(app("other"))
    second = (await apps.deploy(app(isolation=Class.AUTO))).app
    assert second.id_bases == (first.id_base, FIRST_ID_BASE + 2 * ID_RANGE)
    third = (await apps.deploy(app())).app
    assert third.id_bases == second.id_bases
    assert [one.id_base for one in third.cohorts()] == [first.id_base]
    await check_books(store)
