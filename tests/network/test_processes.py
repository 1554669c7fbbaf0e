import os
import signal
import subprocess

import pytest

from tabane.network import processes


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.kill()


def test_a_process_is_known_by_its_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    ticks = processes.start_ticks(sleeper.pid)
    assert ticks is not None
    assert processes.is_running(sleeper.pid, ticks)
    assert not processes.is_running(sleeper.pid, ticks + 1)


def test_another_process_with_the_same_pid_is_left_alone(sleeper) -> None:
    processes.end_process(sleeper.pid, 1)
    assert sleeper.poll() is None


def test_term_comes_first_when_there_is_time(sleeper: subprocess.Popen[bytes]) -> None:
    ticks = processes.start_ticks(sleeper.pid)
    processes.end_process(sleeper.pid, ticks, term_timeout_s=30)
    assert not processes.is_running(sleeper.pid, ticks), "nobody has reaped it, but it has ended"
    assert sleeper.wait() == -signal.SIGTERM
    processes.end_process(sleeper.pid, ticks)


def test_without_a_timeout_it_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    processes.end_process(sleeper.pid, processes.start_ticks(sleeper.pid))
    assert sleeper.wait() == -signal.SIGKILL


def test_there_is_no_such_process() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert processes.start_ticks(child.pid) is None
    assert processes.start_ticks(os.getpid()) is not None
