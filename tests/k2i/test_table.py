"""The table against ps(1), and where ps cannot say, against made-up files."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tabane.k2i import Process, ProcessTable
from tabane.k2i.procfs import Procfs
from tabane.k2i.table import MOVED_S
from tabane.model import AppName, Class, Generation, Instance, InstanceId, NodeName, State
from tabane.testing import VirtualClock

from .conftest import Start


def ps(pid: int, *columns: str) -> list[str]:
    wanted = [part for column in columns for part in ("-o", f"{column}=")]
    done = subprocess.run(
        ["ps", *wanted, "-p", str(pid)], capture_output=True, check=True, text=True
    )
    return done.stdout.split()


def find(table: ProcessTable, pid: int) -> Process:
    return next(process for process in table.processes() if process.pid == pid)


@pytest.mark.parametrize(
    "setup",
    [
        "",
        "os.nice(5)",
        "os.setsid()",
        "import threading; threading.Thread(target=time.sleep, args=[1000], daemon=True).start()",
        "ctypes.CDLL(None).mlockall(1)",
        "x = bytearray(50_000_000)",
    ],
)
def test_it_says_what_ps_says(start: Start, setup: str) -> None:
    child = start(setup)
    table = ProcessTable()
    process = find(table, child.pid)
    columns = ("ppid", "uid", "user", "stat", "tty", "ni", "nlwp", "vsz", "comm")
    assert ps(child.pid, *columns) == [
        str(process.ppid),
        str(process.uid),
        process.user,
        process.stat,
        process.tty,
        str(process.nice),
        str(process.threads),
        str(process.vsz_kib),
        process.name,
    ]
    columns = ("pgid", "sid", "tpgid", "gid", "group", "ruid", "s", "opri", "cls")
    assert ps(child.pid, *columns) == [
        str(process.pgrp),
        str(process.session),
        str(process.tpgid),
        str(process.gid),
        process.group,
        str(process.ruid),
        process.state,
        str(process.priority + 60),
        {0: "TS", 5: "IDL"}[process.policy],
    ]
    rss, memory, elapsed = ps(child.pid, "rss", "pmem", "etimes")
    assert process.rss_kib == pytest.approx(int(rss), abs=1024)
    assert process.memory_percent == pytest.approx(float(memory), abs=0.2)
    assert process.elapsed_s == pytest.approx(int(elapsed), abs=2)
    table.close()


def test_cpu_time_is_what_ps_says(start: Start) -> None:
    child = start("while time.process_time() < 0.5: pass")
    table = ProcessTable()
    process = find(table, child.pid)
    (seconds,) = ps(child.pid, "cputimes")
    assert int(process.cpu_s) == int(seconds)
    assert process.cpu_s >= 0.45
    assert process.cpu_percent == pytest.approx(100 * process.cpu_s / process.elapsed_s, abs=0.1)
    (percent,) = ps(child.pid, "%cpu")
    assert float(percent) == pytest.approx(process.cpu_percent, rel=0.5)
    table.close()


def test_it_lists_what_ps_lists(start: Start) -> None:
    child = start()
    table = ProcessTable()
    listed = {process.pid for process in table.processes()}
    done = subprocess.run(["ps", "-e", "-o", "pid="], capture_output=True, check=True, text=True)
    again = {process.pid for process in table.processes()}
    assert {child.pid, os.getpid(), 1} <= listed
    assert listed & again <= {int(pid) for pid in done.stdout.split()}
    table.close()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (rb"two\nlines", "two\nlines"),
        (rb") R 1 (", ") R 1 ("),
        (rb"\x1b[2J", "\x1b[2J"),
        (rb"\xff\xfe", "\\xff\\xfe"),
    ],
)
def test_odd_names(start: Start, raw: bytes, shown: str) -> None:
    child = start(f"open('/proc/self/comm', 'wb').write(b'{raw.decode()}')")
    table = ProcessTable()
    assert find(table, child.pid).name == shown
    row = next(row for row in json.loads(table.render()) if row["pid"] == child.pid)
    assert row["name"] == shown
    table.close()


def test_zombies_and_kernel_threads(start: Start) -> None:
    child = start()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    table = ProcessTable()
    zombie = find(table, child.pid)
    assert zombie.stat.startswith("Z")
    assert zombie.command == f"[{zombie.name}] <defunct>"
    table.close()


def test_an_exec_is_seen_at_once(start: Start) -> None:
    child = start(
        "sys.stdout.flush() or os.write(1, b'\\n'); os.read(0, 1); os.execlp('cat', 'cat')"
    )
    table = ProcessTable(clock=VirtualClock())
    assert "os.execlp" in find(table, child.pid).command
    assert child.stdin and child.stdout
    child.stdin.write(b"x" + b"\n")
    child.stdin.flush()
    child.stdout.readline()
    assert find(table, child.pid).command == "cat"
    table.close()


class FakeProc:
    """One process, 7, in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = VirtualClock()
        self.files: dict[str, bytes] = {
            "stat": b"7 (httpd) S 1 7 7 0 -1 0" + b" 0" * 12 + b" 100" + b" 0" * 31,
            "status": b"Tgid:\t7\nUid:\t7\t100007\t0\t0\nGid:\t8\t100008\t0\t0\n",
            "cmdline": b"httpd\0-f\0",
            "cgroup": b"5:pids:/other\n4:cpu:/tabane/c1/tokyo-1/abc123/inner\n0::/\n",
        }
        (root / "7").mkdir()
        (root / "uptime").write_text("11.00 3.00\n")
        (root / "meminfo").write_text("MemTotal:  1000 kB\n")
        self.write(**self.files)

    def write(self, **files: bytes) -> None:
        for name, content in files.items():
            (self.root / "7" / name).write_bytes(content)


@pytest.fixture
def fake(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


@pytest.fixture
def table(fake: FakeProc) -> Iterator[ProcessTable]:
    table = ProcessTable("tokyo/tokyo-1", "inc-1", procfs=Procfs(fake.root), clock=fake.clock)
    yield table
    table.close()


def instance(name: str, isolation: Class = Class.SANDBOX) -> Instance:
    return Instance(
        InstanceId(name),
        AppName("default/hello"),
        1,
        NodeName("tokyo/tokyo-1"),
        Generation("i", InstanceId(name), 1),
        State.READY,
        isolation,
    )


def row(table: ProcessTable, *instances: Instance) -> dict[str, Any]:
    (found,) = json.loads(table.render(instances))
    return dict(found)


def test_a_process_belongs_to_its_instance(fake: FakeProc, table: ProcessTable) -> None:
    place = ("dc", "node", "incarnation", "namespace", "app", "instance", "class", "inside")
    found = row(table, instance("other"), instance("abc123"))
    assert [found[key] for key in place] == [
        *("tokyo", "tokyo-1", "inc-1", "default", "default/hello", "abc123", "sandbox", ""),
    ]
    found = row(table)
    assert [found[key] for key in place] == ["tokyo", "tokyo-1", "inc-1", "", "", "abc123", "", ""]


def test_the_container_is_told_where_it_is_the_node_s(fake: FakeProc, table: ProcessTable) -> None:
    """What runs a sandbox or a machine is in the cgroup of one of its containers, and in none."""
    assert row(table, instance("abc123", Class.CONTAINER))["container"] == "inner"
    assert row(table, instance("abc123"))["container"] == ""
    fake.write(cgroup=b"4:cpu:/tabane/c1/tokyo-1/abc123\n")
    fake.clock.advance(MOVED_S)
    assert row(table, instance("abc123", Class.CONTAINER))["container"] == ""


def test_owners_and_start(fake: FakeProc, table: ProcessTable) -> None:
    found = row(table)
    owners = [found[key] for key in ("uid", "user", "gid", "group", "ruid")]
    assert owners == [100007, "100007", 100008, "100008", 7]
    assert found["started_at"] == fake.clock.wall() - 11 + 1
    assert (found["start_ticks"], found["elapsed_s"]) == (100, 10)


def test_recent_use_is_that_since_another_snapshot(fake: FakeProc, table: ProcessTable) -> None:
    def use(ticks: int, start: int = 100) -> float | None:
        numbers = [0] * 48
        numbers[0:5], numbers[10], numbers[18] = [1, 7, 7, 0, -1], ticks, start
        fake.write(stat=b"7 (httpd) R " + b" ".join(b"%d" % number for number in numbers))
        percent: float | None = row(table)["recent_cpu_percent"]
        return percent

    assert use(100) is None
    fake.clock.advance(0.4)
    assert use(120) is None
    fake.clock.advance(0.6)
    assert use(150) == 50
    fake.clock.advance(0.4)
    assert use(150) == 50
    fake.clock.advance(0.1)
    assert use(150) == 0
    fake.clock.advance(1)
    assert use(7, start=500) is None


def test_other_cgroups_are_no_instances(fake: FakeProc, table: ProcessTable) -> None:
    fake.write(cgroup=b"4:cpu:/tabane/c1\n4:pids:/x/tabane/a/b/c\n0::/tabane\n")
    assert row(table, instance("c"))["instance"] == ""


def test_what_rarely_changes_is_at_most_a_second_old(fake: FakeProc, table: ProcessTable) -> None:
    assert row(table)["command"] == "httpd -f"
    fake.write(cmdline=b"httpd: worker\0")
    fake.clock.advance(0.9)
    assert row(table)["command"] == "httpd -f"
    fake.clock.advance(0.1)
    assert row(table)["command"] == "httpd: worker"
    fake.write(cmdline=b"sh\0", stat=fake.files["stat"].replace(b"httpd", b"sh"))
    assert row(table)["command"] == "sh"


def test_a_process_that_is_only_half_there_is_left_out(fake: FakeProc, table: ProcessTable) -> None:
    (fake.root / "7" / "cmdline").unlink()
    assert table.processes() == []
    assert (table.records(), table.record(7)) == ([], None)


def test_long_command_lines_are_cut(fake: FakeProc, table: ProcessTable) -> None:
    fake.write(cmdline=b"x\0" * 100_000)
    assert len(row(table)["command"]) == 1 << 15


def test_what_has_not_run_is_not_read_again(fake: FakeProc, table: ProcessTable) -> None:
    fake.write(schedstat=b"500 1 3\n")
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    assert row(table)["command"] == "httpd -f"
    fake.write(cmdline=b"httpd: worker\0")
    fake.clock.advance(3)
    assert row(table)["command"] == "httpd -f"
    fake.write(schedstat=b"501 1 4\n")
    fake.clock.advance(1)
    assert row(table)["command"] == "httpd: worker"


def test_where_the_kernel_does_not_count_it_is_read_again(
    fake: FakeProc, table: ProcessTable
) -> None:
    fake.write(schedstat=b"0 0 0\n")
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    assert row(table)["command"] == "httpd -f"
    fake.write(cmdline=b"httpd: worker\0")
    fake.clock.advance(1)
    assert row(table)["command"] == "httpd: worker"


def test_one_with_threads_is_read_again(fake: FakeProc, table: ProcessTable) -> None:
    stat = fake.files["stat"].split()
    stat[19] = b"2"
    fake.write(schedstat=b"500 1 3\n", stat=b" ".join(stat))
    (fake.root / "uptime").write_text("1000.00 3.00\n")
    assert row(table)["stat"] == "Ssl"
    fake.write(cmdline=b"java\0")
    fake.clock.advance(1)
    assert row(table)["command"] == "java"


@pytest.mark.parametrize(("uptime_s", "stale_s"), [(3, 1), (1000, 5)])
def test_one_that_others_moved_is_found(
    fake: FakeProc, table: ProcessTable, uptime_s: int, stale_s: int
) -> None:
    fake.write(schedstat=b"500 1 3\n")
    (fake.root / "uptime").write_text(f"{uptime_s}.00 3.00\n")
    assert row(table)["instance"] == "abc123"
    fake.write(cgroup=b"4:cpu:/tabane/c1/tokyo-1/other\n")
    fake.clock.advance(stale_s - 0.1)
    assert row(table)["instance"] == "abc123"
    fake.clock.advance(0.1)
    assert row(table)["instance"] == "other"


def test_one_that_was_touched_is_read_at_once(fake: FakeProc, table: ProcessTable) -> None:
    fake.write(schedstat=b"500 1 3\n")
    row(table)
    fake.write(status=fake.files["status"].replace(b"100007", b"33"))
    assert row(table)["uid"] == 100007
    table.touch(7)
    table.touch(8)
    assert row(table)["uid"] == 33


def test_a_pid_that_was_given_to_another(fake: FakeProc, table: ProcessTable) -> None:
    fake.write(schedstat=b"500 1 3\n")
    before = row(table)
    other = fake.files["stat"].replace(b" 100 ", b" 200 ", 1)
    fake.write(stat=other, status=fake.files["status"].replace(b"100007", b"33"))
    found = row(table)
    assert (before["start_ticks"], found["start_ticks"]) == (100, 200)
    assert (found["uid"], found["recent_cpu_percent"]) == (33, None)


def test_an_unchanged_process_grows_older(fake: FakeProc, table: ProcessTable) -> None:
    first = table.processes()
    (fake.root / "uptime").write_text("16.00 3.00\n")
    fake.clock.advance(5)
    second = table.processes()
    assert [process.elapsed_s for process in (*first, *second)] == [10, 15]
    assert [process.started_at for process in second] == [process.started_at for process in first]


def test_a_clock_that_is_set_moves_start_times(fake: FakeProc, table: ProcessTable) -> None:
    before = row(table)["started_at"]
    fake.clock.step_wall(3600)
    assert row(table)["started_at"] == before + 3600
    fake.clock.step_wall(0.05)
    assert row(table)["started_at"] == before + 3600
