"""The guard against leaks, tried on tests that leak, in a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tabane.testing import leaks

CONFTEST = Path(__file__).parent / "conftest.py"
CONFIG = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
addopts = --import-mode=importlib -p no:cacheprovider
markers = real: real
"""


def run_inner(directory: Path, body: str) -> str:
    """The output of a test file's run under the guard. It must not pass."""
    (directory / "pytest.ini").write_text(CONFIG)
    (directory / "conftest.py").write_text(
        CONFTEST.read_text()
        + "\n\nfrom tabane.testing import leaks\nleaks.SETTLE_S = 0.2\n"
        + f"leaks.PRESENCE = leaks.Path({str(directory / 'presence')!r})\n"
    )
    (directory / "test_inner.py").write_text(
        "import asyncio, os, subprocess\nimport pytest\nfrom pathlib import Path\n"
        "from tabane.testing import leaks\n" + body
    )
    argv = [sys.executable, "-m", "pytest", "-q", str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=directory)
    reap_orphans()
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def reap_orphans() -> None:
    """This process may be a child subreaper, since tests of drivers let it adopt their engines'."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def test_each_leaking_test_fails_and_the_clean_ones_pass(tmp_path: Path) -> None:
    output = run_inner(
        tmp_path,
        """
KEPT = []

async def test_clean():
    await asyncio.create_subprocess_exec("true")
    ended = asyncio.ensure_future(asyncio.sleep(0))
    process = await asyncio.create_subprocess_exec("sleep", "60")
    process.kill()
    await process.wait()

async def test_task():
    KEPT.append(asyncio.create_task(asyncio.sleep(60), name="orphan"))

def test_descriptor():
    KEPT.append(open("/dev/null"))

def test_child():
    KEPT.append(subprocess.Popen(["sleep", "61"]))

def test_zombie():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    KEPT.append(process)

def test_daemon():
    subprocess.run(["setsid", "--fork", "sleep", "62"], check=True)
""",
    )
    assert "5 errors" in output and "6 passed" in output, output
    for phrase in (
        "test_task - Failed: left behind: task orphan",
        "(/dev/null)",
        "(sleep 61)",
        "nobody waited for it",
        "test_daemon - Failed: left behind: process",
    ):
        assert phrase in output, output


@pytest.mark.real
def test_what_real_tests_leave_on_the_machine(tmp_path: Path) -> None:
    cgroup = next(path for path in (leaks.CGROUPS / "pids", leaks.CGROUPS) if path.is_dir())
    name = f"leak{os.getpid()}"
    output = run_inner(
        tmp_path,
        f"""
pytestmark = pytest.mark.real

def test_clean(tmp_path):
    subprocess.run(["ip", "link", "add", "tbleak0", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "del", "tbleak0"], check=True)

def test_interface():
    subprocess.run(["ip", "link", "add", "tbleak1", "type", "bridge"], check=True)

def test_mount(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)

def test_netns():
    subprocess.run(["ip", "netns", "add", {name!r}], check=True)

def test_cgroup():
    Path({str(cgroup)!r} + leaks.name_cgroup({name!r}), "inner").mkdir(parents=True)

def test_container(tmp_path):
    program = f"mount --bind {{tmp_path}} /mnt && exec setsid --fork sleep 63"
    subprocess.run(["env", "-i", "unshare", "-m", "sh", "-c", program], check=True)
""",
    )
    Path("/run/netns", name).unlink()
    (left,) = cgroup.glob(f"{leaks.OF_TESTS}-*-{name}")
    for path in (left / "inner", left):
        path.rmdir()
    for phrase in (
        "6 passed, 5 errors",
        "interface tbleak1",
        "test_mount - Failed: left behind: mount",
        f"mount /run/netns/{name}",
        f"cgroup {left}/inner",
        "test_container - Failed: left behind: process",
        "(sleep 63)",
    ):
        assert phrase in output, output


def test_a_run_knows_when_it_is_not_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PRESENCE", tmp_path / "presence")
    ours, theirs = leaks.Presence(), leaks.Presence()
    assert not ours.is_alone() and not theirs.is_alone()
    theirs.close()
    assert ours.is_alone() and ours.is_alone()
    ours.close()


def test_runs_that_share_their_lock_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "PRESENCE", tmp_path / "presence")
    with leaks.PRESENCE.open("w") as lock:
        monkeypatch.setenv(leaks.SHARED_PRESENCE, str(os.dup(lock.fileno())))
        theirs = leaks.Presence(os.dup(lock.fileno()))
        shared = leaks.take_shared_presence()
        assert shared is not None and leaks.take_shared_presence() is None
        ours = leaks.Presence(shared)
        assert ours.is_alone() and theirs.is_alone()
        other = leaks.Presence()
        assert not ours.is_alone() and not theirs.is_alone()
        for one in (ours, theirs, other):
            one.close()


@pytest.mark.parametrize(
    ("starter", "nodes", "found"),
    [("mine-3", True, True), ("another", True, False), ("mine-3", False, False)],
)
def test_a_nodes_empty_cgroup_may_be_of_somebody_who_runs_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starter: str, nodes: bool, found: bool
) -> None:
    monkeypatch.setattr(leaks, "CGROUPS", tmp_path)
    monkeypatch.setattr(leaks, "PRESENCE", tmp_path / "presence")
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)
    presence = leaks.Presence()
    with subprocess.Popen(
        ["tabane.node.holder", "60"], executable="/bin/sleep", env={leaks.TEST_ID: starter}
    ) as node:
        while not leaks.runs_a_node(node.pid):
            pass  # its arguments are there a moment after it is executed
        monkeypatch.setattr(leaks, "all_pids", lambda: {node.pid})
        guard = leaks.Guard("mine", machine=True, presence=presence, nodes=nodes)
        for name in ("tabane/3f2a/tokyo-1", "tabane-trial-7"):
            (tmp_path / "pids" / name).mkdir(parents=True)
        left = [phrase for phrase in guard.close() if phrase.startswith("cgroup ")]
        node.kill()
    presence.close()
    assert f"cgroup {tmp_path}/pids/tabane-trial-7" in left
    assert (f"cgroup {tmp_path}/pids/tabane/3f2a/tokyo-1" in left) is found


def test_a_cgroup_that_a_test_named_is_its_own_whoever_else_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "CGROUPS", tmp_path)
    monkeypatch.setattr(leaks, "PRESENCE", tmp_path / "presence")
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)
    presence, other = leaks.Presence(), leaks.Presence()
    guard = leaks.Guard("mine-3", machine=True, presence=presence)
    ours = leaks.name_cgroup("abc").lstrip("/")
    assert ours == "tabane-test-mine-abc"
    for name in (ours, "tabane-test-another-abc"):
        (tmp_path / "pids" / name).mkdir(parents=True)
    left = [phrase for phrase in guard.close() if phrase.startswith("cgroup ")]
    assert left == [f"cgroup {tmp_path}/pids/{ours}"]
    presence.close()
    other.close()


def test_other_peoples_processes_are_left_alone() -> None:
    other = subprocess.Popen(["sleep", "60"], env={leaks.TEST_ID: "someone-else"})
    try:
        guard = leaks.Guard("mine", machine=False)
        assert guard.close() == []
        assert other.poll() is None
        assert leaks.starter_of(other.pid) == "someone-else"
    finally:
        other.kill()
        other.wait()
