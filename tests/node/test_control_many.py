"""Many apps in one transaction: one commit, or nothing of any of them."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.node.test_control import app, check_books, pick, rivalled

from tabane.errors import Conflict, Denied, NotFound
from tabane.model import App, AppName, Reactive, TcpPort
from tabane.node.control import FIRST_ID_BASE, ID_RANGE, Apps
from tabane.node.messages import DeployApps, DeployedApps, RemoveApps
from tabane.store import Expect, MemoryStore, Put, SqliteStore, Write
from tabane.store.edit import Edit, Overtaken
from tabane.testing import VirtualClock


class Counting(MemoryStore):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []
        self.reads = self.ranges = 0

    async def get(self, key: str) -> Any:
        self.reads += 1
        return await super().get(key)

    async def range(self, prefix: str) -> Any:
        self.ranges += 1
        return await super().range(prefix)

    async def commit(self, writes: Any, expect: Any = ()) -> int:
        self.commits.append(len(writes))
        return await super().commit(writes, expect)


@pytest.fixture
async def store() -> Any:
    store = Counting()
    yield store
    await store.aclose()


@pytest.fixture
def apps(store: Counting) -> Apps:
    return Apps(store, VirtualClock(), pick)


def many(count: int, **more: Any) -> list[App]:
    return [app(f"app{n}", port=80, hosts=(f"app{n}.test",), **more) for n in range(count)]


@pytest.mark.parametrize("before", [0, 2000])
async def test_a_hundred_are_one_commit_however_many_there_are(
    before: int, apps: Apps, store: Counting
) -> None:
    """An app costs its own keys (text, host, ids) and one for the last ids; no key of others."""
    await apps.deploy_all([app(f"old{n}") for n in range(before)])
    store.commits.clear()
    store.reads = store.ranges = 0
    found = await apps.deploy_all(many(100))
    assert store.commits == [3 * 100 + 1]
    assert store.reads <= 5 * 100 and store.ranges == 0
    assert len({each.revision for each in found}) == 1
    await check_books(store)
    store.ranges = 0
    await apps.spread(["tokyo"], {})
    assert store.ranges == 1 and len(store.commits) == 1, "nothing of them is to be spread"


async def test_a_hundred_are_one_transaction_on_disk(tmp_path: Path) -> None:
    """Which is one wait for the disk; and a statement for each key, none of them to find one."""
    store = await SqliteStore.open(tmp_path / "store.db")
    statements: list[str] = []
    assert store._file._db is not None
    store._file._db.set_trace_callback(statements.append)
    await Apps(store, VirtualClock(), pick).deploy_all(many(100))
    words = Counter(statement.split()[0] for statement in statements)
    assert words == {"BEGIN": 1, "INSERT": 3 * 100 + 1, "UPDATE": 1, "COMMIT": 1}
    await store.aclose()


async def test_each_gets_ids_of_its_own(apps: Apps) -> None:
    found = await apps.deploy_all(many(3))
    bases = [each.app.id_base for each in found]
    assert bases == [FIRST_ID_BASE + number * ID_RANGE for number in range(3)]


async def test_what_is_as_it_was_is_not_written(apps: Apps, store: Counting) -> None:
    first = await apps.deploy_all(many(3))
    store.commits.clear()
    again = await apps.deploy_all(many(3))
    assert store.commits == [] and not any(each.changed for each in again)
    assert [each.revision for each in again] == [each.revision for each in first]
    mixed = await apps.deploy_all([*many(3), app("new")])
    assert [each.changed for each in mixed] == [False, False, False, True]
    assert [each.app.revision for each in await apps.deploy_all(many(3), force=True)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("last", "error", "words"),
    [
        (app("x", port=80, hosts=("app1.test",)), Conflict, "default/x: hosts: app1.test leads to"),
        (app("x", tcp=(TcpPort(25, 25),), owner=7), Denied, "default/x: tcp: port 25: below 1024"),
    ],
)
async def test_none_is_stored_when_one_cannot_be(
    last: App, error: type[Exception], words: str, apps: Apps, store: Counting
) -> None:
    with pytest.raises(error, match=words):
        await apps.deploy_all([*many(3), last])
    assert (await store.range(""))[1] == []


async def test_many_go_together_or_not_at_all(apps: Apps, store: Counting) -> None:
    await apps.deploy_all(many(5, reactive=Reactive(min=1)))
    keys = [each.key for each in many(5)]
    with pytest.raises(NotFound, match="no app default/none"):
        await apps.remove_all([*keys, AppName("default/none")])
    assert len((await store.range("apps/"))[1]) == len((await store.range("floors/"))[1]) == 5
    store.commits.clear()
    removed, revision = await apps.remove_all(keys)
    assert [each.key for each in removed] == keys and len(store.commits) == 1
    left = [entry.key for entry in (await store.range(""))[1]]
    assert left == ["last_ids", "last_revision"]
    assert (await store.range(""))[0] == revision


async def test_it_is_done_anew_when_another_came_between(apps: Apps, store: Counting) -> None:
    rival = rivalled(store, lambda: apps.deploy(app("app1")))
    found = await rival.deploy_all(many(3))
    assert [each.app.revision for each in found] == [1, 2, 1]
    await check_books(store)


async def test_what_other_nodes_ask_for(apps: Apps) -> None:
    stored = await apps.perform(DeployApps(tuple(many(2))))
    assert isinstance(stored, DeployedApps) and [each.changed for each in stored.apps] == [True] * 2
    keys = tuple(each.app.key for each in stored.apps)
    removed = await apps.perform(RemoveApps(keys))
    assert isinstance(removed, DeployedApps)
    assert [each.app for each in removed.apps] == [each.app for each in stored.apps]


async def test_an_edit_sees_what_it_wrote_and_stands_by_what_it_read() -> None:
    store = MemoryStore()
    await store.commit([Put("a", b"1"), Put("b", b"1")])
    edit = Edit(store)
    edit.put("a", b"2")
    edit.delete("b")
    seen = await edit.get("a")
    assert seen is not None and seen.value == b"2" and await edit.get("b") is None
    assert await edit.get("c") is None
    writes: list[Write] = [Put("c", b"3")]
    await store.commit(writes, [Expect("c", 0)])
    with pytest.raises(Overtaken):
        await edit.commit()
    kept = await store.get("a")
    assert kept is not None and kept.value == b"1"
    await store.aclose()


async def test_the_store_takes_little_for_each_and_no_more_when_they_come_and_go() -> None:
    """Bytes as Python's own allocator counts them, with the changes kept for those behind."""
    count, store = 1000, MemoryStore(history=4000)
    apps = Apps(store, VirtualClock(), pick)
    wanted = many(count, command=("busybox", "httpd", "-f", "-p", "8000"))
    keys = [each.key for each in wanted]
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(4):
            for taken in (apps.deploy_all, apps.remove_all):
                for start in range(0, count, 100):
                    some = wanted if taken == apps.deploy_all else keys
                    await taken(some[start : start + 100])  # type: ignore[operator]
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    deployed, removed = sizes[0::2], sizes[1::2]
    assert deployed[0] < 2500 * count
    assert deployed[3] - deployed[1] < 50 * count and removed[3] - removed[1] < 50 * count
    await store.aclose()
