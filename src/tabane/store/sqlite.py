"""The store on disk: `MemoryStore` whose batches reach an SQLite file before they take effect.

The state is small and one process owns it, so it is held in memory and the file is only written;
the file's lock is exclusive, which keeps a second process from believing the same. One thread does
all file work, so the event loop never waits for a disk. WAL with synchronous=FULL means one fsync
per batch, before anyone is answered.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from tabane.clock import SYSTEM, Clock
from tabane.errors import Corrupt, SystemFault, Unavailable, Unsupported
from tabane.store.api import Entry
from tabane.store.history import CHANGES_KEPT
from tabane.store.ledger import Draft, Ledger
from tabane.store.memory import MemoryStore

T = TypeVar("T")

LAYOUT = 1
"""The file's `user_version`."""
APPLICATION_ID = 0x7461_6261
"""`taba` in the file's header, so that no other SQLite file is taken for a store."""

CACHE_KIB = 256
"""Of the file's pages: all that is read is in the ledger, and what is written once is not needed
again."""

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL,
                      lease TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (id TEXT PRIMARY KEY, ttl_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE head (only INTEGER PRIMARY KEY CHECK (only = 1), revision INTEGER NOT NULL);
INSERT INTO head VALUES (1, 0);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {LAYOUT};
COMMIT;
"""

_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


class SqliteFile:
    """A ledger's file and the one thread that touches it.

    Methods raise `Corrupt` (the file is damaged), `Unavailable` (another process has it),
    `Unsupported` (its layout is not ours) or `SystemFault` (full or failing disk, permissions).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sqlite {path.name}")
        self._db: sqlite3.Connection | None = None
        self._closed = False

    async def open(self) -> Ledger:
        """Open the file, making it if need be, and read what it holds."""
        try:
            return await self._run(self._open)
        except BaseException:
            await self.aclose()
            raise

    async def write(self, draft: Draft) -> None:
        """Add a draft in one transaction; return once it is on disk."""
        await self._run(lambda: self._write(draft))

    async def replace(self, ledger: Ledger) -> None:
        """Put `ledger` in place of all the file holds, in one transaction."""
        await self._run(lambda: self._replace(ledger))

    async def aclose(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            await self._run(self._close)
            self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise _explain(self.path, error) from error

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None, "the file is open"
        return self._db

    def _open(self) -> Ledger:
        _create_private(self.path)
        self._db = db = sqlite3.connect(
            self.path, isolation_level=None, timeout=1.0, check_same_thread=False
        )
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._check_layout(db)
        return _read_ledger(db)

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _check_layout(self, db: sqlite3.Connection) -> None:
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise _corrupt(self.path, damage.splitlines()[-1])
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        if (owner, layout) == (0, 0) and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.executescript(SCHEMA)
        elif owner != APPLICATION_ID:
            raise Unsupported(f"{self.path} is another program's SQLite file: name another path")
        elif layout != LAYOUT:
            raise Unsupported(
                f"{self.path} has layout {layout}, this Tabane reads {LAYOUT}: "
                "use the version that wrote it"
            )

    def _write(self, draft: Draft) -> None:
        puts = [entry for entry in draft.entries.values() if entry]
        deletes = [(key,) for key, entry in draft.entries.items() if entry is None]
        with Transaction(self._connection) as db:
            db.executemany("DELETE FROM entries WHERE key = ?", deletes)
            _put_entries(db, puts)
            for lease, ttl_s in draft.leases.items():
                if ttl_s is None:
                    db.execute("DELETE FROM leases WHERE id = ?", (lease,))
                else:
                    db.execute("INSERT INTO leases VALUES (?, ?)", (lease, ttl_s))
            db.execute("UPDATE head SET revision = ?", (draft.revision,))

    def _replace(self, ledger: Ledger) -> None:
        with Transaction(self._connection) as db:
            db.execute("DELETE FROM entries")
            db.execute("DELETE FROM leases")
            _put_entries(db, list(ledger.entries.values()))
            db.executemany("INSERT INTO leases VALUES (?, ?)", ledger.leases.items())
            db.execute("UPDATE head SET revision = ?", (ledger.revision,))


class SqliteStore(MemoryStore):
    """A `Store` in one SQLite file, for one process. Made by `open`."""

    def __init__(self, file: SqliteFile, ledger: Ledger, *, clock: Clock, history: int) -> None:
        super().__init__(clock=clock, ledger=ledger, history=history)
        self._file = file

    @classmethod
    async def open(cls, path: Path, *, clock: Clock = SYSTEM, history: int = CHANGES_KEPT) -> Self:
        """Open the store at `path`, making it if need be; every lease in it gets a full term.

        Raises what `SqliteFile` raises.
        """
        file = SqliteFile(path)
        ledger = await file.open()
        return cls(file, ledger, clock=clock, history=history)

    async def aclose(self) -> None:
        await super().aclose()
        await self._file.aclose()

    async def _persist(self, draft: Draft) -> None:
        await self._file.write(draft)


class Transaction:
    """All or nothing: COMMIT at the end of the block, ROLLBACK when anything in it fails."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _put_entries(db: sqlite3.Connection, entries: list[Entry]) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
        [(entry.key, entry.value, entry.version, entry.lease) for entry in entries],
    )


def _read_ledger(db: sqlite3.Connection) -> Ledger:
    rows = db.execute("SELECT key, value, version, lease FROM entries")
    return Ledger(
        revision=db.execute("SELECT revision FROM head").fetchone()[0],
        entries={key: Entry(key, value, version, lease) for key, value, version, lease in rows},
        leases=dict(db.execute("SELECT id, ttl_s FROM leases")),
    )


def _create_private(path: Path) -> None:
    """Make the file readable by its owner only, and its name in the directory durable."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _corrupt(path: Path, what: str) -> Corrupt:
    return Corrupt(
        f"the store {path} is damaged ({what}): put a backup in its place, "
        "or move it and its -wal file away to begin with an empty one"
    )


def _explain(path: Path, error: sqlite3.Error | OSError) -> SystemFault | Unavailable:
    """The house's error for an SQLite or OS error, by its code."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _CORRUPT:
        return _corrupt(path, str(error))
    if code in _BUSY:
        return Unavailable(f"another process has the store {path} open: stop it first")
    if code in _FULL:
        return SystemFault(
            f"the store {path} cannot be written ({error}): free space on its disk, "
            "or look there for a fault; nothing was changed"
        )
    return SystemFault(
        f"the store {path} cannot be used ({error}): look at its path and permissions"
    )
