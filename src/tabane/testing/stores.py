"""What every `Store` must do: the conformance suite.

Each check is a coroutine that takes a `StoreBench` (where stores can be opened, and time passes
when told) and asserts. `check_store` runs all that apply; a test runner takes them one by one:

    @pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
    async def test_memory(check):
        await check(MemoryBench())
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from tabane.errors import Closed, Conflict, NotFound, Stale, TabaneError, UsageError
from tabane.store.api import Change, Delete, Expect, Put, Store, Watch

HISTORY = 8
"""A bench opens its stores with this many commits of history, where the store lets it choose."""
PATIENCE_S = 60.0


class StoreBench(Protocol):
    async def open(self) -> Store:
        """Open the store: each time the same one, for stores that outlive being closed."""

    def advance(self, seconds: float) -> None:
        """Let time pass for leases."""

    def stall(self, seconds: float) -> None:
        """Let time pass while the store does not run."""


Check = Callable[[StoreBench], Awaitable[None]]


async def check_store(bench: Callable[[], StoreBench], *, durable: bool) -> None:
    """Run every check, each on a bench of its own. `durable`: the store outlives being closed."""
    for check in STORE_CHECKS + (DURABLE_CHECKS if durable else ()):
        await check(bench())


async def check_keys(bench: StoreBench) -> None:
    """Put, get, overwrite, delete; versions are the revision of the last write."""
    async with aclosing(await bench.open()) as store:
        assert await store.get("apps/a") is None
        first = await store.commit([Put("apps/a", b"1")])
        second = await store.commit([Put("apps/b", b"2"), Put("apps/a", b"3")])
        assert second == first + 1
        entry = await store.get("apps/a")
        assert entry is not None and (entry.value, entry.version) == (b"3", second)
        await store.commit([Delete("apps/a")])
        assert await store.get("apps/a") is None


async def check_values_are_bytes(bench: StoreBench) -> None:
    """Any bytes are a value, the empty ones too; keys may be any printable text."""
    async with aclosing(await bench.open()) as store:
        for value in (b"", b"\0\xff\n", bytes(1 << 20)):
            await store.commit([Put("apps/束ね", value)])
            entry = await store.get("apps/束ね")
            assert entry is not None and entry.value == value


async def check_range(bench: StoreBench) -> None:
    """A range is ordered by key, bounded by its prefix and says its revision."""
    async with aclosing(await bench.open()) as store:
        assert (await store.range(""))[1] == []
        await store.commit([Put("b/2", b""), Put("b/1", b""), Put("a/1", b"")])
        revision = await store.commit([Put("bc", b"")])
        assert await store.range("c") == (revision, [])
        at, entries = await store.range("b/")
        assert (at, [entry.key for entry in entries]) == (revision, ["b/1", "b/2"])
        assert [entry.key for entry in (await store.range(""))[1]] == ["a/1", "b/1", "b/2", "bc"]


async def check_compare_and_set(bench: StoreBench) -> None:
    """All conditions hold or nothing is written, and the error names the key."""
    async with aclosing(await bench.open()) as store:
        version = await store.commit([Put("k", b"1")], [Expect("k", 0)])
        error = await _refused(Conflict, store.commit([Put("k", b"2")], [Expect("k", 0)]))
        assert "k is version" in str(error)
        writes = [Put("other", b"x"), Put("k", b"3")]
        await _refused(Conflict, store.commit(writes, [Expect("other", 0), Expect("k", 99)]))
        assert await store.get("other") is None
        await store.commit(writes, [Expect("other", 0), Expect("k", version)])
        await _refused(Conflict, store.commit([Delete("k")], [Expect("k", version)]))


async def check_one_winner(bench: StoreBench) -> None:
    """Of many who compare and set the same key at once, one wins."""
    async with aclosing(await bench.open()) as store:

        async def claim(number: int) -> bool:
            try:
                await store.commit([Put("owner", b"%d" % number)], [Expect("owner", 0)])
            except Conflict:
                return False
            return True

        wins = await asyncio.gather(*(claim(number) for number in range(50)))
        entry = await store.get("owner")
        assert entry is not None and [b"%d" % wins.index(True)] == [entry.value]
        assert sum(wins) == 1


async def check_concurrent_commits(bench: StoreBench) -> None:
    """Commits made at once all happen, each with a revision of its own."""
    async with aclosing(await bench.open()) as store:
        commits = [store.commit([Put(f"k/{number:02}", b"")]) for number in range(50)]
        revisions = await asyncio.gather(*commits)
        assert len(set(revisions)) == 50
        at, entries = await store.range("k/")
        assert (at, len(entries)) == (max(revisions), 50)
        assert {entry.version for entry in entries} == set(revisions)


async def check_empty_commits(bench: StoreBench) -> None:
    """A commit that changes nothing is no revision, but its conditions count."""
    async with aclosing(await bench.open()) as store:
        revision = await store.commit([Put("k", b"")])
        assert await store.commit([]) == revision
        assert await store.commit([Delete("nothing")]) == revision
        await _refused(Conflict, store.commit([], [Expect("k", 0)]))


async def check_bad_writes(bench: StoreBench) -> None:
    """Keys that cannot be kept, and one key written twice in a commit, are refused."""
    async with aclosing(await bench.open()) as store:
        for key in ("", "a\nb", "a\0b", "\udcff"):
            await _refused(UsageError, store.commit([Put(key, b"")]))
        await _refused(UsageError, store.commit([Put("k", b"1"), Delete("k")]))
        await _refused(NotFound, store.commit([Put("k", b""), Put("l", b"", "no-such-lease")]))
        assert (await store.range(""))[1] == []


async def check_watch(bench: StoreBench) -> None:
    """A watch tells each commit's changes below its prefix, together and in order."""
    async with aclosing(await bench.open()) as store:
        await store.commit([Put("apps/old", b"")])
        async with store.watch("apps/") as watch:
            first = await store.commit(
                [Put("apps/a", b"1"), Put("nodes/n", b""), Put("apps/b", b"")]
            )
            await store.commit([Put("nodes/n", b"2")])
            second = await store.commit([Delete("apps/a")])
            assert await _next(watch) == (
                Change("apps/a", b"1", first),
                Change("apps/b", b"", first),
            )
            assert await _next(watch) == (Change("apps/a", None, second),)
            waiting = asyncio.ensure_future(_next(watch))
            await asyncio.sleep(0)
            third = await store.commit([Put("apps/c", b"")])
            assert await waiting == (Change("apps/c", b"", third),)


async def check_watch_from_revision(bench: StoreBench) -> None:
    """`after` the revision of a range, a watch replays all that came since, and nothing else."""
    async with aclosing(await bench.open()) as store:
        await store.commit([Put("a", b"")])
        at, _ = await store.range("")
        revisions = [await store.commit([Put(f"k/{n}", b"")]) for n in range(3)]
        async with store.watch("", after=at) as watch:
            assert [(await _next(watch))[0].revision for _ in revisions] == revisions


async def check_watch_too_old(bench: StoreBench) -> None:
    """A revision older than the history, or never reached, is stale; so is a watcher too slow."""
    async with aclosing(await bench.open()) as store:
        async with store.watch("") as slow:
            for _ in range(HISTORY + 1):
                revision = await store.commit([Put("k", b"")])
            await _refused(Stale, _next(slow))
        for after in (0, revision + 1):
            await _refused(Stale, _enter_watch(store, after))
        await _enter_watch(store, revision - HISTORY)


async def check_lease_ends(bench: StoreBench) -> None:
    """Its keys vanish in one commit at the end of the term; others' stay."""
    async with aclosing(await bench.open()) as store:
        lease = await store.grant_lease(10.0)
        other = await store.grant_lease(10.5)
        await store.commit([Put("n/a", b"", lease), Put("n/b", b"", lease), Put("n/c", b"", other)])
        async with store.watch("") as watch:
            bench.advance(9.9)
            await store.commit([Put("mark", b"")])
            assert [change.key for change in await _next(watch)] == ["mark"]
            bench.advance(0.1)
            ended = await _next(watch)
            assert [(change.key, change.value) for change in ended] == [
                ("n/a", None),
                ("n/b", None),
            ]
            bench.advance(0.5)
            assert [change.key for change in await _next(watch)] == ["n/c"]
        await _refused(NotFound, store.renew_lease(lease))
        await _refused(NotFound, store.commit([Put("n/a", b"", lease)]))


async def check_lease_renewed(bench: StoreBench) -> None:
    """A renewal starts the term again."""
    async with aclosing(await bench.open()) as store:
        lease = await store.grant_lease(10.0)
        await store.commit([Put("n", b"", lease)])
        async with store.watch("") as watch:
            for _ in range(3):
                bench.advance(9.0)
                await store.renew_lease(lease)
            await store.commit([Put("mark", b"")])
            assert [change.key for change in await _next(watch)] == ["mark"]
            bench.advance(10.0)
            assert [change.key for change in await _next(watch)] == ["n"]


async def check_lease_revoked(bench: StoreBench) -> None:
    """A revoked lease takes its keys along, but not one that was put again without it."""
    async with aclosing(await bench.open()) as store:
        lease = await store.grant_lease(10.0)
        await store.commit([Put("n/a", b"", lease), Put("n/b", b"", lease)])
        await store.commit([Put("n/b", b"mine")])
        await store.revoke_lease(lease)
        await store.revoke_lease(lease)
        assert [entry.key for entry in (await store.range(""))[1]] == ["n/b"]
        await _refused(NotFound, store.renew_lease(lease))
        for ttl_s in (0.0, -1.0, float("nan"), float("inf")):
            await _refused(UsageError, store.grant_lease(ttl_s))


async def check_lease_after_outage(bench: StoreBench) -> None:
    """When the store itself stood still, nobody could renew: every lease gets a full term."""
    async with aclosing(await bench.open()) as store:
        lease = await store.grant_lease(10.0)
        await store.commit([Put("n", b"", lease)])
        bench.stall(60.0)
        await store.renew_lease(lease)
        bench.stall(60.0)
        bench.advance(9.9)
        await store.commit([])
        assert await store.get("n") is not None
        async with store.watch("") as watch:
            bench.advance(0.1)
            assert [change.key for change in await _next(watch)] == ["n"]


async def check_closed(bench: StoreBench) -> None:
    """Closing finishes what was asked before, ends watches, and is idempotent."""
    store = await bench.open()
    async with store.watch("") as watch:
        commit = asyncio.ensure_future(store.commit([Put("k", b"")]))
        await asyncio.sleep(0)
        await store.aclose()
        await store.aclose()
        assert await commit
        assert len(await _next(watch)) == 1
        await _refused(Closed, _next(watch))
    await _refused(Closed, store.commit([Put("k", b"")]))


async def check_reopened(bench: StoreBench) -> None:
    """A store opened again has its entries, versions and revision, and goes on counting."""
    async with aclosing(await bench.open()) as store:
        version = await store.commit([Put("a", b"1"), Put("gone", b"")])
        await store.commit([Delete("gone"), Put("b", b"2")])
        before = await store.range("")
    async with aclosing(await bench.open()) as store:
        assert await store.range("") == before
        await _enter_watch(store, before[0])
        assert await store.commit([Put("a", b"")], [Expect("a", version)]) == before[0] + 1


async def check_lease_reopened(bench: StoreBench) -> None:
    """However long a store was closed, its leases have a full term when it is opened."""
    async with aclosing(await bench.open()) as store:
        lease = await store.grant_lease(10.0)
        ended = await store.grant_lease(10.0)
        await store.commit([Put("n", b"", lease)])
        await store.revoke_lease(ended)
    bench.advance(100.0)
    async with aclosing(await bench.open()) as store:
        bench.advance(9.0)
        await store.renew_lease(lease)
        await _refused(NotFound, store.renew_lease(ended))
        async with store.watch("") as watch:
            bench.advance(10.0)
            assert [change.key for change in await _next(watch)] == ["n"]


STORE_CHECKS: tuple[Check, ...] = (
    check_keys,
    check_values_are_bytes,
    check_range,
    check_compare_and_set,
    check_one_winner,
    check_concurrent_commits,
    check_empty_commits,
    check_bad_writes,
    check_watch,
    check_watch_from_revision,
    check_watch_too_old,
    check_lease_ends,
    check_lease_renewed,
    check_lease_revoked,
    check_lease_after_outage,
    check_closed,
)
DURABLE_CHECKS: tuple[Check, ...] = (check_reopened, check_lease_reopened)


async def _next(watch: Watch) -> tuple[Change, ...]:
    async with asyncio.timeout(PATIENCE_S):
        return await anext(aiter(watch))


async def _enter_watch(store: Store, after: int) -> None:
    async with store.watch("", after=after):
        pass


async def _refused(kind: type[TabaneError], work: Awaitable[object]) -> TabaneError:
    """The error of `kind` that `work` must raise."""
    try:
        answer = await work
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was to be raised, the answer was {answer!r}")
