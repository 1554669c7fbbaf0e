import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tabane.errors import Unavailable
from tabane.store import (
    Change,
    Changes,
    Delete,
    Entry,
    MemoryStore,
    Put,
    Replica,
    Snapshot,
    StoreFeed,
    Update,
)


class Script:
    """A feed of given updates; `asked` is what the replica wanted to hear."""

    def __init__(self, *updates: Update) -> None:
        self.updates = updates
        self.asked: list[tuple[str, int]] = []

    async def follow(self, prefix: str, after: int) -> AsyncGenerator[Update, None]:
        self.asked.append((prefix, after))
        for update in self.updates:
            yield update


def snapshot(revision: int, **values: bytes) -> Snapshot:
    entries = (Entry(f"apps/{key}", value, revision) for key, value in values.items())
    return Snapshot(revision, tuple(entries))


def changes(revision: int, **values: bytes | None) -> Changes:
    return Changes(tuple(Change(f"apps/{k}", v, revision) for k, v in values.items()))


def content(replica: Replica) -> dict[str, bytes]:
    return {entry.key.removeprefix("apps/"): entry.value for entry in replica.range("apps/")}


async def test_it_starts_from_disk_without_its_source(tmp_path: Path) -> None:
    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    assert (replica.revision, content(replica)) == (0, {})
    feed = Script(snapshot(3, a=b"1", b=b"2"), changes(4, a=b"3", b=None), changes(7, c=b""))
    await replica.follow(feed)
    await replica.aclose()

    again = await Replica.open(tmp_path / "replica.db", "apps/")
    assert (again.revision, content(again)) == (7, {"a": b"3", "c": b""})
    entry = again.get("apps/a")
    assert entry is not None and entry.version == 4
    assert again.get("apps/b") is None
    silent = Script()
    await again.follow(silent)
    assert silent.asked == [("apps/", 7)]
    await again.aclose()


async def test_subscribers_hear_what_changed(tmp_path: Path) -> None:
    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    heard: list[tuple[Change, ...]] = []
    end = replica.subscribe(heard.append)
    replica.subscribe(lambda changes: heard.append((replica.revision,)))  # type: ignore[arg-type]
    await replica.update(snapshot(3, a=b"1", b=b"2"))
    await replica.update(snapshot(5, a=b"1", b=b"9", c=b""))
    await replica.update(snapshot(6, c=b""))
    await replica.update(snapshot(7, c=b""))
    end()
    await replica.update(changes(8, c=b"1"))
    assert heard == [
        (Change("apps/a", b"1", 3), Change("apps/b", b"2", 3)),
        (3,),
        (Change("apps/b", b"9", 5), Change("apps/c", b"", 5)),
        (5,),
        (Change("apps/a", None, 6), Change("apps/b", None, 6)),
        (6,),
        (),
        (7,),
        (8,),
    ]
    assert replica.revision == 8
    await replica.aclose()


async def test_a_subscriber_that_fails_keeps_nothing_from_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    heard: list[tuple[Change, ...]] = []

    def fail(changes: tuple[Change, ...]) -> None:
        raise ValueError("broken")

    replica.subscribe(fail)
    replica.subscribe(heard.append)
    await replica.update(snapshot(3, a=b"1"))
    assert heard == [(Change("apps/a", b"1", 3),)]
    assert "revision 3 is not taken in everywhere" in caplog.text
    await replica.aclose()


async def test_changes_already_known_are_nothing(tmp_path: Path) -> None:
    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    await replica.follow(Script(snapshot(5, a=b"new"), changes(4, a=b"old"), changes(5, a=b"old")))
    assert (replica.revision, content(replica)) == (5, {"a": b"new"})
    await replica.aclose()


async def test_a_damaged_replica_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "replica.db"
    path.write_bytes(b"garbage" * 1000)
    replica = await Replica.open(path, "apps/")
    assert replica.revision == 0
    assert "beginning an empty replica" in caplog.text
    assert (tmp_path / "replica.db.damaged").read_bytes() == b"garbage" * 1000
    await replica.follow(Script(snapshot(2, a=b"")))
    await replica.aclose()


async def test_a_feed_that_breaks_leaves_what_was_learnt(tmp_path: Path) -> None:
    class Breaking(Script):
        async def follow(self, prefix: str, after: int) -> AsyncGenerator[Update, None]:
            yield snapshot(2, a=b"")
            raise Unavailable("the control node is gone")

    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    with pytest.raises(Unavailable):
        await replica.follow(Breaking())
    assert (replica.revision, content(replica)) == (2, {"a": b""})
    await replica.aclose()


async def test_it_follows_a_store(tmp_path: Path) -> None:
    """From nothing, after a pause that the history bridges, and after one that it does not."""
    store = MemoryStore(history=4)
    await store.commit([Put("apps/a", b"1"), Put("nodes/n", b"")])
    replica = await Replica.open(tmp_path / "replica.db", "apps/")
    news = asyncio.Event()
    replica.subscribe(lambda _: news.set())

    async def follow_until(revision: int) -> None:
        following = asyncio.ensure_future(replica.follow(StoreFeed(store)))
        async with asyncio.timeout(60):
            while replica.revision < revision:
                news.clear()
                await news.wait()
        following.cancel()
        await asyncio.wait([following])

    await follow_until(1)
    assert content(replica) == {"a": b"1"}
    await follow_until(await store.commit([Put("apps/b", b"2"), Delete("apps/a")]))
    assert content(replica) == {"b": b"2"}
    for number in range(6):
        revision = await store.commit([Put("apps/c", b"%d" % number)])
    await follow_until(revision)
    assert content(replica) == {"b": b"2", "c": b"5"}
    await replica.aclose()
    await store.aclose()
