"""The only place that starts tasks.

A `Supervisor` owns named tasks. Leaving its block cancels what still runs and waits for it, so no
task outlives its owner. A task that fails is reported to `on_failure` (default: the log) at once;
`run` restarts nothing by itself, `keep` does, with a back-off, for loops that must not end.

Source of the idea: trio's nurseries, without their "one failure cancels all", which a server that
must outlive a bad connection does not want.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 5.0

Failure = Callable[[str, BaseException], None]
P = ParamSpec("P")
T = TypeVar("T")


def log_failure(name: str, error: BaseException) -> None:
    """Report a failed task with its traceback in the log."""
    log.error("task %s failed: %s", name, error, exc_info=error)


def harmless(name: str, callback: Callable[P, object]) -> Callable[P, None]:
    """`callback`, but what it raises is logged: for telling others of what goes on all the same."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except Exception as error:
            log_failure(name, error)

    return call


class Supervisor:
    """Owns tasks: `async with Supervisor("agent") as tasks: tasks.start("wakes", loop())`."""

    def __init__(self, name: str, *, on_failure: Failure = log_failure) -> None:
        self.name = name
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def is_closing(self) -> bool:
        """Whether `aclose()` has begun, so that nothing is started any more."""
        return self._closing

    def start(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` as a task named `SUPERVISOR/NAME`. Refused once `aclose()` has begun."""
        if self._closing:
            work.close()
            raise RuntimeError(f"{self.name} is closing: it starts no new task ({name})")
        task = asyncio.create_task(work, name=f"{self.name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def begin(
        self, name: str, work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[object]]
    ) -> T:
        """What `work` gives. Cancelled meanwhile, it is let come to its end and then undone: for
        the start of a program, of which asyncio otherwise kills only the process that it knows of,
        and nothing that this has started itself."""
        task = self.start(name, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await undo(await task)
            raise

    def keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> asyncio.Task[Any]:
        """Run `loop` for ever: when it returns or fails it starts again, after a growing pause."""
        return self.start(name, self._keep(name, loop))

    async def _keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        pause_s = FIRST_RETRY_S
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                await loop()
            except Exception as error:
                self._on_failure(f"{self.name}/{name}", error)
            if clock() - began > LAST_RETRY_S:
                pause_s = FIRST_RETRY_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_RETRY_S)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task.get_name(), error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def aclose(self) -> None:
        """Cancel every task and wait until each has ended. Idempotent."""
        self._closing = True
        current = asyncio.current_task()
        while pending := [task for task in self._tasks if task is not current]:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class Later:
    """Named actions for later: of several with one name the earliest is done, once."""

    def __init__(self) -> None:
        self._due: dict[str, tuple[float, asyncio.Handle]] = {}
        """uvloop's handles do not tell when they are due, so the moment is kept beside each."""

    def call(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        """Do `action` in `delay_s`, unless `name` is due before that already."""
        loop = asyncio.get_running_loop()
        when = loop.time() + delay_s
        if (known := self._due.get(name)) is not None:
            if known[0] <= when:
                return
            known[1].cancel()
        self._due[name] = (when, loop.call_later(delay_s, self._do, name, action))

    def _do(self, name: str, action: Callable[[], None]) -> None:
        del self._due[name]
        action()

    def close(self) -> None:
        """Forget what is not done yet. Idempotent."""
        for _, timer in self._due.values():
            timer.cancel()
        self._due.clear()
