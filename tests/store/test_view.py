"""A store as it is seen in its own process, and how much of its past it keeps."""

import logging

import pytest

from tabane.errors import Stale
from tabane.store import Change, Delete, MemoryStore, Put
from tabane.store.history import History
from tabane.store.ledger import Commit


async def test_it_shows_the_store_itself_and_tells_before_a_commit_is_answered() -> None:
    store = MemoryStore()
    told: list[tuple[int, tuple[Change, ...]]] = []
    end = store.view.subscribe(lambda changes: told.append((store.view.revision, changes)))
    revision = await store.commit([Put("apps/a", b"1"), Put("hosts/a", b"a")])
    put = (Change("apps/a", b"1", 1), Change("hosts/a", b"a", 1))
    assert told == [(revision, put)] and store.view.revision == 1
    assert store.view.get("apps/a") is await store.get("apps/a"), "not a copy of it"
    assert [entry.key for entry in store.view.range("hosts/")] == ["hosts/a"]
    end()
    await store.commit([Delete("apps/a")])
    assert len(told) == 1 and store.view.get("apps/a") is None
    await store.aclose()


async def test_one_who_cannot_take_a_change_keeps_nobody_from_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    told: list[int] = []

    def fail(_: object) -> None:
        raise ValueError("not now")

    store.view.subscribe(fail)
    store.view.subscribe(lambda changes: told.append(len(changes)))
    with caplog.at_level(logging.ERROR):
        assert await store.commit([Put("a", b"1")]) == 1
    assert told == [1] and "not now" in caplog.text
    await store.aclose()


def commit(revision: int, changes: int) -> Commit:
    return Commit(revision, tuple(Change(f"{n}", b"", revision) for n in range(changes)))


def test_the_past_is_as_long_as_its_changes_are_many() -> None:
    history = History(0, limit=10)
    history.publish([commit(1, 4), commit(2, 4)])
    assert history.floor == 0
    history.publish([commit(3, 4)])
    assert (history.floor, history.revision) == (1, 3)
    history.publish([commit(4, 500)])
    assert (history.floor, history.revision) == (3, 4), "the last is kept, however large it is"
    history.publish([commit(5, 1)])
    assert (history.floor, history.revision) == (4, 5)
    with pytest.raises(Stale):
        history.check(3)
