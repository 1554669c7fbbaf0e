from pathlib import Path

import pytest

from tabane.store import MemoryStore, SqliteStore, Store
from tabane.testing import DURABLE_CHECKS, STORE_CHECKS, VirtualClock
from tabane.testing.stores import HISTORY, Check


class Bench:
    def __init__(self, directory: Path | None = None) -> None:
        self.clock = VirtualClock()
        self.directory = directory

    async def open(self) -> Store:
        if self.directory is None:
            return MemoryStore(clock=self.clock, history=HISTORY)
        path = self.directory / "store.db"
        return await SqliteStore.open(path, clock=self.clock, history=HISTORY)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def stall(self, seconds: float) -> None:
        self.clock.stall(seconds)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_memory(check: Check) -> None:
    await check(Bench())


@pytest.mark.parametrize("check", STORE_CHECKS + DURABLE_CHECKS, ids=lambda check: check.__name__)
async def test_sqlite(check: Check, tmp_path: Path) -> None:
    await check(Bench(tmp_path))
