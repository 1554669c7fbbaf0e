"""A command inside a sandbox.

As in a container (see `tabane.runtimes.inside`), the engine hands it its streams, or a terminal of
the node's that it makes, and leaves a process behind that ends as the command does; the spawner
tells how. But the node's kernel has no process for the command: it is signalled by its number
inside, and what there is below it is found in the table of the sandbox's kernel.

No init stands above it. gVisor looks for a new parent among those above who ends; where the last of
these is a subreaper that ends at the same moment, as below an engine's command it can be, it finds
none, takes this for the end of the container's first process, and kills all of the container.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

from tabane.errors import TabaneError
from tabane.model import GuestProcess
from tabane.runtimes.api import Spawner
from tabane.runtimes.ending import HANGUP_S
from tabane.runtimes.inside import Files, Spawned, read_pid

END_TIMEOUT_S = HANGUP_S + 4.0
POLL_S = 0.02
"""The sandbox's kernel is asked by starting a process, which takes about as long."""


class Sandbox:
    """What the end of a command needs: the sandbox's table, and its way to signal."""

    def __init__(
        self,
        processes: Callable[[], Awaitable[Sequence[GuestProcess]]],
        kill: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self.processes = processes
        self._kill = kill

    async def signal(self, pid: int, number: int) -> None:
        """Nothing when it has ended."""
        with suppress(TabaneError):
            await self._kill(pid, number)

    async def end(self, top: int) -> None:
        """End a process and all below it: hang up, wait a little, kill. A sandbox that does not
        answer, as one that is frozen, is told to kill the first once it does."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._end(top)
        except (TimeoutError, TabaneError):
            await self.signal(top, signal.SIGKILL)

    async def _end(self, top: int) -> None:
        known = set(below(await self.processes(), {top}))
        await self._tell(known, (signal.SIGHUP, signal.SIGCONT))
        with suppress(TimeoutError):
            async with asyncio.timeout(HANGUP_S):
                while left := below(await self.processes(), known):
                    known |= set(left)
                    await asyncio.sleep(POLL_S)
        while left := below(await self.processes(), known):
            known |= set(left)
            await self._tell(left, (signal.SIGKILL,))

    async def _tell(self, pids: Collection[int], numbers: tuple[int, ...]) -> None:
        for pid in sorted(pids):
            for number in numbers:
                await self.signal(pid, number)


def below(processes: Sequence[GuestProcess], tops: set[int]) -> list[int]:
    """Those of `tops` that are there, and all that came from one of them, the later the deeper."""
    found = {process.pid for process in processes if process.pid in tops}
    grown = True
    while grown:
        more = {process.pid for process in processes if process.ppid in found} - found
        found |= more
        grown = bool(more)
    return sorted(found)


class Inside(Spawned):
    """A command that runs inside; `pid` is that of what the engine left behind on the node."""

    def __init__(self, key: str, files: Files, spawner: Spawner, *, sandbox: Sandbox) -> None:
        super().__init__(key, files, spawner)
        self._sandbox = sandbox
        self._inside = read_pid(files.inside) or 0

    async def signal(self, number: int) -> None:
        if self._inside:
            await self._sandbox.signal(self._inside, number)

    async def end(self, hang_up: Callable[[], None] = lambda: None) -> None:
        if self._inside:
            await self._sandbox.end(self._inside)
        hang_up()
