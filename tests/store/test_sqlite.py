"""What only the store on disk can get wrong."""

import asyncio
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tabane.errors import Closed, Corrupt, SystemFault, TabaneError, Unsupported
from tabane.store import Put, SqliteStore
from tabane.store.ledger import Draft
from tabane.testing import VirtualClock

COMMITTER = Path(__file__).with_name("committer.py")


def committer(
    path: Path, *, writers: int = 8, value_bytes: int = 100, commits: int = 0
) -> list[str]:
    numbers = (writers, value_bytes, commits)
    return [sys.executable, str(COMMITTER), str(path), *map(str, numbers)]


async def keys_of(path: Path) -> list[str]:
    store = await SqliteStore.open(path)
    _, entries = await store.range("k/")
    await store.aclose()
    return [entry.key for entry in entries]


@pytest.mark.parametrize("answers", [1, 100, 1000])
def test_kill_9_amid_commits_loses_nothing_acknowledged(tmp_path: Path, answers: int) -> None:
    path = tmp_path / "store.db"
    with subprocess.Popen(committer(path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        acknowledged = [process.stdout.readline().strip() for _ in range(answers)]
        process.kill()
        acknowledged += process.stdout.read().split()
    assert len(acknowledged) >= answers
    assert set(acknowledged) <= set(asyncio.run(keys_of(path)))


def test_fsync_comes_before_the_answer(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = "--trace=fsync,fdatasync,write"
    command = committer(tmp_path / "store.db", writers=1, commits=5)
    subprocess.run(
        ["strace", "-f", "-y", "-qq", calls, "-o", str(trace), *command],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    synced_between_answers, synced = [], False
    for line in trace.read_text().splitlines():
        if "sync(" in line and "store.db-wal" in line:
            synced = True
        elif "write(1<" in line and '"k/' in line:
            synced_between_answers.append(synced)
            synced = False
    assert synced_between_answers == [True] * 5


def test_full_disk_is_said_and_harms_nothing(tmp_path: Path) -> None:
    command = committer(tmp_path / "store.db", writers=4, value_bytes=20_000)
    answers = subprocess.run(
        [
            *("unshare", "--map-root-user", "--mount", "sh", "-c"),
            f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"',
            *("sh", *command),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.splitlines()
    *acknowledged, refusal = answers
    kind, kept, text = refusal.removeprefix("refused: ").split(": ", 2)
    assert kind == SystemFault.__name__
    assert int(kept) == len(acknowledged) > 0
    assert "store.db cannot be written" in text and "free space" in text


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    command = committer(tmp_path / "store.db")
    other = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert "Unavailable: another process has the store" in other.stderr
    await store.aclose()
    assert await keys_of(tmp_path / "store.db") == []


async def filled(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.commit([Put(f"k/{number:04}", bytes(500)) for number in range(200)])
    await store.aclose()


async def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 5] = b"\xa5" * 8192
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=r"store\.db is damaged .* backup"):
        await SqliteStore.open(path)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, bytes(range(256)) * 64])
async def test_what_is_no_database_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=r"store\.db is damaged"):
        await SqliteStore.open(path)
    assert path.read_bytes() == content


async def test_a_truncated_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    path.write_bytes(path.read_bytes()[: 4096 * 4])
    with pytest.raises(Corrupt):
        await SqliteStore.open(path)


async def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE bookmarks (url)")
    foreign.close()
    with pytest.raises(Unsupported, match="another program's"):
        await SqliteStore.open(tmp_path / "foreign.db")
    await filled(tmp_path / "newer.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(Unsupported, match="layout 99"):
        await SqliteStore.open(tmp_path / "newer.db")


async def test_a_path_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "store.db"):
        with pytest.raises(SystemFault, match="path and permissions"):
            await SqliteStore.open(path)


async def test_others_cannot_read_it(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "new" / "store.db")
    await store.commit([Put("secrets/a", b"s")])
    for path in (tmp_path / "new").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    await store.aclose()


class FailingStore(SqliteStore):
    failing = False

    async def _persist(self, draft: Draft) -> None:
        if self.failing:
            raise SystemFault("the disk is full")
        await super()._persist(draft)


async def test_what_is_not_on_disk_is_not_seen(tmp_path: Path) -> None:
    store = await FailingStore.open(tmp_path / "store.db")
    await store.commit([Put("k", b"1")])
    store.failing = True
    async with store.watch("") as watch:
        commits = [store.commit([Put("k", b"2")]), store.commit([Put("l", b"2")])]
        results = await asyncio.gather(*commits, return_exceptions=True)
        assert [type(result) for result in results] == [SystemFault, SystemFault]
        assert [entry.value for entry in (await store.range(""))[1]] == [b"1"]
        store.failing = False
        assert await store.commit([Put("k", b"3")]) == 2
        assert [change.value for change in await anext(aiter(watch))] == [b"3"]
    await store.aclose()


async def test_a_lease_that_cannot_be_ended_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    store = await FailingStore.open(tmp_path / "store.db", clock=clock)
    lease = await store.grant_lease(5.0)
    await store.commit([Put("n", b"", lease)])
    async with store.watch("") as watch:
        store.failing = True
        clock.advance(5.0)
        with pytest.raises(TabaneError):
            await store.commit([Put("after the attempt", b"")])
        assert "keep their keys for now: the disk is full" in caplog.text
        store.failing = False
        clock.advance(1.0)
        async with asyncio.timeout(60):
            assert [change.key for change in await anext(aiter(watch))] == ["n"]
    await store.aclose()


async def test_a_cancelled_caller_does_not_break_the_others(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    commits = [asyncio.ensure_future(store.commit([Put(f"k/{n}", b"")])) for n in range(3)]
    await asyncio.sleep(0)
    commits[1].cancel()
    results = await asyncio.gather(*commits, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert {type(results[0]), type(results[2])} == {int}
    await store.aclose()
    with pytest.raises(Closed):
        await store.commit([])
