"""A pid that is given to another process between two reads, in a pid namespace of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real

PROGRAM = """
import json, os, pathlib, subprocess, time
from tabane.k2i import ProcessTable
from tabane.k2i.procfs import GONE, Procfs

def start(pid, argv):
    if pid:
        pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    child = subprocess.Popen(argv)
    while b") S" not in pathlib.Path(f"/proc/{child.pid}/stat").read_bytes():
        os.sched_yield()
    return child

def end(child):
    child.kill()
    child.wait()

def look(table, pid):
    (process,) = (process for process in table.processes() if process.pid == pid)
    (row,) = (row for row in json.loads(table.render_records()) if row["tid"] == pid)
    assert process.start_ticks == row["start_time"]
    assert row["cmdline"] == process.command.split() == table.record(pid).cmdline
    return [process.command, process.start_ticks, process.recent_cpu_percent]

class Grown(Procfs):
    def uptime_s(self):
        return super().uptime_s() + 1000

table, plain = ProcessTable(procfs=Grown()), Procfs()
first = start(0, ["sleep", "1001"])
seen = [look(table, first.pid), look(table, first.pid)]
before = plain.stat(first.pid)
end(first)
while time.clock_gettime(time.CLOCK_BOOTTIME) * 100 < before.starttime + 2:
    os.sched_yield()  # a start is told in ticks: the next one is another's
second = start(first.pid, ["tail", "-f", "/dev/null"])
assert second.pid == first.pid
seen += [look(table, second.pid), look(table, second.pid)]
try:
    plain.stat_again(before)
    refused = False
except GONE:
    refused = True
end(second)
gone = [process for process in table.processes() if process.pid == second.pid]
print(json.dumps({"seen": seen, "refused": refused, "gone": gone == []}))
"""


def test_a_pid_that_was_given_to_another() -> None:
    enter = ("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
    argv = (*enter, sys.executable, "-c", PROGRAM)
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    commands, starts, recent = zip(*found["seen"], strict=True)
    assert commands == ("sleep 1001",) * 2 + ("tail -f /dev/null",) * 2
    assert starts[0] == starts[1] < starts[2] == starts[3]
    assert recent[2] is None
    assert found["refused"]
    assert found["gone"]
