"""Threads of the blocking client: one runs an event loop, others run handlers.

Whoever wants something of the loop leaves a job there with `call_soon_threadsafe` and waits for a
future. A future that is waited for is in `_waited` *before* the caller looks whether the thread has
ended, and the thread says that it has ended *before* it looks into `_waited`: one of them always
sees the other, so nobody waits for a loop that is gone. No lock is held that an interrupt or a fork
could leave locked.

After a fork the child has the objects but not the threads, and copies of the descriptors. The
copies are put to /dev/null, so that the session ends when the parent ends it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import uvloop

from tabane.clock import SYSTEM
from tabane.errors import Closed, UsageError
from tabane.supervise import Supervisor, log_failure

T = TypeVar("T")
Job = Callable[[], object]

MAX_THREADS = 256
"""Of one pool: those that run and those that wait in a call. A thread takes some 50 KiB."""


class LoopThread:
    """A daemon thread that runs an event loop from `start` to `stop`.

    `on_stop` is awaited at its end. `descriptors` names those that a forked child must let go.
    """

    def __init__(
        self,
        name: str,
        on_stop: Callable[[], Coroutine[Any, Any, None]],
        descriptors: Callable[[], list[int]],
    ) -> None:
        self.name = name
        self.descriptors = descriptors
        self._on_stop = on_stop
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked = False
        self._stopping = asyncio.Event()
        self._tasks = Supervisor(f"calls of {name}")
        self._waited: set[Future[Any]] = set()
        self._ready = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"loop of {name}", daemon=True)

    def start(self) -> None:
        """Begin. All that must be ended is made by the thread itself, so `stop` is always right
        afterwards, also when this is interrupted half-way."""
        self._thread.start()
        self._ready.wait()

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child, which has no such thread."""
        return os.getpid() != self._pid

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `make` returns on the loop, and wait for its result.

        Raises what it raises, `Closed` when the loop is or gets stopped, `UsageError` on the loop's
        own thread. When the waiting is interrupted, the coroutine is cancelled.
        """
        return self._wait(lambda result: self._begin(make(), result))

    def run(self, work: Callable[[], T]) -> T:
        """As `call`, for a plain function."""
        return self._wait(lambda result: _settle(result, work()))

    def post(self, job: Job) -> None:
        """Have the loop do a job soon, from any thread. Does nothing once it has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(job)

    def stop(self) -> None:
        """Have `on_stop` done, and wait for the thread's end. Idempotent. In a child: nothing."""
        if not self.is_inherited:
            self._refuse_own_thread()
            self._stop_asked = True
            self.post(self._stopping.set)
            with suppress(RuntimeError):  # it was not started, or sees by itself that it must end
                self._thread.join()

    def refuse_other_process(self) -> None:
        """Raises `Closed` in a forked child."""
        if self.is_inherited:
            raise Closed(
                f"{self.name} belongs to the process {self._pid}, of which this one was forked: "
                f"connect again in the child"
            )

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise UsageError(
                f"this is the thread that runs {self.name} itself: it would wait for ever; "
                f"do it in another thread"
            )

    def _wait(self, begin: Callable[[Future[T]], None]) -> T:
        self.refuse_other_process()
        self._refuse_own_thread()
        result: Future[T] = Future()
        self._waited.add(result)
        try:
            if self._ended:
                raise Closed(f"{self.name} is closed")
            self.post(lambda: _try(begin, result))
            return result.result()
        finally:
            result.cancel()
            self._waited.discard(result)

    def _begin(self, work: Coroutine[Any, Any, T], result: Future[T]) -> None:
        if self._stopping.is_set():
            work.close()
            _fail(result, Closed(f"{self.name} is closed"))
            return
        task = self._tasks.start("call", self._perform(work, result))

        def give_up(result: Future[T]) -> None:
            if result.cancelled():
                self.post(task.cancel)

        result.add_done_callback(give_up)

    async def _perform(self, work: Coroutine[Any, Any, T], result: Future[T]) -> None:
        try:
            _settle(result, await work)
        except asyncio.CancelledError:
            _fail(result, Closed(f"{self.name} was closed meanwhile"))
            raise
        except Exception as error:
            _fail(result, error)

    def _run(self) -> None:
        _RUNNING.add(self)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop = runner.get_loop()
                if self._stop_asked:
                    self._stopping.set()
                self._ready.set()
                runner.run(self._main())
        finally:
            self._ended = True
            self._ready.set()
            _RUNNING.discard(self)
            for result in list(self._waited):
                _fail(result, Closed(f"{self.name} was closed meanwhile"))

    async def _main(self) -> None:
        await self._stopping.wait()
        await self._tasks.aclose()
        await self._on_stop()


def _try(begin: Callable[[Future[T]], None], result: Future[T]) -> None:
    """Begin what has not been given up meanwhile."""
    try:
        if not result.done():
            begin(result)
    except Exception as error:
        _fail(result, error)


def _settle(result: Future[T], value: T) -> None:
    with suppress(InvalidStateError):
        result.set_result(value)


def _fail(result: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):
        result.set_exception(error)


_RUNNING: set[LoopThread] = set()
_INHERITED: list[LoopThread] = []
"""Of the parent. A child keeps them, since an event loop that is freed while it runs complains."""


@atexit.register
def _stop_all() -> None:
    for thread in list(_RUNNING):
        with suppress(UsageError):
            thread.stop()


def _let_go() -> None:
    _INHERITED.extend(_RUNNING)
    _RUNNING.clear()
    inherited = [number for thread in _INHERITED for number in thread.descriptors()]
    if inherited:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in inherited:
            os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


os.register_at_fork(after_in_child=_let_go)


class Workers:
    """A pool of daemon threads that do jobs, begun in the order of `submit`.

    At most `limit` jobs run at a time. One that waits inside `waiting()` does not count, so that
    handlers which wait for messages do not keep from being handled what they wait for.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        """Threads without a job, those that were just started or notified among them."""
        self._waiting = 0
        self._closed = False

    def submit(self, job: Job) -> None:
        """Do a job in some thread. Jobs that raise are reported in the log."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._find_thread()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what a job waits for. Without effect in other threads."""
        if threading.current_thread() not in self._threads:
            yield
            return
        with self._changed:
            self._waiting += 1
            self._find_thread()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def close(self, timeout_s: float) -> None:
        """Drop what has not begun, and wait for what runs, but not for the caller's own job."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        deadline = SYSTEM.now() + timeout_s
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - SYSTEM.now()))

    def _find_thread(self) -> None:
        """Wake or start a thread for the last job, if there are not enough and one may run."""
        if not self._jobs:
            return
        if self._idle >= len(self._jobs):
            self._changed.notify()
        elif len(self._threads) - self._waiting < self._limit and len(self._threads) < MAX_THREADS:
            name = f"{self._name} {len(self._threads) + 1}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self._threads.add(thread)
            self._idle += 1

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException as error:
                log_failure(self._name, error)
            del job
            with self._changed:
                self._idle += 1

    def _next(self) -> Job | None:
        """None: the thread must end, as there are too many, or no more work."""
        with self._changed:
            while True:
                too_many = len(self._threads) - self._waiting > self._limit
                if self._closed or too_many:
                    self._idle -= 1
                    self._threads.discard(threading.current_thread())
                    return None
                if self._jobs:
                    self._idle -= 1
                    return self._jobs.popleft()
                self._changed.wait()


class Lane:
    """Jobs that are done one after the other, in some threads of a pool."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._active = False

    def submit(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._active:
                return
            self._active = True
        self._workers.submit(self._do)

    def _do(self) -> None:
        try:
            self._jobs.popleft()()
        finally:
            with self._lock:
                self._active = bool(self._jobs)
            if self._active:
                self._workers.submit(self._do)
