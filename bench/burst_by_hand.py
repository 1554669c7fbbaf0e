"""A burst by hand: the bare engine, so many times, so many at once; see `wake_by_hand`.

A line is `APP COUNT PARALLEL`. All is prepared before, links and bundles too; the answer is the
milliseconds from the first engine's start to the last program's first byte.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from wake_by_hand import ByHand, Made, serve

RUN_AT_ONCE = 8
"""Instances that are ended at a time."""


async def burst(hand: ByHand, line: str) -> float:
    name, count, parallel = line.split()
    app = await hand.app(name)
    image = await hand.images.prepare(app.image)
    made = [await hand.make(app, image) for _ in range(int(count))]
    room = asyncio.Semaphore(int(parallel))

    async def start(one: Made) -> None:
        async with room:
            await hand.begin(one, hand.started(one))

    began = time.perf_counter()
    await asyncio.gather(*map(start, made))
    took_ms = (time.perf_counter() - began) * 1000
    ends = asyncio.Semaphore(RUN_AT_ONCE)

    async def end(one: Made) -> None:
        async with ends:
            await hand.end(one)

    await asyncio.gather(*map(end, made))
    return took_ms


async def main() -> None:
    directory = Path(sys.argv[1])
    hand = ByHand(directory, sys.argv[2])
    await hand.start()
    await serve(directory, lambda line: burst(hand, line))


if __name__ == "__main__":
    asyncio.run(main())
