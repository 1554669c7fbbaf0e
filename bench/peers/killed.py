"""Members that are killed while they handle what was said, and how soon the receipt says so.

`python -m peers.killed URL COUNT`: on the order `kill COUNT` it answers with the nanoseconds from
each kill to the sender's receipt. Every victim is a process and a room of its own, where others are
members too; the rest of them have acknowledged when it is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process

import uvloop

from peers.api import MESSAGE, Count
from peers.processes import PYTHON
from tabane.middlecon import Cause, Client, Message, Room, connect

OTHERS = 9
AT_ONCE = 4
WAIT_S = 60.0


async def be_victim(url: str, room_name: str) -> None:
    """Say when the handler has begun, and never return from it."""
    me = await connect(url, name=f"victim of {room_name}")
    room = await me.join(room_name, watch=False)

    @room.on_message
    async def wait_for_death(message: Message) -> None:
        print("handling", flush=True)
        await asyncio.Event().wait()

    print("ready", flush=True)
    await asyncio.Event().wait()


class Killer:
    def __init__(self, url: str) -> None:
        self._url = url
        self._acknowledged = Count()
        self._rooms: list[tuple[Room, Process]] = []

    async def open(self, count: int) -> None:
        self._me = await connect(self._url, name="killer")
        others = [await connect(self._url, name=f"other-{number}") for number in range(OTHERS)]
        for first in range(0, count, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, count))
            self._rooms += await asyncio.gather(*(self._open_room(n, others) for n in numbers))

    async def _open_room(self, number: int, others: list[Client]) -> tuple[Room, Process]:
        name = f"room-{number}"
        argv = (*PYTHON, "peers.killed", self._url, name)
        victim = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", *argv, stdout=PIPE
        )
        await _hear(victim, b"ready\n")
        for other in others:
            room = await other.join(name, watch=False)
            room.on_message(lambda message: self._acknowledged.add())
        return await self._me.join(name, member=False, watch=False), victim

    async def kill_next(self) -> int:
        """Nanoseconds until the receipt."""
        room, victim = self._rooms.pop()
        others = self._acknowledged.expect(OTHERS)
        saying = asyncio.ensure_future(room.say(MESSAGE, timeout_s=WAIT_S))
        await others
        await _hear(victim, b"handling\n")
        began = time.perf_counter_ns()
        os.kill(victim.pid, signal.SIGKILL)
        receipt = await saying
        took_ns = time.perf_counter_ns() - began
        await victim.wait()
        causes = {name: reason.cause for name, reason in receipt.failed.items()}
        if causes != {f"victim of {room.name}": Cause.CLOSED}:
            raise RuntimeError(f"the receipt does not name the one that was killed: {receipt}")
        return took_ns


async def _hear(victim: Process, line: bytes) -> None:
    assert victim.stdout is not None
    if (said := await asyncio.wait_for(victim.stdout.readline(), WAIT_S)) != line:
        raise RuntimeError(f"a victim said {said!r}, not {line!r}")


async def kill_all(url: str, count: int) -> None:
    killer = Killer(url)
    await killer.open(count)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print(*[await killer.kill_next() for _ in range(count)], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    url, what = sys.argv[1:]
    uvloop.run(kill_all(url, int(what)) if what.isdecimal() else be_victim(url, what))
