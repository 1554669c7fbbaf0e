"""A process of a contender's Python clients: `python -m peers.driver PEER ROLE URL COUNT [FORKS]`

Roles: `members` (COUNT of them, in this process or in FORKS others), `sender` (to COUNT members),
`room` (both), `answerer`, `callers` (COUNT of them). It prints "ready" and then obeys orders on
stdin, as the programs in C do (`native/members.h`): `say COUNT MILLISECONDS`, the same for `call`,
and `cast BURST COUNT MILLISECONDS`. At the end of stdin it ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import uvloop

from peers.api import MESSAGE, Call, Clients

WARM_UP = 2
OPENING = 50
"""Sessions that are opened at a time: fewer than any server's backlog."""
ORDER_S = 100.0

Once = Callable[[], Awaitable[None]]


class Driver:
    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._calls: list[Call] = []

    async def open(self, role: str, count: int) -> None:
        clients = self._clients
        if role == "room":
            await _each(clients.join(number) for number in range(count))
            await clients.open_sender()
        elif role == "members":
            await _each(clients.join(number) for number in range(count))
        elif role == "sender":
            await clients.open_sender()
        elif role == "answerer":
            await clients.open_answerer()
        else:
            for number in range(count):
                self._calls.append(await clients.open_caller(number))

    async def obey(self, order: str) -> list[int]:
        """Nanoseconds of each say, burst of casts, or call."""
        what, *burst, count, milliseconds = order.split()
        once: dict[str, list[Once]] = {
            "say": [self._clients.say],
            "cast": [lambda: self._cast_burst(int(burst[0]))],
            "call": [lambda call=call: self._call_once(call) for call in self._calls],
        }
        async with asyncio.timeout(ORDER_S):
            found = await asyncio.gather(
                *(_repeat(one, int(count), int(milliseconds)) for one in once[what])
            )
        return [took_ns for times in found for took_ns in times]

    async def _cast_burst(self, burst: int) -> None:
        clients = self._clients
        delivered = clients.delivered.expect(burst * clients.members)
        for _ in range(burst):
            await clients.cast()
        await delivered

    async def _call_once(self, call: Call) -> None:
        if await call(MESSAGE) != MESSAGE:
            raise RuntimeError("the answer is not what was said")


async def _each(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do them all, so many at a time."""
    places = asyncio.Semaphore(OPENING)

    async def one(work: Coroutine[Any, Any, None]) -> None:
        async with places:
            await work

    await asyncio.gather(*map(one, works))


async def _repeat(once: Once, count: int, milliseconds: int) -> list[int]:
    for _ in range(WARM_UP):
        await once()
    clock = time.perf_counter_ns
    end, found = clock() + milliseconds * 1_000_000, []
    while len(found) < count and (not found or clock() < end):
        began = clock()
        await once()
        found.append(clock() - began)
    return found


async def drive(clients: Clients, role: str, count: int, report: Callable[[str], None]) -> None:
    """Open, and obey until the end of stdin. Sessions end with the process."""
    driver, orders = Driver(clients), asyncio.Queue[str]()
    asyncio.get_running_loop().add_reader(0, lambda: orders.put_nowait(os.read(0, 64).decode()))
    await driver.open(role, count)
    gc.collect()
    gc.freeze()
    report("ready")
    while order := await orders.get():
        report(" ".join(map(str, await driver.obey(order))))
    os._exit(0)


def fork_members(make: Callable[[int], Clients], count: int, forks: int) -> None:
    """Members in processes of their own, which end with this one."""
    parent, (ready, tell) = os.getpid(), os.pipe()
    share = count // forks
    for number in range(forks):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)
            uvloop.run(_stay(make(share), range(number * share, (number + 1) * share), tell))
    os.close(tell)
    for _ in range(forks):
        if not os.read(ready, 1):
            raise SystemExit("a process of members has ended")
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


async def _stay(clients: Clients, numbers: Iterable[int], tell: int) -> None:
    await _each(clients.join(number) for number in numbers)
    gc.collect()
    gc.freeze()
    os.write(tell, b".")
    os.close(tell)
    await asyncio.Event().wait()


def main(peer: str, role: str, url: str, count: str, forks: str = "0") -> None:
    kind: type[Clients] = importlib.import_module(f"peers.{peer}").Clients
    if int(forks):
        fork_members(lambda share: kind(url, share), int(count), int(forks))
    else:
        clients = kind(url, int(count))
        uvloop.run(drive(clients, role, int(count), lambda text: print(text, flush=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
