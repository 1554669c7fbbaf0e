"""Every key of `/v1` on a process of our own, against /proc as read here and against ps(1)."""

import json
import os
import pwd
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tabane.k2i import ProcessTable

from .conftest import Start

_KEYS = """
tid ppid maj_delta min_delta pcpu state pad_1 pad_2 pad_3 utime stime cutime cstime start_time
signal blocked sigignore sigcatch _sigpnd start_code end_code start_stack kstk_esp kstk_eip wchan
priority nice rss alarm size resident share trs lrs drs dt vm_size vm_lock vm_rss vm_data vm_stack
vm_swap vm_exe vm_lib rtprio sched vsize rss_rlim flags min_flt maj_flt cmin_flt cmaj_flt environ
cmdline cgroup supgid supgrp euser ruser suser fuser rgroup egroup sgroup fgroup cmd pgrp session
nlwp tgid tty euid egid ruid rgid suid sgid fuid fgid tpgid exit_signal processor ns
"""
KEYS = _KEYS.split()
_TEXTS = """
environ supgid supgrp euser ruser suser fuser rgroup egroup sgroup fgroup cmd
"""
TEXTS = _TEXTS.split()


def record_of(pid: int) -> dict[str, Any]:
    table = ProcessTable()
    record = table.record(pid)
    table.close()
    assert record is not None
    decoded: dict[str, Any] = json.loads(msgspec.json.encode(record))
    return decoded


def test_keys_types_and_order(start: Start) -> None:
    record = record_of(start().pid)
    assert list(record) == KEYS
    assert len(KEYS) == 84
    for key, value in record.items():
        if key in ("signal", "blocked", "sigignore", "sigcatch", "_sigpnd", "ns"):
            assert len(value) == (6 if key == "ns" else 18)
            assert all(type(item) is int for item in value), key
        elif key in ("cmdline", "cgroup"):
            assert value and all(type(item) is str for item in value), key
        else:
            assert type(value) is (str if key in TEXTS else int), key


_STAT = """
_ _ _ ppid pgrp session tty tpgid flags min_flt cmin_flt maj_flt cmaj_flt utime stime cutime
cstime priority nice nlwp alarm start_time vsize rss rss_rlim start_code end_code start_stack
kstk_esp kstk_eip _ _ _ _ wchan _ _ exit_signal processor rtprio sched
"""
STAT = _STAT.split()
STATUS = {
    "vm_size": "VmSize",
    "vm_lock": "VmLck",
    "vm_rss": "VmRSS",
    "vm_data": "VmData",
    "vm_stack": "VmStk",
    "vm_swap": "VmSwap",
    "vm_exe": "VmExe",
    "vm_lib": "VmLib",
}
SIGNALS = {
    "signal": "ShdPnd",
    "blocked": "SigBlk",
    "sigignore": "SigIgn",
    "sigcatch": "SigCgt",
    "_sigpnd": "SigPnd",
}
SETUP = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
signal.signal(signal.SIGALRM, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR2)
os.nice(3)
"""


def test_numbers_are_those_of_proc(start: Start) -> None:
    child = start(SETUP, "", "two words", "")
    record = record_of(child.pid)
    proc = Path(f"/proc/{child.pid}")
    stat = (proc / "stat").read_text().split()
    for key, value in zip(STAT, stat, strict=False):
        if key != "_":
            assert record[key] == int(value), key
    assert chr(record["state"]) == stat[2] == "S"
    assert record["cmd"] == (proc / "comm").read_text().rstrip("\n")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    for key, name in STATUS.items():
        assert record[key] == int(status[name].split()[0]), key
    for key, name in SIGNALS.items():
        assert bytes(record[key]) == status[name].encode() + b"\0\0", key
    assert record["blocked"] != record["signal"] != record["_sigpnd"]
    statm = list(map(int, (proc / "statm").read_text().split()))
    names = ("size", "resident", "share", "trs", "lrs", "drs", "dt")
    assert [record[name] for name in names] == statm
    assert record["cgroup"] == (proc / "cgroup").read_text().splitlines()
    assert record["cmdline"][-1] == "two words"
    assert "" not in record["cmdline"]
    assert record["rss_rlim"] == 18446744073709551615
    assert record["tid"] == record["tgid"] == child.pid
    assert record["environ"] == ""


COLUMNS = {
    "ppid": "ppid",
    "pgrp": "pgid",
    "session": "sid",
    "tpgid": "tpgid",
    "nice": "ni",
    "nlwp": "nlwp",
    "processor": "psr",
    **{key: key for key in ("euid", "ruid", "suid", "fuid", "egid", "rgid", "sgid", "fgid")},
    **{key: key for key in ("euser", "ruser", "suser", "fuser", "supgid", "supgrp")},
    **{key: key for key in ("egroup", "rgroup", "sgroup", "fgroup")},
}


@pytest.mark.parametrize(
    "setup",
    [
        "",
        pytest.param(
            "os.setgroups([1, 4]); os.setresgid(1, 2, 3); os.setresuid(5, 6, 7)",
            marks=pytest.mark.real,
        ),
    ],
)
def test_owners_are_those_of_ps(start: Start, setup: str) -> None:
    child = start(setup)
    record = record_of(child.pid)
    columns = [part for name in COLUMNS.values() for part in ("-o", f"{name}:40=")]
    command = ["ps", *columns, "-p", str(child.pid)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    shown = dict(zip(COLUMNS, done.stdout.split(), strict=True))
    assert {key: str(record[key]) for key in COLUMNS} == shown
    if not setup:
        assert record["euser"] == pwd.getpwuid(os.geteuid()).pw_name


def test_a_zombie_has_no_memory(start: Start) -> None:
    child = start()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    record = record_of(child.pid)
    assert chr(record["state"]) == "Z"
    assert (record["vm_size"], record["size"], record["cmdline"]) == (0, 0, [])


def test_threads_and_the_gone_are_no_processes(start: Start) -> None:
    child = start(
        "import threading; threading.Thread(target=time.sleep, args=[1000], daemon=True).start()"
    )
    table = ProcessTable()
    threads = {int(path.name) for path in Path(f"/proc/{child.pid}/task").iterdir()}
    (thread,) = threads - {child.pid}
    assert table.record(thread) is None
    child.kill()
    child.wait()
    assert table.record(child.pid) is None
    table.close()


def test_rows_say_what_records_say(start: Start) -> None:
    """Also when they are sent again: what has not changed of a process is not read again."""
    child = start(SETUP)
    table = ProcessTable()
    for _ in range(3):
        rows = {row["tid"]: row for row in json.loads(table.render_records())}
        record = table.record(child.pid)
        assert json.loads(msgspec.json.encode(record)) == rows[child.pid]
    assert len(rows) > 2
    table.close()


def test_a_signal_that_waits_for_one_who_sleeps_is_seen_at_once(start: Start) -> None:
    child = start("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])")
    table = ProcessTable()

    def pending() -> str:
        rows = {row["tid"]: row for row in json.loads(table.render_records())}
        return bytes(rows[child.pid]["signal"][:16]).decode()

    assert [pending(), pending()] == ["0" * 16] * 2
    child.send_signal(signal.SIGUSR1)
    assert int(pending(), 16) == 1 << signal.SIGUSR1 - 1
    table.close()


def test_what_a_process_changes_of_itself_is_seen_at_once(start: Start) -> None:
    child = start(
        "os.write(1, b'\\n'); os.read(0, 1); import signal; signal.signal(signal.SIGALRM, print)"
    )
    table = ProcessTable()

    def caught() -> int:
        rows = {row["tid"]: row for row in json.loads(table.render_records())}
        return int(bytes(rows[child.pid]["sigcatch"][:16]), 16) >> signal.SIGALRM - 1 & 1

    assert [caught(), caught()] == [0, 0]
    assert child.stdin and child.stdout
    child.stdin.write(b"x")
    child.stdin.flush()
    child.stdout.readline()
    assert caught() == 1
    table.close()


def test_those_who_come_and_go_disturb_nothing() -> None:
    """As many in a second as 10,000 in a minute are, and more."""
    table = ProcessTable()
    before = len(list(Path("/proc/self/fd").iterdir()))
    script = "for i in $(seq 300); do /bin/true & done; wait"
    with subprocess.Popen(["sh", "-c", script]) as child:
        while child.poll() is None:
            pids = [row["tid"] for row in json.loads(table.render_records())]
            assert os.getpid() in pids
            assert pids == sorted(set(pids))
            assert len({process.pid for process in table.processes()}) >= 2
    table.processes()
    kept = len(list(Path("/proc/self/fd").iterdir())) - before
    assert kept <= 6 * len(table.processes())
    table.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
