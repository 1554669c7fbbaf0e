"""`middlecon bench`: how fast a running hub is from here, measured with members in this process.

A quick look, not a comparison: hub, members and sender share the machine, and members in one Python
process are slower than the same members spread over several.
"""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import msgspec

from tabane.clock import SYSTEM
from tabane.middlecon.client import Client, Room
from tabane.middlecon.commands import dial
from tabane.middlecon.inbox import Message
from tabane.middlecon.receipts import Receipt
from tabane.middlecon.screen import as_json, table

CASTS = 100
"""Of one burst. A `say` after them comes last at every member, so its receipt ends the burst."""


class Result(msgspec.Struct):
    """One job: `n` messages, microseconds of one, how many a second, deliveries a second."""

    job: str
    n: int
    p50_us: float
    p99_us: float
    per_s: float
    deliveries_per_s: float


class Bench:
    """Members in one room, and one who speaks to them. `missed`: fates other than acknowledged."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.missed = 0
        self.delivered = 0
        self._duration_s: float = options.duration
        self._timeout_s: float = options.timeout
        self._data = bytes(options.size)
        self._members = options.members
        self._first = ""
        self._speaker: Client
        self._room: Room

    async def start(self, options: argparse.Namespace, stack: AsyncExitStack) -> str:
        """Connect all; returns the hub's name."""
        prefix = f"bench-{secrets.token_hex(4)}"
        self._first = f"{prefix}-1"
        for number in range(self._members):
            member = await stack.enter_async_context(await dial(options, f"{prefix}-{number + 1}"))
            room = await member.join(prefix, member=False, watch=False)
            room.on_message(self._answer)
            member.on_message(self._answer)
            await member.join(prefix, watch=False)
        self._speaker = await stack.enter_async_context(await dial(options, prefix))
        self._room = await self._speaker.join(prefix, member=False, watch=False)
        return self._speaker.hub

    def _answer(self, message: Message) -> bytes:
        self.delivered += 1
        return message.data

    async def run(self) -> list[Result]:
        jobs: list[tuple[str, int, Callable[[], Awaitable[None]]]] = [
            ("say", 1, self._say),
            ("ask", 1, self._ask),
            ("call", 1, self._call),
            ("cast", CASTS, self._cast),
        ]
        return [await self._measure(*job) for job in jobs]

    async def _measure(
        self, name: str, messages: int, once: Callable[[], Awaitable[None]]
    ) -> Result:
        """Do it for the duration, but once at least; `once` sends so many messages."""
        await once()
        times: list[float] = []
        began, delivered = SYSTEM.now(), self.delivered
        while not times or SYSTEM.now() - began < self._duration_s:
            before = SYSTEM.now()
            await once()
            times.append((SYSTEM.now() - before) / messages)
        elapsed_s = max(SYSTEM.now() - began, 1e-9)
        n = len(times) * messages
        return Result(
            name,
            n,
            round(percentile(times, 0.5) * 1e6, 1),
            round(percentile(times, 0.99) * 1e6, 1),
            round(n / elapsed_s, 1),
            round((self.delivered - delivered) / elapsed_s, 1),
        )

    async def _say(self) -> None:
        self._count(await self._room.say(self._data, timeout_s=self._timeout_s))

    async def _ask(self) -> None:
        self._count(await self._room.ask(self._data, timeout_s=self._timeout_s))

    async def _call(self) -> None:
        await self._speaker.call(self._first, self._data, timeout_s=self._timeout_s)

    async def _cast(self) -> None:
        for _ in range(CASTS):
            await self._room.cast(self._data)
        self._count(await self._room.say(b"", timeout_s=self._timeout_s))
        self.delivered -= self._members

    def _count(self, receipt: Receipt) -> None:
        self.missed += self._members - len(receipt.acknowledged)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def result_lines(results: list[Result]) -> list[str]:
    heads = ("JOB", "N", "P50 us", "P99 us", "PER S", "DELIVERIES PER S")
    rows = [
        (
            result.job,
            f"{result.n:,}",
            f"{result.p50_us:,.0f}",
            f"{result.p99_us:,.0f}",
            f"{result.per_s:,.0f}",
            f"{result.deliveries_per_s:,.0f}",
        )
        for result in results
    ]
    return table(heads, rows)


async def bench(options: argparse.Namespace) -> int:
    """Exit code 1 when a message was not acknowledged by every member."""
    measurement = Bench(options)
    async with AsyncExitStack() as stack:
        hub = await measurement.start(options, stack)
        results = await measurement.run()
    settings = {"hub": hub, "members": options.members, "size_bytes": options.size}
    if options.json:
        rows = [msgspec.to_builtins(result) for result in results]
        print(as_json(settings | {"missed": measurement.missed, "results": rows}))
    else:
        print(f"hub {hub}, members in this process: {options.members}, bytes: {options.size}")
        print("\n".join(result_lines(results)))
        if measurement.missed:
            print(f"{measurement.missed} deliveries were not acknowledged")
    return 1 if measurement.missed else 0
