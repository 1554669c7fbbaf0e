from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest
import uvloop

from tabane import supervise
from tabane.supervise import Later, Supervisor, harmless

# libuv keeps its signal pipe as long as the process lives: made here, it is no test's leak.
uvloop.run(asyncio.sleep(0))


class Failures(list[tuple[str, BaseException]]):
    def __call__(self, name: str, error: BaseException) -> None:
        self.append((name, error))


async def for_ever() -> None:
    await asyncio.Event().wait()


async def fail(text: str) -> None:
    raise ValueError(text)


def test_what_is_harmless_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []
    harmless("telling", told.append)(1)
    harmless("telling", lambda: 1 / 0)()
    assert told == [1]
    assert "task telling failed: division by zero" in caplog.text


async def test_a_task_has_its_owners_name() -> None:
    async with Supervisor("agent") as tasks:
        task = tasks.start("wakes", for_ever())
        assert task.get_name() == "agent/wakes"
        assert len(tasks) == 1


async def test_leaving_the_block_ends_every_task() -> None:
    async with Supervisor("agent") as tasks:
        started = [tasks.start(str(number), for_ever()) for number in range(3)]
        await asyncio.sleep(0)
    assert all(task.cancelled() for task in started)
    assert len(tasks) == 0


async def test_an_error_in_the_block_passes_and_the_tasks_end() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Supervisor("agent") as tasks:
            task = tasks.start("wakes", for_ever())
            raise KeyError("mine")
    assert task.cancelled()


async def test_closing_waits_for_what_a_task_does_last() -> None:
    steps: list[str] = []

    async def careful() -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    async with Supervisor("agent") as tasks:
        tasks.start("careful", careful())
        await asyncio.sleep(0)
    assert steps == ["cleaned up"]


async def test_a_task_started_while_another_ends_is_refused() -> None:
    refused: list[str] = []

    async def stubborn() -> None:
        try:
            await for_ever()
        finally:
            with pytest.raises(RuntimeError) as error:
                tasks.start("late", for_ever())
            refused.append(str(error.value))

    async with Supervisor("agent") as tasks:
        tasks.start("stubborn", stubborn())
        await asyncio.sleep(0)
    assert refused == ["agent is closing: it starts no new task (late)"]


async def test_closing_twice_and_from_inside_is_fine() -> None:
    tasks = Supervisor("agent")
    other = tasks.start("other", for_ever())
    closer = tasks.start("closer", tasks.aclose())
    await closer
    assert other.cancelled()
    await tasks.aclose()


async def test_a_failure_is_reported_at_once_and_spares_the_others() -> None:
    failures = Failures()
    async with Supervisor("agent", on_failure=failures) as tasks:
        other = tasks.start("other", for_ever())
        failed = tasks.start("wakes", fail("broken"))
        await asyncio.wait([failed])
        await asyncio.sleep(0)
        assert [(name, str(error)) for name, error in failures] == [("agent/wakes", "broken")]
        assert not other.done()


async def test_a_failure_is_logged_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    async with Supervisor("agent") as tasks:
        await asyncio.wait([tasks.start("wakes", fail("broken"))])
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "task agent/wakes failed: broken"
    assert record.exc_info is not None


async def test_an_ended_task_is_forgotten() -> None:
    async with Supervisor("agent") as tasks:
        await tasks.start("short", asyncio.sleep(0))
        await asyncio.sleep(0)
        assert len(tasks) == 0


async def test_a_kept_loop_starts_again_after_each_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_RETRY_S", 0.0)
    failures = Failures()
    rounds: list[int] = []
    enough = asyncio.Event()

    async def loop() -> None:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            raise ValueError("once")
        if len(rounds) == 4:
            enough.set()

    async with Supervisor("agent", on_failure=failures) as tasks:
        tasks.keep("loop", loop)
        await enough.wait()
    assert [(name, str(error)) for name, error in failures] == [("agent/loop", "once")]


async def test_the_pause_of_a_kept_loop_grows_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    enough = asyncio.Event()

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 9:
            enough.set()
            await for_ever()

    async def loop() -> None:
        pass

    monkeypatch.setattr(supervise.asyncio, "sleep", sleep)
    async with Supervisor("agent") as tasks:
        tasks.keep("loop", loop)
        await enough.wait()
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize(("first_s", "second_s", "done"), [(0, 0, 1), (0, 99, 1), (99, 0, 2)])
def test_of_two_calls_with_one_name_the_earlier_is_done(
    make_loop: Callable[[], asyncio.AbstractEventLoop], first_s: float, second_s: float, done: int
) -> None:
    async def scenario() -> list[int]:
        later, called = Later(), asyncio.Event()
        calls: list[int] = []

        def call(number: int) -> None:
            calls.append(number)
            called.set()

        later.call("x", first_s, lambda: call(1))
        later.call("x", second_s, lambda: call(2))
        await called.wait()
        later.call("x", 99, lambda: call(3))
        later.close()
        return calls

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(scenario()) == [done]


async def test_what_has_begun_is_let_begin_and_then_undone() -> None:
    undone: list[int] = []
    go = asyncio.Event()

    async def begin() -> int:
        await go.wait()
        return 7

    async def undo(result: int) -> None:
        undone.append(result)

    async with Supervisor("test") as tasks:
        assert await tasks.begin("at once", asyncio.sleep(0, 5), undo) == 5
        beginning = tasks.start("slow", tasks.begin("it", begin(), undo))
        await asyncio.sleep(0)
        beginning.cancel()
        await asyncio.sleep(0)
        assert not beginning.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await beginning
    assert undone == [7]
