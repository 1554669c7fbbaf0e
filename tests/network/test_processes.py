import os
import signal
import subprocess

import pytest

from tabane.network.processes import end_process
from tabane.runtimes.process import handles, is_same, start_ticks


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.kill()


def test_another_process_with_the_same_pid_is_left_alone(sleeper) -> None:
    end_process(sleeper.pid, 1)
    assert sleeper.poll() is None


def test_term_comes_first_when_there_is_time(sleeper: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks(sleeper.pid)
    end_process(sleeper.pid, ticks, term_timeout_s=30)
    assert not is_same(sleeper.pid, ticks), "nobody has reaped it, but it has ended"
    assert sleeper.wait() == -signal.SIGTERM
    end_process(sleeper.pid, ticks)


def test_without_a_timeout_it_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    end_process(sleeper.pid, start_ticks(sleeper.pid))
    assert sleeper.wait() == -signal.SIGKILL


def test_who_handles_a_signal(sleeper: subprocess.Popen[bytes]) -> None:
    assert not handles(sleeper.pid, signal.SIGTERM)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert handles(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    sleeper.kill()
    sleeper.wait()
    assert not handles(sleeper.pid, signal.SIGTERM)
