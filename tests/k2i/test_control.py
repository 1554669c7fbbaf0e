"""Orders to real processes, and what the audit log says of them."""

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tabane.errors import Conflict, Denied
from tabane.k2i import control, orders
from tabane.k2i.control import Control
from tabane.k2i.kernel import Held, Surroundings, look
from tabane.k2i.orders import Action, Affinity, Gpid, Limit, Limits, Nice, Order, Outcome, Signal
from tabane.k2i.permission import Here, Seen
from tabane.k2i.procfs import parse_stat
from tabane.model import NodeName
from tabane.security.audit import AuditLog, Line, read_lines
from tabane.security.identity import Principal
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

from .conftest import Start
from .resting import Resting

HERE = Here(NodeName("tokyo/tokyo-1"), "incarnation")
ME = Principal("peer", os.geteuid(), os.getegid(), 4242)
STRANGER = Principal("peer", 54321, 54321, 4343)
ASK = Signal(0)
TERM = Signal(signal.SIGTERM)


def gpid(pid: int) -> Gpid:
    ticks = parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).starttime
    return Gpid("tokyo", "tokyo-1", "incarnation", pid, ticks)


def change_of(pid: int) -> int:
    """The next status of a child that stops or goes on."""
    return os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)[1]


def wait_for_zombie(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class World(NamedTuple):
    control: Control
    log: Path
    clock: VirtualClock

    async def one(self, target: Gpid, action: Action, who: Principal = ME, **how: Any) -> Outcome:
        (outcome,) = await self.control.obey(Order((target,), action, **how), who)
        return outcome

    def lines(self) -> list[Line]:
        return read_lines(self.log)

    def outcomes(self) -> list[str]:
        return [line.outcome for line in self.lines()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = VirtualClock()
    audit = AuditLog(tmp_path / "audit.log")
    async with Supervisor("test") as tasks:
        yield World(Control(HERE, audit, tasks, clock=clock), tmp_path / "audit.log", clock)
    audit.close()


async def test_a_signal_is_sent_and_written_down(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    assert await world.one(target, TERM, key="k") == Outcome(target)
    assert child.wait() == -signal.SIGTERM
    doing, done = world.lines()
    assert (doing.outcome, done.outcome) == ("doing", "done")
    assert doing == Line(
        world.clock.wall(),
        "peer",
        ME.uid,
        ME.pid,
        "signal 15",
        f"tokyo/tokyo-1:{child.pid}",
        process=doing.process,
        incarnation="incarnation",
        start_ticks=target.start_ticks,
        outcome="doing",
        key="k",
    )
    assert doing.process.startswith("python")


async def test_a_dry_run_checks_all_and_does_nothing(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    assert (await world.one(target, TERM, dry_run=True)).ok
    nice = await world.one(target, Nice(5), dry_run=True)
    assert (nice.before, nice.after) == (0, 5)
    core = await world.one(target, Limits({"core": Limit(0)}), dry_run=True)
    assert isinstance(core.after, dict)
    assert core.after["core"].soft == 0
    refused = await world.one(target, TERM, STRANGER, dry_run=True)
    assert refused.error == "denied"
    assert child.poll() is None
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 0
    assert world.outcomes() == ["would", "would", "would", "refused"]
    assert all(line.dry_run for line in world.lines())


async def test_nice_affinity_and_limits_say_what_was_and_is(world: World, start: Start) -> None:
    target = gpid(start().pid)
    cpu, *_ = cpus = sorted(os.sched_getaffinity(0))
    nice = await world.one(target, Nice(5))
    assert (nice.before, nice.after) == (0, 5)
    nicer = await world.one(target, Nice(3, relative=True))
    assert (nicer.before, nicer.after) == (5, 8)
    affinity = await world.one(target, Affinity((cpu,)))
    assert (affinity.before, affinity.after) == (cpus, [cpu])
    limits = await world.one(target, Limits({"nofile": Limit(20, 30)}))
    assert limits.after == {"nofile": Limit(20, 30)}
    again = await world.one(target, Limits({"nofile": Limit(10)}))
    assert (again.before, again.after) == (limits.after, {"nofile": Limit(10, 30)})
    assert world.outcomes() == ["doing", "done"] * 5


async def test_pause_and_resume(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    assert (await world.one(target, orders.Pause())).ok
    assert os.WIFSTOPPED(change_of(child.pid))
    assert (await world.one(target, orders.Resume())).ok
    assert os.WIFCONTINUED(change_of(child.pid))


async def test_what_was_changed_is_in_the_next_snapshot(tmp_path: Path, start: Start) -> None:
    target, resting = gpid(start().pid), Resting()
    audit = AuditLog(tmp_path / "audit.log")
    async with Supervisor("test") as tasks:
        control = Control(HERE, audit, tasks, on_change=resting.table.touch)
        for nice in (3, 5):
            resting.rest(target.pid)
            (outcome,) = await control.obey(Order((target,), Nice(nice)), ME)
            assert outcome.ok
            assert resting.see(target.pid).nice == nice
    audit.close()
    resting.table.close()


async def test_another_start_time_is_another_process(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    other = Gpid("tokyo", "tokyo-1", "incarnation", child.pid, target.start_ticks - 1)
    for action in (TERM, Nice(5), Affinity((0,)), orders.Pause(), Limits({"core": Limit(0)})):
        outcome = await world.one(other, action)
        assert outcome.error == "stale"
        assert "its pid was given to another process" in outcome.message
    assert child.poll() is None
    assert set(world.outcomes()) == {"refused"}


async def test_another_incarnation_and_another_node(world: World, start: Start) -> None:
    target = gpid(start().pid)
    then = Gpid("tokyo", "tokyo-1", "then", target.pid, target.start_ticks)
    assert (await world.one(then, TERM)).error == "stale"
    there = Gpid("tokyo", "tokyo-2", "incarnation", target.pid, target.start_ticks)
    assert (await world.one(there, TERM)).error == "not_found"
    assert (await world.one(target, ASK)).ok


async def test_one_that_is_gone_and_one_that_is_a_zombie(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    child.kill()
    wait_for_zombie(child.pid)
    zombie = await world.one(target, TERM)
    assert zombie.error == "not_found"
    assert f"only waits for its parent {os.getpid()}" in zombie.message
    child.wait()
    gone = await world.one(target, TERM)
    assert (gone.error, gone.message) == ("not_found", f"process {child.pid} is gone")


async def test_a_thread_is_no_target(world: World, start: Start) -> None:
    child = start(
        "import threading; threading.Thread(target=time.sleep, args=[1000], daemon=True).start()"
    )
    tid = max(int(path.name) for path in Path(f"/proc/{child.pid}/task").iterdir())
    outcome = await world.one(gpid(tid), TERM)
    assert outcome.error == "usage"
    assert outcome.message == f"{tid} is a thread of process {child.pid}: name that"


async def test_a_stranger_is_refused(world: World, start: Start) -> None:
    child = start()
    outcome = await world.one(gpid(child.pid), Signal(9), STRANGER)
    assert outcome.error == "denied"
    assert f"is another user's process (uid {os.getuid()})" in outcome.message
    assert child.poll() is None
    (line,) = world.lines()
    assert (line.uid, line.outcome, line.reason) == (54321, "refused", outcome.message)


async def test_an_order_that_may_not_be_given_is_written_down(world: World, start: Start) -> None:
    target = gpid(start().pid)
    with pytest.raises(Denied, match="force is for root"):
        await world.one(target, TERM, STRANGER, force=True)
    with pytest.raises(Denied, match="only over a unix socket"):
        await world.one(target, TERM, Principal("anybody"))
    assert [line.target for line in world.lines()] == ["1 targets"] * 2
    assert world.outcomes() == ["refused"] * 2


async def test_one_protected_is_touched_with_force_only(world: World) -> None:
    me = gpid(os.getpid())
    outcome = await world.one(me, Nice(0, relative=True))
    assert outcome.error == "denied"
    assert "is the k2i that was asked: only with `--force`" in outcome.message
    assert (await world.one(me, Nice(0, relative=True), force=True)).ok
    assert world.lines()[-1].force


async def test_many_targets_have_an_outcome_each_in_their_order(world: World, start: Start) -> None:
    first, gone, last = start(), start(), start()
    targets = [gpid(child.pid) for child in (first, gone, last)]
    gone.kill()
    gone.wait()
    me = gpid(os.getpid())
    order = Order((me, *targets), TERM)
    outcomes = await world.control.obey(order, ME)
    assert [outcome.target for outcome in outcomes] == [me, *targets]
    assert [outcome.error for outcome in outcomes] == ["denied", "", "not_found", ""]
    assert [first.wait(), last.wait()] == [-signal.SIGTERM] * 2
    assert world.lines()[-1].target == str(me), "itself last"


COUNT = """
import signal
def count(number, frame):
    os.write(1, b"x")
signal.signal(signal.SIGUSR1, count)
"""


async def test_a_repeated_key_sends_no_second_signal(world: World, start: Start) -> None:
    child = start(COUNT)
    target = gpid(child.pid)
    order = Order((target,), Signal(signal.SIGUSR1), key="once")
    answers = await asyncio.gather(*(world.control.obey(order, ME) for _ in range(20)))
    answers.append(await world.control.obey(order, ME))
    assert answers == [(Outcome(target),)] * 21
    assert world.outcomes() == ["doing", "done"]
    with pytest.raises(Conflict):
        await world.one(target, TERM, key="once")
    child.send_signal(signal.SIGKILL)
    assert child.stdout and child.stdout.read() == b"x"


async def test_a_dry_run_takes_no_key(world: World, start: Start) -> None:
    child = start()
    target = gpid(child.pid)
    assert (await world.one(target, TERM, key="k", dry_run=True)).ok
    assert (await world.one(target, TERM, key="k")).ok
    assert child.wait() == -signal.SIGTERM


class FullDisk:
    def add(self, line: Line) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def sync(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_full_disk_disarms_nobody(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    child = start()
    async with Supervisor("test") as tasks:
        control = Control(HERE, FullDisk(), tasks)
        target = gpid(child.pid)
        (outcome,) = await control.obey(Order((target,), TERM), ME)
    problem = "the audit log cannot be written: No space left on device"
    assert outcome == Outcome(target, message=problem)
    assert child.wait() == -signal.SIGTERM
    assert f"'signal 15', target='{target}'" in caplog.text
    assert caplog.text.count(problem) == 3


async def test_the_answer_waits_for_the_disk(start: Start) -> None:
    """The last thing that is done before the answer."""
    steps: list[str] = []

    class Steps:
        def add(self, line: Line) -> None:
            steps.append(line.outcome)

        def sync(self) -> None:
            steps.append("sync")

    async with Supervisor("test") as tasks:
        target = gpid(start().pid)
        await Control(HERE, Steps(), tasks).obey(Order((target,) * 2, ASK), ME)
    assert steps == ["doing", "done", "doing", "done", "sync"]


async def test_a_fault_of_the_machine_is_told_for_its_target_only(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = gpid(start().pid), gpid(start().pid)

    def fail(held: Held, surroundings: Surroundings) -> Seen:
        if held.pid == first.pid:
            raise OSError(errno.EMFILE, "Too many open files")
        return look(held, surroundings)

    monkeypatch.setattr(control, "look", fail)
    outcomes = await world.control.obey(Order((first, second), ASK), ME)
    assert [outcome.error for outcome in outcomes] == ["fault", ""]
    assert "Too many open files" in outcomes[0].message
    assert world.outcomes() == ["refused", "doing", "done"]
