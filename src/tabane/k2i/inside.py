"""The processes within instances that have a kernel of their own, as their drivers tell them.

To ask costs a driver up to a tenth of a second, and may hang: each instance is asked by a task of
its own, with a deadline, and who reads the process table gets what was answered last. All of them
together may take `SHARE` of the time, so the more there are the less often each is asked. What was
not confirmed for `KEPT_S` is forgotten.

Their pids are not the node's: a row with `inside` set must never be looked up in /proc, and no
signal goes to its number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from tabane.clock import Clock, sleep_until
from tabane.errors import TabaneError
from tabane.k2i.table import Process
from tabane.model import GuestProcess, Instance, InstanceId
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
"""One that is ready has a session to answer first."""
LEAST_PAUSE_S = 2.0
DEADLINE_S = 2.0
SHARE = 0.05
"""Of one CPU, if asking was nothing but work."""
KEPT_S = 30.0
MAX_ROWS = 4096
"""Of one instance: what is in there decides how many it has."""
MAX_TEXT = 1 << 12
"""Characters of a command line."""

Ask = Callable[[], Awaitable[Sequence[GuestProcess]]]


@dataclass
class _Looked:
    """What is known of the inside of one instance."""

    instance: Instance
    ask: Ask
    rows: Sequence[Process] = ()
    at: float | None = None
    took_s: float = 0.0
    error: str = ""
    task: asyncio.Task[None] | None = None


class Insides:
    """See the module's text. `node` is `DATACENTER/NODE`."""

    def __init__(
        self, node: str, incarnation: str, *, clock: Clock, tasks: Supervisor, memory_kib: int = 0
    ) -> None:
        self._dc, _, self._node = node.rpartition("/")
        self._incarnation = incarnation
        self._clock = clock
        self._tasks = tasks
        self._memory_kib = memory_kib
        self._looked: dict[InstanceId, _Looked] = {}

    def want(self, targets: Iterable[tuple[Instance, Ask]]) -> None:
        """Look into just these. Of one that is not there any more nothing is known at once."""
        wanted = {instance.id: (instance, ask) for instance, ask in targets}
        for key in self._looked.keys() - wanted.keys():
            task = self._looked.pop(key).task
            if task is not None:
                task.cancel()
        for key in [key for key in wanted if key not in self._looked]:
            looked = self._looked[key] = _Looked(*wanted[key])
            looked.task = self._tasks.start(f"look inside {key}", self._run(looked))

    def processes(self) -> list[Process]:
        """What is known now; for any thread."""
        return [row for looked in list(self._looked.values()) for row in looked.rows]

    def age_s(self) -> float:
        """Of the oldest of what is known."""
        now = self._clock.now()
        return max((now - x.at for x in list(self._looked.values()) if x.at is not None), default=0)

    def errors(self) -> dict[InstanceId, str]:
        """Why some could not be looked into the last time."""
        return {key: looked.error for key, looked in self._looked.items() if looked.error}

    async def _run(self, looked: _Looked) -> None:
        await sleep_until(self._clock, self._clock.now() + FIRST_PAUSE_S)
        while True:
            began = self._clock.now()
            await self._look(looked)
            looked.took_s = self._clock.now() - began
            if looked.at is not None and self._clock.now() - looked.at > KEPT_S:
                looked.rows, looked.at = (), None
            await sleep_until(self._clock, self._clock.now() + self._pause_s())

    def _pause_s(self) -> float:
        together_s = sum(looked.took_s for looked in self._looked.values())
        return max(LEAST_PAUSE_S, together_s / SHARE)

    async def _look(self, looked: _Looked) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                rows = await looked.ask()
        except TimeoutError:
            looked.error = f"no answer within {DEADLINE_S:g} s"
        except (TabaneError, OSError) as error:
            looked.error = str(error)
        except Exception as error:
            looked.error = f"its driver is broken: {error}"
            log.error("looking inside %s failed", looked.instance.id, exc_info=error)
        else:
            looked.rows = [self._describe(row, looked.instance) for row in rows[:MAX_ROWS]]
            looked.at, looked.error = self._clock.now(), ""

    def _describe(self, row: GuestProcess, instance: Instance) -> Process:
        used = 100 * row.cpu_s / row.elapsed_s if row.elapsed_s else 0.0
        return Process(
            dc=self._dc,
            node=self._node,
            incarnation=self._incarnation,
            namespace=instance.app.partition("/")[0],
            app=instance.app,
            instance=instance.id,
            container=row.container,
            isolation=instance.isolation,
            inside=row.inside,
            pid=row.pid,
            ppid=row.ppid,
            pgrp=0,
            session=0,
            tpgid=-1,
            uid=row.uid,
            user=row.user or str(row.uid),
            gid=row.gid,
            group=row.group or str(row.gid),
            ruid=row.uid,
            start_ticks=row.start_ticks,
            started_at=round(self._clock.wall() - row.elapsed_s, 2),
            name=row.name,
            command=row.command[:MAX_TEXT] or f"[{row.name}]",
            tty=row.tty,
            state=row.state,
            stat=row.state,
            flags=0,
            processor=0,
            nice=row.nice,
            priority=20 + row.nice,
            policy=0,
            rt_priority=0,
            threads=row.threads,
            cpu_percent=round(used, 1),
            recent_cpu_percent=None,
            cpu_s=row.cpu_s,
            memory_percent=self._percent(row.rss_kib),
            vsz_kib=row.vsz_kib,
            rss_kib=row.rss_kib,
            minor_faults=0,
            major_faults=0,
            elapsed_s=row.elapsed_s,
        )

    def _percent(self, rss_kib: int) -> float:
        return rss_kib * 1000 // self._memory_kib / 10 if self._memory_kib else 0.0
