"""What is done to a process, seen in the process itself."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tabane.errors import Denied, NotFound, Unsupported, UsageError
from tabane.k2i import kernel
from tabane.k2i.kernel import Alone, describe_kernels, hold, look, parse_cpus
from tabane.k2i.orders import RESOURCES
from tabane.k2i.procfs import parse_stat

from .conftest import Start

THREADS = """
import threading
for _ in range(3):
    threading.Thread(target=time.sleep, args=[1000], daemon=True).start()
"""


def tasks(pid: int) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_the_kernel_drops_is_refused(number: signal.Signals) -> None:
    with pytest.raises(Unsupported, match=rf"'init'\) is the first .* no {number.name} to it"):
        kernel.check_delivered(1, "init", number)
    kernel.check_delivered(2, "init", number)


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGCONT, signal.SIGRTMAX])
def test_what_the_first_process_may_handle_is_tried(number: int) -> None:
    kernel.check_delivered(1, "init", number)


def test_it_looks_at_the_process(start: Start) -> None:
    child = start("os.nice(3)")
    with hold(child.pid) as held:
        seen = look(held, Alone())
    assert (seen.pid, seen.ppid, seen.state, seen.nice) == (child.pid, os.getpid(), "S", 3)
    assert seen.uids == os.getresuid()
    assert seen.gids == os.getresgid()
    assert (seen.owner, seen.protected) == (-1, "")


def test_no_descriptor_stays(start: Start) -> None:
    child = start()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with hold(child.pid):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1  # noqa: PTH208
    with pytest.raises(ZeroDivisionError), hold(child.pid):
        raise ZeroDivisionError
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_nobody_has_the_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(NotFound, match=f"process {child.pid} is gone"), hold(child.pid):
        pass


def test_a_thread_is_no_process(start: Start) -> None:
    child = start(THREADS)
    tid = next(tid for tid in tasks(child.pid) if tid != child.pid)
    problem = f"{tid} is a thread of process {child.pid}: name that"
    with pytest.raises(UsageError, match=problem), hold(tid):
        pass


def test_a_signal_reaches_it(start: Start) -> None:
    child = start()
    with hold(child.pid) as held:
        kernel.send_signal(held, 0)
        assert child.poll() is None
        kernel.send_signal(held, signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
        with pytest.raises(NotFound, match=f"process {child.pid} is gone"):
            kernel.send_signal(held, signal.SIGTERM)


def test_nice_is_set_for_all_threads(start: Start) -> None:
    child = start(THREADS)
    with hold(child.pid) as held:
        kernel.set_nice(held, lambda nice: nice + 7)
        assert kernel.nice_of(held) == 7
    assert [os.getpriority(os.PRIO_PROCESS, tid) for tid in tasks(child.pid)] == [7] * 4


def test_threads_that_start_meanwhile_are_not_missed(start: Start) -> None:
    """Each call starts another thread, which has the old value, as one that was just starting."""
    setup = (
        "import threading\n"
        "def more():\n"
        "    while os.read(0, 1):\n"
        "        threading.Thread(target=time.sleep, args=[1000], daemon=True).start()\n"
        "        os.write(1, b'x')\n"
        "threading.Thread(target=more, daemon=True).start()"
    )
    child = start(setup)
    assert child.stdin and child.stdout
    stdin, stdout = child.stdin, child.stdout
    more = iter((True, True, True))

    def choose(nice: int) -> int:
        if next(more, False):
            stdin.write(b"x")
            stdin.flush()
            assert stdout.read(1) == b"x"
        return 5

    with hold(child.pid) as held:
        kernel.set_nice(held, choose)
    values = [os.getpriority(os.PRIO_PROCESS, tid) for tid in tasks(child.pid)]
    assert values == [5] * 5


def test_affinity_is_set_for_all_threads(start: Start) -> None:
    child = start(THREADS)
    (cpu, *_) = sorted(os.sched_getaffinity(0))
    with hold(child.pid) as held:
        kernel.set_affinity(held, frozenset({cpu}))
        assert kernel.cpus_of(held) == [cpu]
    assert [os.sched_getaffinity(tid) for tid in tasks(child.pid)] == [{cpu}] * 4


def test_limits_are_set_all_or_none(start: Start) -> None:
    child = start()
    with hold(child.pid) as held:
        before = kernel.limits_of(held, ["nofile", "core"])
        wanted = {"core": (0, before["core"][1]), "nofile": (20, 30)}
        kernel.set_limits(held, ["core", "nofile"], lambda name, now: wanted[name])
        assert kernel.limits_of(held, ["core", "nofile"]) == wanted
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (20, 30)

        wrong = {"core": (0, 0), "nofile": (20, 1 << 40)}
        with pytest.raises(Denied, match="the kernel does not let k2i do that"):
            kernel.set_limits(held, ["core", "nofile"], lambda name, now: wrong[name])
        assert kernel.limits_of(held, ["core", "nofile"]) == wanted


def test_all_resources_have_their_names() -> None:
    assert {"nofile", "nproc", "core", "as", "memlock", "rtprio", "stack"} <= RESOURCES.keys()
    for number in RESOURCES.values():
        resource.getrlimit(number)


def test_one_that_ends_meanwhile_is_said_to(start: Start) -> None:
    child = start()

    def choose(nice: int) -> int:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        return 5

    problem = f"process {child.pid} ended meanwhile"
    with hold(child.pid) as held:
        with pytest.raises(NotFound, match=problem):
            kernel.set_nice(held, choose)
        assert held.has_ended
        child.wait()
        with pytest.raises(NotFound, match=problem):
            kernel.check_after(held)


def test_refusals_come_through(start: Start) -> None:
    child = start()

    def refuse(nice: int) -> int:
        raise Denied("no")

    with hold(child.pid) as held, pytest.raises(Denied, match="no"):
        kernel.set_nice(held, refuse)


def test_the_kernels_refusals_are_sentences(start: Start) -> None:
    child = start()
    with hold(child.pid) as held, pytest.raises(UsageError, match="the kernel takes no such"):
        kernel.set_affinity(held, frozenset({1000}))


def test_own_process_and_the_first_are_protected() -> None:
    with hold(os.getpid()) as held:
        assert look(held, Alone()).protected == "the k2i that was asked"
    with hold(1) as held:
        assert look(held, Alone()).protected == "the first process of its node"


def test_kernel_threads_are_protected() -> None:
    """A line of kthreadd's, since there may be none to be seen."""
    kthreadd = parse_stat(b"2 (kthreadd) S 0 0 0 0 -1 2129984 0" + b" 0" * 44)
    assert describe_kernels(kthreadd) == "a kernel thread"
    ordinary = parse_stat(b"2 (kthreadd) S 0 0 0 0 -1 4194560 0" + b" 0" * 44)
    assert describe_kernels(ordinary) == ""


@pytest.mark.parametrize(
    ("text", "cpus"), [("0\n", {0}), ("0-1\n", {0, 1}), ("0-2,8,10-11\n", {0, 1, 2, 8, 10, 11})]
)
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


def test_nothing_done_is_no_success(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start()
    monkeypatch.setattr(kernel, "_threads", lambda pid: [])
    with hold(child.pid) as held, pytest.raises(NotFound, match="does not show its threads"):
        kernel.set_nice(held, lambda nice: 5)
