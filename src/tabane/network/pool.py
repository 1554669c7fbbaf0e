"""Links made ahead, so that a wake finds its network ready.

A claim takes a prepared link and writes the app's id maps: two small writes, no subprocess, no
await. Making and removing are slow and happen beside it:

- *Makers* (`MAKERS` tasks) first serve claims that found nothing prepared, in their order. They
  refill only after `CALM_S` without a claim, one at a time, so that a burst of wakes does not
  compete with the making of links for wakes that may never come.
- The *remover* takes what was released in batches. A slot is given back only after its wire is
  gone, and the one released first is reused first.

Nothing needs to be remembered: parked processes and wires can be found again by their names, so
`recover` removes whatever no instance uses.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple

from tabane.errors import EngineError, TabaneError, Unavailable
from tabane.network import links
from tabane.network.addresses import Slots
from tabane.runtimes.api import Link, Spawner
from tabane.runtimes.process import start_ticks
from tabane.supervise import Supervisor

T = TypeVar("T")
Args = TypeVarTuple("Args")

log = logging.getLogger(__name__)

MAKERS = 2
CALM_S = 0.05
RETRY_S = 1.0
"""Pause before refilling again after a link could not be made."""


class _Prepared(NamedTuple):
    link: Link
    process: int
    """An open /proc/PID directory of the parked process."""


class _Remains(NamedTuple):
    """What is to be removed: the wire of a slot, a parked process (pid, start ticks), or both."""

    slot: int | None = None
    parked: tuple[int, int] | None = None


class _Kind:
    """The links of one kind: with egress, or without."""

    def __init__(self) -> None:
        self.ready: deque[_Prepared] = deque()
        self.waiting: deque[asyncio.Future[_Prepared]] = deque()
        self.making = 0

    async def take(self) -> _Prepared:
        """Wait until one is put. Cancelling loses none."""
        future: asyncio.Future[_Prepared] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future in self.waiting:
                self.waiting.remove(future)
            elif not future.cancelled() and future.exception() is None:
                self.put(future.result())
            raise

    def put(self, prepared: _Prepared) -> None:
        if waiting := self._next_waiting():
            waiting.set_result(prepared)
        else:
            self.ready.append(prepared)

    def fail(self, error: Exception) -> bool:
        """Tell the claim that waits the longest; False when none waits."""
        waiting = self._next_waiting()
        if waiting is not None:
            waiting.set_exception(error)
        return waiting is not None

    def _next_waiting(self) -> asyncio.Future[_Prepared] | None:
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                return future
        return None


class NetworkPool:
    """The links of one node. Runs in the node's network namespace, after `prepare_node`.

    `name` tells this node's parked processes from others' on the same machine, and `directory` is
    for the file they run; `size` links of each kind are kept prepared. Call `recover` first, then
    `claim` and `release`; `aclose` leaves the links that are in use alone, `destroy` does not.
    """

    def __init__(
        self, spawner: Spawner, name: str, directory: Path | None = None, *, size: int = 8
    ) -> None:
        self._spawner = spawner
        self._name = name
        self._size = size
        self._directory = directory
        self._slots = Slots()
        self._kinds = {True: _Kind(), False: _Kind()}
        self._in_use: dict[int, Link] = {}
        self._remains: deque[_Remains] = deque()
        self._refill_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._work = asyncio.Event()
        self._removals = asyncio.Event()
        self._tasks = Supervisor(f"network {name}")
        self._makers: list[asyncio.Task[None]] = []
        self._remover: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(MAKERS + 1, thread_name_prefix="network")

    async def recover(self, in_use: Iterable[Link] = ()) -> None:
        """Begin: keep the links that are `in_use`, remove all others of this pool, and refill."""
        if self._directory is not None:
            links.name_sleep(self._directory)
        self._in_use = {link.slot: link for link in in_use}
        for slot in self._in_use:
            self._slots.reserve(slot)
        for remains in await self._in_thread(self._find_remains):
            if remains.slot is not None:
                self._slots.reserve(remains.slot)
            self._remove_later(remains)
        self._remover = self._tasks.start("remover", self._remove_loop())
        self._makers = [self._tasks.start(f"maker {n}", self._make_loop()) for n in range(MAKERS)]

    async def claim(self, id_base: int, *, egress: bool) -> Link:
        """A link whose user namespace has the ids `id_base` to `id_base + 65535`.

        Takes a prepared one, else waits for one to be made: raises `EngineError` when that fails
        and `Busy` when there is no address left. Cancelling loses nothing.
        """
        while True:
            prepared = await self._take(self._kinds[egress])
            try:
                links.write_id_maps(prepared.process, id_base)
                return prepared.link
            except (FileNotFoundError, ProcessLookupError):
                await self.release(prepared.link)
            finally:
                os.close(prepared.process)

    async def release(self, link: Link) -> None:
        """Give a link back that no gateway may send to any more. It is removed soon after; only
        then its address can be used again. Idempotent."""
        if self._in_use.pop(link.slot, None) is not None:
            self._remove_later(_remains_of(link))

    def prepared(self, *, egress: bool) -> int:
        """How many links are ready to be claimed."""
        return len(self._kinds[egress].ready)

    async def aclose(self) -> None:
        """Stop, and remove the links that nobody uses. Idempotent."""
        self._closing = True
        self._work.set()
        await asyncio.gather(*self._makers)
        for kind in self._kinds.values():
            while kind.fail(Unavailable(f"node {self._name} is closing: it starts nothing new")):
                pass
            while kind.ready:
                prepared = kind.ready.popleft()
                os.close(prepared.process)
                self._remove_later(_remains_of(prepared.link))
        self._removals.set()
        if self._remover is not None:
            await self._remover
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.aclose()
        self._threads.shutdown()

    async def destroy(self) -> None:
        """Remove every link, used or not, and stop."""
        for link in list(self._in_use.values()):
            await self.release(link)
        await self.aclose()

    async def _take(self, kind: _Kind) -> _Prepared:
        if self._closing:
            raise Unavailable(f"node {self._name} is closing: it starts nothing new")
        self._refill_after(CALM_S)
        if kind.ready:
            prepared = kind.ready.popleft()
        else:
            self._work.set()
            prepared = await kind.take()
        self._in_use[prepared.link.slot] = prepared.link
        return prepared

    def _refill_after(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._refill_at = loop.time() + pause_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._refill_at, self._work.set)

    async def _make_loop(self) -> None:
        while not self._closing:
            egress = self._next_kind()
            if egress is None:
                self._work.clear()
                await self._work.wait()
            else:
                await self._make_for(egress)

    def _next_kind(self) -> bool | None:
        """The kind (egress or not) that a free maker should make now, if any."""
        for egress, kind in self._kinds.items():
            if len(kind.waiting) > kind.making:
                return egress
        busy = any(kind.making for kind in self._kinds.values())
        if busy or asyncio.get_running_loop().time() < self._refill_at:
            return None
        wanted = (egress for egress, kind in self._kinds.items() if len(kind.ready) < self._size)
        return next(wanted, None)

    async def _make_for(self, egress: bool) -> None:
        kind = self._kinds[egress]
        kind.making += 1
        try:
            kind.put(await self._make(egress))
        except TabaneError as error:
            if not kind.fail(error):
                log.warning("no link prepared, trying again in %g s: %s", RETRY_S, error)
                self._refill_after(RETRY_S)
        finally:
            kind.making -= 1

    async def _make(self, egress: bool) -> _Prepared:
        slot = self._slots.take(egress)
        parked = None
        try:
            pid = await self._park(slot)
            parked = (pid, start_ticks(pid))
            link = await self._in_thread(links.connect, slot, *parked)
            return _Prepared(link, os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY))
        except BaseException as error:
            self._remove_later(_Remains(slot, parked))
            if isinstance(error, OSError):
                raise EngineError(f"no link for slot {slot}: {error}") from error
            raise

    async def _park(self, slot: int) -> int:
        command = links.park_command(self._name, slot, self._directory)
        await self._spawner.spawn(command)
        finished = await self._spawner.finished(command.key)
        await self._spawner.forget(command.key)
        if not finished.output.strip().isdecimal():
            problem = f"no namespaces for slot {slot}: unshare {finished.status.describe()}"
            raise EngineError(f"{problem}: {finished.output.strip()}", argv=command.argv)
        return int(finished.output)

    def _find_remains(self) -> list[_Remains]:
        used = {(link.parked_pid, link.parked_start_ticks) for link in self._in_use.values()}
        wires = links.find_links() - self._in_use.keys()
        parked = links.find_parked(self._name) - used
        return [_Remains(slot=slot) for slot in wires] + [_Remains(parked=who) for who in parked]

    def _remove_later(self, remains: _Remains) -> None:
        self._remains.append(remains)
        self._removals.set()

    async def _remove_loop(self) -> None:
        while self._remains or not self._closing:
            await self._removals.wait()
            self._removals.clear()
            batch, self._remains = self._remains, deque()
            slots = [remains.slot for remains in batch if remains.slot is not None]
            parked = [remains.parked for remains in batch if remains.parked is not None]
            try:
                await self._in_thread(links.remove, slots, parked)
            except TabaneError as error:
                log.error("addresses %s stay out of use until the next start: %s", slots, error)
            else:
                for slot in slots:
                    self._slots.give_back(slot)

    async def _in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _remains_of(link: Link) -> _Remains:
    return _Remains(link.slot, (link.parked_pid, link.parked_start_ticks))
