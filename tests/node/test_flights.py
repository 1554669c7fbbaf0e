"""Work that is shared by all who want it."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import NotFound
from tabane.images.registry import Progress, Tell
from tabane.node.flights import Flights
from tabane.supervise import Supervisor


class Work:
    """Ends when the test says so."""

    def __init__(self) -> None:
        self.begun = 0
        self.given_up = 0
        self.goes_on = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.problem: Exception | None = None

    async def __call__(self, tell: Tell) -> None:
        self.begun += 1
        tell(Progress("copy", "there", self.begun, 2))
        self.has_begun.set()
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.problem is not None:
            raise self.problem


async def test_how_far_it_is_can_be_asked_while_it_is_done() -> None:
    async with Supervisor("test") as tasks:
        flights, work = Flights(tasks), Work()
        assert flights.progress("a") is None
        waiting = tasks.start("waiting", flights.join("a", work, lambda progress: None))
        await work.has_begun.wait()
        assert flights.progress("a") == Progress("copy", "there", 1, 2)
        work.goes_on.set()
        await waiting
        assert flights.progress("a") is None


async def test_it_is_done_once_and_all_hear_of_it() -> None:
    async with Supervisor("test") as tasks:
        flights, work = Flights(tasks), Work()
        heard: list[list[Progress]] = [[], [], []]
        joined = [tasks.start("a", flights.join("x", work, told.append)) for told in heard]
        await work.has_begun.wait()
        assert "x" in flights and flights.keys() == {"x"}
        late: list[Progress] = []
        joined.append(tasks.start("late", flights.join("x", work, late.append)))
        work.goes_on.set()
        await asyncio.gather(*joined)
        assert work.begun == 1 and heard == [[Progress("copy", "there", 1, 2)]] * 3
        assert late == heard[0]
        assert "x" not in flights
        await flights.join("x", work, late.append)
        assert work.begun == 2


async def test_all_are_told_what_went_wrong_and_the_next_tries_again() -> None:
    async with Supervisor("test") as tasks:
        flights, work = Flights(tasks), Work()
        work.problem = NotFound("gone")
        work.goes_on.set()
        joined = [flights.join("x", work, lambda progress: None) for _ in range(3)]
        problems = await asyncio.gather(*joined, return_exceptions=True)
        assert problems == [work.problem] * 3 and work.begun == 1
        work.problem = None
        await flights.join("x", work, lambda progress: None)


async def test_who_leaves_ends_it_only_when_nobody_else_waits() -> None:
    async with Supervisor("test") as tasks:
        flights, work = Flights(tasks), Work()
        one = tasks.start("one", flights.join("x", work, lambda progress: None))
        two = tasks.start("two", flights.join("x", work, lambda progress: None))
        await work.has_begun.wait()
        one.cancel()
        await asyncio.wait([one])
        assert "x" in flights and not work.given_up
        two.cancel()
        await asyncio.wait([two])
        assert "x" not in flights
        work.goes_on.set()
        await flights.join("x", work, lambda progress: None)
        assert (work.begun, work.given_up) == (2, 1)


async def test_a_mistake_is_a_mistake() -> None:
    reported: list[str] = []
    async with Supervisor("test", on_failure=lambda name, error: reported.append(name)) as tasks:
        flights, work = Flights(tasks), Work()
        work.problem = ValueError("a bug")
        work.goes_on.set()
        with pytest.raises(ValueError, match="a bug"):
            await flights.join("x", work, lambda progress: None)
    assert len(reported) == 1
