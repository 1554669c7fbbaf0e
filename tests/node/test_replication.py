"""The store reaches every node: snapshots in pages, then changes, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tabane.errors import Unreachable
from tabane.node import replication
from tabane.node.messages import StoreChanges, StorePage, parse
from tabane.node.replication import Follower, Publisher, split, to_messages
from tabane.store import Change, Delete, Entry, MemoryStore, Put, Replica, Snapshot, StoreFeed
from tabane.store.feed import Changes
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

HISTORY = 8


class Node:
    """A follower behind a link that can be slow or broken; `heard` is what came."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.follower = Follower(replica)
        self.heard: list[StorePage | StoreChanges] = []
        self.open = asyncio.Event()
        self.open.set()
        self.broken = False
        self.refused = asyncio.Event()
        self._grown = asyncio.Condition()

    async def hear(self, data: bytes) -> None:
        await self.open.wait()
        if self.broken:
            self.refused.set()
            raise Unreachable("the link is down")
        message = parse(data)
        self.heard.append(message)
        if isinstance(message, StorePage):
            await self.follower.on_page(message)
        else:
            await self.follower.on_changes(message)
        async with self._grown:
            self._grown.notify_all()

    async def reach(self, revision: int) -> None:
        async with self._grown:
            await self._grown.wait_for(lambda: self.replica.revision == revision)

    def content(self) -> dict[str, bytes]:
        return {entry.key: entry.value for entry in self.replica.range("")}


class Cluster:
    """A store and its publisher; nodes are members by name."""

    def __init__(self, directory: Path, tasks: Supervisor, failures: list[str]) -> None:
        self.directory = directory
        self.tasks = tasks
        self.failures = failures
        self.nodes: dict[str, Node] = {}
        self.absent: set[str] = set()
        self.clock = VirtualClock()
        self.store = MemoryStore(history=HISTORY)
        self.publisher = Publisher(
            StoreFeed(self.store), self.send, tasks, self.clock, self.is_there
        )

    def is_there(self, member: str) -> bool:
        return member not in self.absent

    async def send(self, member: str, data: bytes) -> None:
        await self.nodes[member].hear(data)

    async def add(self, name: str) -> Node:
        node = self.nodes[name] = Node(await Replica.open(self.directory / f"{name}.db", ""))
        return node

    def follow(self, name: str) -> None:
        self.publisher.follow(name, self.nodes[name].replica.revision)

    async def put(self, **values: bytes) -> int:
        return await self.store.commit([Put(key, value) for key, value in values.items()])

    async def close(self) -> None:
        await self.tasks.aclose()
        await self.store.aclose()
        for node in self.nodes.values():
            await node.replica.aclose()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    failures: list[str] = []
    async with Supervisor("test", on_failure=lambda name, _: failures.append(name)) as tasks:
        cluster = Cluster(tmp_path, tasks, failures)
        yield cluster
        await cluster.close()
    assert failures == []


async def test_a_new_node_gets_all_then_changes(cluster: Cluster) -> None:
    await cluster.put(a=b"1", b=b"2")
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(1)
    assert node.content() == {"a": b"1", "b": b"2"}
    await cluster.put(a=b"3", c=b"4")
    await node.reach(await cluster.store.commit([Delete("b")]))
    assert node.content() == {"a": b"3", "c": b"4"}
    assert [type(message) for message in node.heard] == [StorePage, StoreChanges, StoreChanges]


async def test_an_empty_store_is_told_as_empty(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(await cluster.put(a=b"1"))
    assert node.heard[0] == StorePage(0, (), first=True, last=True)
    assert node.content() == {"a": b"1"}


async def test_a_snapshot_comes_in_pages(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "PAGE_BYTES", 1000)
    await cluster.put(**{f"key{number:03}": b"x" * 100 for number in range(100)})
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(1)
    assert len(node.content()) == 100
    pages = [message for message in node.heard if isinstance(message, StorePage)]
    assert len(pages) == len(node.heard) > 10
    assert [page.first for page in pages] == [True] + [False] * (len(pages) - 1)
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]


async def test_a_slow_node_slows_only_itself(cluster: Cluster) -> None:
    slow, quick = await cluster.add("slow"), await cluster.add("quick")
    slow.open.clear()
    cluster.follow("slow")
    cluster.follow("quick")
    for number in range(3 * HISTORY):
        await quick.reach(await cluster.put(a=b"%d" % number))
    assert slow.heard == []
    slow.open.set()
    await slow.reach(3 * HISTORY)
    assert slow.content() == quick.content() == {"a": b"23"}
    pages = [message for message in slow.heard if isinstance(message, StorePage)]
    assert [page.revision for page in pages] == [0, 3 * HISTORY]


async def test_a_node_that_was_away_gets_only_what_it_missed(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(await cluster.put(a=b"1"))
    node.broken = True
    cluster.absent.add("osaka")
    await cluster.put(a=b"2")
    await node.refused.wait()
    node.broken, node.heard = False, []
    cluster.follow("osaka")
    await node.reach(2)
    assert [type(message) for message in node.heard] == [StoreChanges]
    assert node.content() == {"a": b"2"}


async def test_a_node_that_is_there_and_refuses_is_told_again(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(await cluster.put(a=b"1"))
    node.broken, node.heard = True, []
    await cluster.put(a=b"2")
    for _ in range(3):
        await node.refused.wait()
        node.refused.clear()
        await asyncio.sleep(0)
        cluster.clock.advance(replication.LAST_RETRY_S)
    node.broken = False
    await cluster.put(a=b"3")
    await asyncio.sleep(0)
    cluster.clock.advance(replication.LAST_RETRY_S)
    await node.reach(3)
    assert node.content() == {"a": b"3"}
    assert [type(message) for message in node.heard] == [StoreChanges, StoreChanges]


async def test_a_node_starts_again_from_its_own_copy(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    cluster.follow("osaka")
    await node.reach(await cluster.put(a=b"1"))
    await node.replica.aclose()
    node = await cluster.add("osaka")
    assert node.content() == {"a": b"1"}
    cluster.follow("osaka")
    await node.reach(await cluster.put(b=b"2"))
    assert [type(message) for message in node.heard] == [StoreChanges]


async def test_a_node_ahead_of_a_store_that_was_set_back_gets_all_anew(cluster: Cluster) -> None:
    await cluster.put(a=b"1")
    node = await cluster.add("osaka")
    await node.follower.on_page(StorePage(99, (Entry("lost", b"x", 99),), first=True, last=True))
    cluster.follow("osaka")
    await node.reach(1)
    assert node.content() == {"a": b"1"}


async def test_asking_again_takes_the_place_of_what_was_asked_before(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    node.open.clear()
    for _ in range(3):
        cluster.follow("osaka")
        await asyncio.sleep(0)
    node.open.set()
    await node.reach(await cluster.put(a=b"1"))
    assert len(cluster.tasks) == 1
    assert [type(message) for message in node.heard] == [StorePage, StoreChanges]


async def test_pages_of_a_snapshot_that_was_broken_off_are_forgotten(cluster: Cluster) -> None:
    node = await cluster.add("osaka")

    async def page(key: str, *, first: bool, last: bool) -> None:
        await node.follower.on_page(StorePage(5, (Entry(key, b"x", 5),), first, last))

    await page("old", first=True, last=False)
    assert node.replica.revision == 0
    await page("a", first=True, last=False)
    await page("b", first=False, last=True)
    assert sorted(node.content()) == ["a", "b"]


async def test_changes_that_come_twice_are_nothing_new(cluster: Cluster) -> None:
    node = await cluster.add("osaka")
    told: list[tuple[Change, ...]] = []
    node.replica.subscribe(told.append)
    for _ in range(2):
        await node.follower.on_changes(StoreChanges((Change("a", b"1", 7),)))
    assert told == [(Change("a", b"1", 7),)]


def entry(key_bytes: int, value_bytes: int) -> Entry:
    return Entry("k" * key_bytes, b"v" * value_bytes, 1)


@pytest.mark.parametrize(
    ("values", "pages"),
    [
        ([], [0]),
        ([0], [1]),
        ([replication.PAGE_BYTES * 2], [1]),
        ([10, replication.PAGE_BYTES * 2, 10], [1, 1, 1]),
        ([100_000] * 5, [2, 2, 1]),
    ],
)
def test_pages_hold_what_fits(values: list[int], pages: list[int]) -> None:
    found = split([entry(10, size) for size in values])
    assert [len(page) for page in found] == pages


def test_a_page_is_no_larger_than_it_says() -> None:
    encode: Callable[[StorePage], bytes] = replication.encode
    entries = tuple(Entry("束" * 40, b"", 1 << 40, lease="x" * 32) for _ in range(20_000))
    messages = to_messages(Snapshot(1, entries))
    assert max(len(encode(page)) for page in messages) <= replication.PAGE_BYTES
    assert sum(len(page.entries) for page in messages if isinstance(page, StorePage)) == 20_000


def test_a_commit_is_one_message() -> None:
    changes = (Change("a", b"1", 7), Change("b", None, 7))
    assert to_messages(Changes(changes)) == [StoreChanges(changes)]
