"""The rungs of the ladder by hand: as `wake_by_hand`, for `bench/reactive.py`.

A line is a rung and the name of an app file. `open` starts an instance and keeps it, for `warm`
(a request to its own address) and `thaw` (it is frozen, not timed; then thawed, and asked);
`close` ends it. `save` has an instance's engine make a checkpoint; `restore` has one go on from it.
`cold` is as there.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from pathlib import Path

from tabane.model import Class
from tabane.node.local import HERE
from tabane.runtimes.cgroups import Cgroup
from wake_by_hand import ByHand, Made, first_byte, serve

SETTLED_S = 0.2
"""After its first request, before it is saved: Tabane's own pause."""
FROZEN_S = 0.15
"""What is thawed has stood still for so long at least."""
MACHINES = (Class.MICROVM, Class.VM)


class Rungs(ByHand):
    def __init__(self, directory: Path, cgroup: str) -> None:
        super().__init__(directory, cgroup)
        self.open: dict[str, Made] = {}

    async def answer(self, line: str) -> float:
        """Milliseconds of a rung; 0 where nothing is timed."""
        rung, name = line.split()
        if rung == "cold":
            return await self.measure(name)
        if rung == "open":
            await self.keep(name)
        elif rung == "close":
            await self.end(self.open.pop(name))
        elif rung == "warm":
            made = self.open[name]
            return await first_byte(made.link.address, made.port)
        elif rung == "thaw":
            return await self.thaw(self.open[name])
        elif rung == "save":
            await self.save(name)
        elif rung == "restore":
            return await self.restore(name)
        return 0.0

    async def make_of(self, name: str) -> Made:
        app = await self.app(name)
        return await self.make(app, await self.images.prepare(app.image))

    async def keep(self, name: str) -> None:
        made = self.open[name] = await self.make_of(name)
        await self.begin(made, self.started(made))

    async def thaw(self, made: Made) -> float:
        if made.is_bare and made.driver.isolation in MACHINES:
            await qmp(made, "stop")
            await asyncio.sleep(FROZEN_S)
            began = time.perf_counter()
            await qmp(made, "cont")
        elif made.is_bare:
            cgroup = Cgroup(made.spec.cgroup)
            await cgroup.freeze()
            await asyncio.sleep(FROZEN_S)
            began = time.perf_counter()
            cgroup.thaw()
        else:
            await made.driver.freeze(made.handle)
            await asyncio.sleep(FROZEN_S)
            began = time.perf_counter()
            await made.driver.thaw(made.handle)
        await first_byte(made.link.address, made.port)
        return (time.perf_counter() - began) * 1000

    async def save(self, name: str) -> None:
        """By the driver: what it dumps, it can restore."""
        made = await self.make_of(name)
        await self.begin(made, made.driver.start(made.spec, made.handle))
        await asyncio.sleep(SETTLED_S)
        place = self.saved(name)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700)
        await made.driver.checkpoint(made.handle, place, leave_running=False)
        await self.clear(made)

    async def restore(self, name: str) -> float:
        made = await self.make_of(name)
        run = made.driver.restore(made.spec, made.handle, self.saved(name))
        took_ms = await self.begin(made, run)
        await made.driver.stop(made.handle, 2.0)
        await self.clear(made)
        return took_ms

    def saved(self, name: str) -> Path:
        """In memory, as Tabane's open checkpoints."""
        return HERE / "run" / f"saved-{name}"


async def qmp(made: Made, order: str) -> None:
    """One order to a bare machine's monitor, which speaks JSON a line."""
    reader, writer = await asyncio.open_unix_connection(made.spec.directory / "qmp.sock")
    for command in ("qmp_capabilities", order):
        writer.write(json.dumps({"execute": command}).encode() + b"\n")
        while "return" not in json.loads(await reader.readline()):
            pass
    writer.close()


async def main() -> None:
    directory = Path(sys.argv[1])
    hand = Rungs(directory, sys.argv[2])
    await hand.start()
    await serve(directory, hand.answer)


if __name__ == "__main__":
    asyncio.run(main())
