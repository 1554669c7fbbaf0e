"""Idempotency keys, with a clock that tests move."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from tabane.errors import Busy, Conflict, Denied
from tabane.k2i.orders import Gpid, Order, Outcome, Signal
from tabane.k2i.repeats import Repeats
from tabane.security.identity import Principal
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

TARGET = Gpid("tokyo", "tokyo-1", "i", 7, 100)
ORDER = Order((TARGET,), Signal(15), key="k")
ALICE, BOB = Principal("peer", 1), Principal("peer", 2)


class Obeyed:
    """Counts what is done; each goes on until it is let."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self) -> tuple[Outcome, ...]:
        self.count += 1
        self.begun.set()
        number = self.count
        await self.go_on.wait()
        return (Outcome(TARGET, message=f"number {number}"),)


class World(NamedTuple):
    repeats: Repeats
    clock: VirtualClock
    obeyed: Obeyed

    async def once(self, order: Order = ORDER, who: Principal = ALICE) -> str:
        (outcome,) = await self.repeats.once(order, who, self.obeyed)
        return outcome.message


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = VirtualClock()
    async with Supervisor("test") as tasks:
        yield World(Repeats(tasks, clock, keep_s=60.0, most=3), clock, Obeyed())


async def test_the_second_has_the_answer_of_the_first(world: World) -> None:
    assert [await world.once(), await world.once()] == ["number 1"] * 2


async def test_many_at_once_are_one(world: World) -> None:
    world.obeyed.go_on.clear()
    waiting = asyncio.gather(*(world.once() for _ in range(50)))
    await world.obeyed.begun.wait()
    world.obeyed.go_on.set()
    assert await waiting == ["number 1"] * 50


async def test_it_goes_on_when_the_first_is_gone(world: World) -> None:
    world.obeyed.go_on.clear()
    first = asyncio.ensure_future(world.once())
    await world.obeyed.begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(world.once())
    world.obeyed.go_on.set()
    assert await second == "number 1"


async def test_a_key_belongs_to_who_gave_it(world: World) -> None:
    assert [await world.once(who=ALICE), await world.once(who=BOB)] == ["number 1", "number 2"]
    token = Principal("token", ALICE.uid)
    assert await world.once(who=token) == "number 3"


async def test_a_key_is_for_one_order(world: World) -> None:
    await world.once()
    other = Order((TARGET,), Signal(9), key="k")
    with pytest.raises(Conflict, match="'k' was used for another order"):
        await world.once(other)
    assert world.obeyed.count == 1


async def test_keys_are_forgotten_in_time(world: World) -> None:
    await world.once()
    world.clock.advance(59.9)
    assert await world.once() == "number 1"
    world.clock.advance(0.1)
    assert await world.once() == "number 2"


async def test_no_key_is_forgotten_while_it_is_under_way(world: World) -> None:
    world.obeyed.go_on.clear()
    first = asyncio.ensure_future(world.once())
    await world.obeyed.begun.wait()
    world.clock.advance(1000)
    second = asyncio.ensure_future(world.once())
    await asyncio.sleep(0)
    world.obeyed.go_on.set()
    assert [await first, await second] == ["number 1"] * 2


async def test_who_has_too_many_waits_and_others_do_not(world: World) -> None:
    for key in "abc":
        await world.once(Order((TARGET,), Signal(15), key=key))
    more = Order((TARGET,), Signal(15), key="d")
    with pytest.raises(Busy, match="3 outcomes are remembered for your idempotency keys"):
        await world.once(more)
    assert world.obeyed.count == 3
    assert await world.once(more, BOB) == "number 4"
    assert await world.once(Order((TARGET,), Signal(15), key="a")) == "number 1"
    world.clock.advance(60)
    assert await world.once(more) == "number 5"


async def test_what_is_refused_as_a_whole_may_be_tried_again(world: World) -> None:
    async def refuse() -> tuple[Outcome, ...]:
        raise Denied("no")

    for _ in range(2):
        with pytest.raises(Denied, match="no"):
            await world.repeats.once(ORDER, ALICE, refuse)
    assert await world.once() == "number 1"


async def test_what_failed_as_a_whole_may_be_tried_again(world: World) -> None:
    async def fail() -> tuple[Outcome, ...]:
        raise OSError("no")

    failures: list[str] = []
    async with Supervisor("test", on_failure=lambda name, _: failures.append(name)) as tasks:
        repeats = Repeats(tasks, world.clock)
        with pytest.raises(OSError, match="no"):
            await repeats.once(ORDER, ALICE, fail)
        (outcome,) = await repeats.once(ORDER, ALICE, world.obeyed)
    assert outcome.message == "number 1"
    assert failures == ["test/order"]
