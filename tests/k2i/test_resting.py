"""Processes that rest: not read again, and still shown as they are."""

import ctypes
import os
import pty
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tabane.k2i import ProcessTable
from tabane.k2i.procfs import Procfs, parse_stat, stat_of
from tabane.k2i.table import MOVED_S

from .conftest import Start
from .resting import Resting, wait_for_state
from .test_table import FakeProc

PTRACE_ATTACH, PTRACE_DETACH = 16, 17


@pytest.fixture
def resting() -> Iterator[Resting]:
    resting = Resting()
    yield resting
    resting.table.close()


def test_one_that_sleeps_is_not_read(resting: Resting, start: Start) -> None:
    pid = start().pid
    assert resting.rest(pid).state == resting.see(pid).state == "S"
    assert pid not in resting.procfs.read_stat
    resting.table.records()
    assert pid in resting.procfs.read_stat
    resting.clock.advance(MOVED_S)
    resting.see(pid)
    assert pid in resting.procfs.read_stat


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
    wait_for_state(pid, "S")


def trace(pid: int) -> None:
    assert ctypes.CDLL(None).ptrace(PTRACE_ATTACH, pid, None, None) == 0
    os.waitpid(pid, os.WUNTRACED)


def let_go(pid: int) -> None:
    assert ctypes.CDLL(None).ptrace(PTRACE_DETACH, pid, None, None) == 0
    wait_for_state(pid, "S")


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("sleep", ["time.sleep(1000)", "signal.pause()", "os.read(0, 1)"])
@pytest.mark.parametrize(
    "changes",
    [
        [(stop, "T"), (go_on, "S"), (stop, "T"), (end, "Z")],
        [(trace, "t"), (let_go, "S"), (trace, "t"), (end, "Z")],
        [(end, "Z")],
    ],
    ids=["stopped", "traced", "ended"],
)
def test_every_other_state_is_in_the_next_snapshot(
    resting: Resting, start: Start, sleep: str, changes: list[tuple[Callable[[int], None], str]]
) -> None:
    pid = start(f"import signal; print(flush=True); {sleep}").pid
    for change, state in changes:
        if stat_of(pid).state == "S":  # type: ignore[union-attr]
            assert resting.rest(pid).state == "S"
        change(pid)
        assert resting.see(pid).state == state
        assert resting.see(pid).state == state


def test_one_that_runs_is_in_the_next_snapshot(resting: Resting, start: Start) -> None:
    child = start("print(flush=True); os.read(0, 1)\nwhile True: pass")
    resting.rest(child.pid)
    assert child.stdin
    child.stdin.write(b"x")
    child.stdin.flush()
    before = Path(f"/proc/{child.pid}/schedstat").read_bytes()
    while Path(f"/proc/{child.pid}/schedstat").read_bytes() == before:
        os.sched_yield()
    wait_for_state(child.pid, "R")
    assert resting.see(child.pid).state == "R"


@pytest.fixture
def family(start: Start) -> Iterator[tuple[int, int]]:
    """A parent and its child."""
    parent = start("if os.fork() == 0:\n    time.sleep(1000)").pid
    child = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
    wait_for_state(child, "S")
    yield parent, child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("end", [end, reap], ids=["a zombie", "gone"])
def test_a_child_whose_parent_ends_has_another_at_once(
    resting: Resting, family: tuple[int, int], end: Callable[[int], None]
) -> None:
    parent, child = family
    resting.rest(parent)
    assert resting.rest(child).ppid == parent
    end(parent)
    heir = parse_stat(Path(f"/proc/{child}/stat").read_bytes()).ppid
    assert heir != parent
    assert resting.see(child).ppid == heir


def test_what_others_set_is_seen_when_it_is_told_or_after_a_while(
    resting: Resting, start: Start
) -> None:
    pid = start().pid
    assert resting.rest(pid).nice == 0
    os.setpriority(os.PRIO_PROCESS, pid, 3)
    resting.table.touch(pid)
    assert resting.see(pid).nice == 3
    resting.rest(pid)
    os.setpriority(os.PRIO_PROCESS, pid, 5)
    resting.clock.advance(MOVED_S - 0.1)
    assert resting.see(pid).nice == 3
    resting.clock.advance(0.1)
    assert resting.see(pid).nice == 5


AT_TERMINAL = """
import signal
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    time.sleep(1000)
while os.getpgid(child) != child: time.sleep(0.001)
os.write(1, b"\\n")
os.read(0, 1)
os.tcsetpgrp(terminal, child)
"""


def test_who_is_in_the_foreground_is_of_the_moment(resting: Resting, start: Start) -> None:
    ours, theirs = pty.openpty()
    leader = start(AT_TERMINAL, os.ttyname(theirs))
    pid = int(Path(f"/proc/{leader.pid}/task/{leader.pid}/children").read_text())
    wait_for_state(pid, "S")
    for _ in range(2):
        before = resting.see(pid)
        assert (before.tpgid, before.stat) == (leader.pid, "S")
    assert leader.stdin and leader.stdout
    leader.stdin.write(b"x")
    leader.stdin.flush()
    assert leader.stdout.readline() == b"\n"
    after = resting.see(pid)
    assert (after.tpgid, after.stat) == (pid, "S+")
    os.close(ours)
    os.close(theirs)


def changed(stat: bytes, **fields: int) -> bytes:
    """Of the fake process, with these fields."""
    words = stat.split()
    for name, value in fields.items():
        words[parse_stat(stat)._fields.index(name)] = b"%d" % value
    return b" ".join(words)


@pytest.mark.parametrize(
    ("files", "fields", "rests"),
    [
        ({}, {}, True),
        ({"cgroup": b"6:freezer:/\n4:cpu:/tabane/c1\n0::/x\n"}, {}, True),
        ({"cgroup": b"6:freezer:/docker/x\n0::/\n"}, {}, False),
        ({"cgroup": b"6:cpu,freezer,pids:/x\n"}, {}, False),
        ({"schedstat": b"0 0 0\n"}, {}, False),
        ({"schedstat": b"0 300 1\n"}, {}, False),
        ({}, {"num_threads": 2}, False),
        ({}, {"tty_nr": 1025}, False),
        ({}, {"ppid": 6}, False),
        ({}, {"starttime": 99_600}, False),
    ],
)
def test_who_rests(
    tmp_path: Path, files: dict[str, bytes], fields: dict[str, int], rests: bool
) -> None:
    fake = FakeProc(tmp_path)
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    stat = changed(fake.files["stat"], **{"ppid": 0} | fields)
    fake.write(**{"schedstat": b"500 1 3\n", "stat": stat} | files)
    table = ProcessTable(procfs=Procfs(fake.root), clock=fake.clock)
    (before,) = table.processes()
    (before,) = table.processes()  # when none of its files has just been opened
    fake.write(stat=changed(stat, rss=7))
    (after,) = table.processes()
    assert (before.rss_kib, after.rss_kib) == (0, 0 if rests else 28)
    table.close()


@pytest.mark.parametrize("state", "RDTtZP")
def test_only_sleep_is_rest(tmp_path: Path, state: str) -> None:
    fake = FakeProc(tmp_path)
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    asleep = changed(fake.files["stat"], ppid=0)
    fake.write(schedstat=b"500 1 3\n", stat=asleep.replace(b" S ", b" %b " % state.encode(), 1))
    table = ProcessTable(procfs=Procfs(fake.root), clock=fake.clock)
    for _ in range(2):
        assert [process.state for process in table.processes()] == [state]
    fake.write(stat=asleep)
    assert [process.state for process in table.processes()] == ["S"]
    table.close()


def test_one_whose_files_cannot_be_kept_open_may_be_another(tmp_path: Path) -> None:
    fake = FakeProc(tmp_path)
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    fake.write(schedstat=b"500 1 3\n", stat=changed(fake.files["stat"], ppid=0))
    table = ProcessTable(procfs=Procfs(fake.root, keep=0), clock=fake.clock)
    for ticks in (100, 200, 300):
        fake.write(stat=changed(fake.files["stat"], ppid=0, starttime=ticks))
        assert [process.start_ticks for process in table.processes()] == [ticks]
    table.close()


def test_a_child_whose_parent_s_pid_was_given_to_another_has_another_parent(
    tmp_path: Path,
) -> None:
    fake = FakeProc(tmp_path)
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    parent = changed(fake.files["stat"], ppid=0)
    fake.write(schedstat=b"500 1 3\n", stat=parent)
    shutil.copytree(fake.root / "7", fake.root / "8")
    (fake.root / "8" / "stat").write_bytes(changed(parent, pid=8, ppid=7))
    table = ProcessTable(procfs=Procfs(fake.root), clock=fake.clock)
    for _ in range(2):
        assert [process.ppid for process in table.processes()] == [0, 7]
    (fake.root / "8" / "stat").write_bytes(changed(parent, pid=8, ppid=1))
    fake.write(schedstat=b"1000 1 3\n", stat=changed(parent, starttime=200))
    assert [process.ppid for process in table.processes()] == [0, 1]
    table.close()
