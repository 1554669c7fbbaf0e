"""The pool when links cannot be made; with real ones see tests/real/test_network.py."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from tabane.errors import EngineError, Unavailable
from tabane.model import ExitStatus
from tabane.network.pool import MAKERS, NetworkPool
from tabane.runtimes.api import Command, Finished


class BrokenSpawner:
    """Its commands fail when `release` is set, with `output` as their last words."""

    def __init__(self, output: str = "unshare: no space left") -> None:
        self.output = output
        self.release = asyncio.Event()
        self.keys: set[str] = set()

    async def spawn(self, command: Command) -> int:
        assert command.key not in self.keys
        self.keys.add(command.key)
        return 0

    async def finished(self, key: str) -> Finished:
        await self.release.wait()
        return Finished(ExitStatus(1), self.output)

    async def forget(self, key: str) -> None:
        self.keys.remove(key)


async def turns_until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("nothing happened")


async def test_every_waiting_claim_hears_why_there_is_no_link() -> None:
    spawner = BrokenSpawner()
    pool = NetworkPool(spawner, "broken", size=0)
    await pool.recover()
    claims = [asyncio.ensure_future(pool.claim(100_000, egress=n % 2 == 0)) for n in range(7)]
    spawner.release.set()
    for claim in claims:
        with pytest.raises(EngineError, match=r"exited with code 1: unshare: no space left"):
            await claim
    await pool.aclose()
    assert not spawner.keys


async def test_a_reserve_that_cannot_be_made_is_told_and_tried_later(caplog) -> None:
    caplog.set_level(logging.WARNING)
    spawner = BrokenSpawner()
    spawner.release.set()
    pool = NetworkPool(spawner, "broken", size=3)
    await pool.recover()
    await turns_until(lambda: "no link prepared" in caplog.text)
    await pool.aclose()
    assert len(caplog.records) == 1


async def test_closing_ends_claims_that_wait() -> None:
    spawner = BrokenSpawner()
    pool = NetworkPool(spawner, "broken", size=0)
    await pool.recover()
    claims = [asyncio.ensure_future(pool.claim(100_000, egress=True)) for _ in range(5)]
    await turns_until(lambda: len(spawner.keys) == MAKERS)
    closing = asyncio.ensure_future(pool.aclose())
    spawner.release.set()
    ends = await asyncio.gather(*claims, return_exceptions=True)
    await closing
    assert {type(end) for end in ends} == {EngineError, Unavailable}
    with pytest.raises(Unavailable, match="closing"):
        await pool.claim(100_000, egress=True)
    await pool.aclose()
