"""The cluster's shell with the host's own tools, unmodified, over a pretended cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.at_terminal import at_terminal
from tests.real.conftest import GIVE_UP_S, Ended, wait_for

from tabane.tools.procfs.numbers import FIRST

pytestmark = pytest.mark.real

PRETENDED = Path(__file__).parent.parent / "tools" / "procfs" / "pretended.py"
NODES, PROCESSES = 3, 5
EACH = PROCESSES + 2
WORKERS = [FIRST + EACH * node + PROCESSES for node in range(NODES)]
WORKER, ODD = WORKERS[0], WORKERS[0] + 1
ALL = list(range(FIRST, FIRST + NODES * EACH))


class Shell:
    """Commands in a shell over a pretended cluster; the orders that its nodes got."""

    def __init__(self, directory: Path) -> None:
        self._orders = directory / "orders"

    def argv(self, *command: str) -> list[str]:
        program = [sys.executable, str(PRETENDED), "--orders", str(self._orders)]
        return [*program, str(NODES), str(PROCESSES), "--", *command]

    def run(self, script: str, code: int = 0) -> str:
        """What a script of bash's writes to stdout."""
        done = subprocess.run(
            self.argv("bash", "-c", script), capture_output=True, text=True, timeout=GIVE_UP_S
        )
        assert (done.returncode, done.stderr) == (code, ""), done
        return done.stdout

    def ended(self, script: str) -> Ended:
        done = subprocess.run(
            self.argv("bash", "-c", script), capture_output=True, text=True, timeout=GIVE_UP_S
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def orders(self) -> list[dict[str, Any]]:
        lines = self._orders.read_text().splitlines() if self._orders.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def rows(text: str) -> dict[int, list[str]]:
    """Lines by the first number in them."""
    found = {}
    for line in text.splitlines():
        if (number := re.search(r"\b[0-9]+\b", line)) is not None:
            found[int(number[0])] = line.split()
    return found


def test_ps_shows_every_process(shell: Shell) -> None:
    found = rows(shell.run("ps aux"))
    assert set(ALL) <= set(found)
    user, _, cpu, _, vsz, rss, tty, stat, *_, command = found[WORKER]
    assert (user, vsz, rss, tty, stat, command) == ("remoteu+", "10000", "4000", "?", "Ss", "--big")
    assert float(cpu) > 0
    own = [line for number, line in found.items() if number < FIRST]
    assert [line[10:] for line in own if line[10] == "ps"] == [["ps", "aux"]]


def test_ps_draws_one_forest(shell: Shell) -> None:
    found = shell.run("ps -e --forest -o pid=,ppid=,args=").splitlines()
    lines = {int(line.split()[0]): line for line in found}
    assert lines[FIRST].split()[1] == "1", "each node hangs from the shell's first process"
    assert f"{FIRST}  \\_ worker --big" in lines[WORKER]
    assert f"{WORKER}  |   \\_ strange" in lines[ODD] or "\\_ strange" in lines[ODD]


def test_ps_ef_draws_it_too(shell: Shell) -> None:
    lines = [line.split(None, 7) for line in shell.run("ps -ef --forest").splitlines()]
    drawn = {int(pid): (user, ppid, args) for user, pid, ppid, *_, args in lines[1:]}
    assert set(ALL) <= set(drawn)
    assert drawn[WORKER] == ("remoteu+", str(FIRST), "\\_ worker --big")
    assert drawn[ODD][:2] == ("root", str(WORKER))


def test_start_and_elapsed_are_right(shell: Shell) -> None:
    out = shell.run(f"ps -o etimes=,lstart= -p {WORKER}; cut -d. -f1 /proc/uptime; date +%s")
    worker, uptime, now = out.splitlines()
    elapsed = int(worker.split()[0])
    assert abs(elapsed - (int(uptime) - 1)) <= 2, "started a second after its machine"
    started = int(subprocess.check_output(["date", "-d", worker.split(None, 1)[1], "+%s"]))
    assert abs(int(now) - elapsed - started) <= 2


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"pgrep -f '[w]orker --big' | grep -x '{WORKER}\\|{WORKERS[2]}'", [WORKER, WORKERS[2]]),
        ("pgrep -x worker", WORKERS),
        ("pgrep -u remoteuser", WORKERS),
        (f"pgrep -P {WORKER}", [ODD]),
        ("pidof worker | tr ' ' '\\n' | sort", WORKERS),
    ],
)
def test_processes_are_found(shell: Shell, command: str, expected: list[int]) -> None:
    assert list(map(int, shell.run(command).split())) == expected


def test_top(shell: Shell) -> None:
    out = shell.run("top -b -n1 -w 200")
    assert set(ALL) <= set(rows(out))
    assert " 24576.0 total" in out, "three machines of 8 GiB"
    assert re.search(r"load average: 1.50, 0.75, 0.30", out)


def test_pstree(shell: Shell) -> None:
    out = shell.run("pstree -p 1")
    assert out.startswith("tabane(1)-")
    for worker in WORKERS:
        assert re.search(rf"worker\({worker}\)---strange \(name\) [^(]*\({worker + 1}\)", out)


def test_figures_are_the_clusters(shell: Shell) -> None:
    out = shell.run("free -m; uptime; w -h; vmstat; nproc; grep -c ^cpu /proc/stat")
    assert re.search(r"^Mem: +24576 +6144 +12288 ", out, re.MULTILINE)
    assert out.count("load average: 1.50, 0.75, 0.30") == 1, "uptime's"
    assert re.search(r"^ *[0-9]+ +[0-9]+ +0 12582912 +30720 +3", out, re.MULTILINE), "vmstat's"
    assert out.splitlines()[-1] == "7", "six CPUs, and their sum"


def test_psutil(shell: Shell) -> None:
    script = """
import json, psutil
attributes = ["name", "username", "ppid", "status", "nice", "cmdline", "cpu_times", "exe", "cwd"]
attributes += ["memory_info", "create_time", "cpu_affinity", "io_counters", "num_fds", "terminal"]
found = {p.pid: p.info for p in psutil.process_iter(attributes)}
p = psutil.Process(WORKER)
p.nice(7)
there = [psutil.pid_exists(WORKER), psutil.pid_exists(5_000_000)]
print(json.dumps([found[WORKER], *there, p.nice()]))
p.terminate()
print(json.dumps([[q.pid for q in psutil.wait_procs([p], timeout=20)[0]], len(found)]))
"""
    script = script.replace("WORKER", str(WORKER))
    out = shell.run(f"{sys.executable} -c '{script}'").splitlines()
    info, there, other, nice = json.loads(out[0])
    assert (info["name"], info["username"], info["ppid"]) == ("worker", "remoteuser", FIRST)
    assert (info["cmdline"], info["cpu_times"][0]) == (["worker", "--big"], 500)
    assert (info["status"], info["memory_info"][0]) == ("sleeping", 4_096_000)
    assert (info["exe"], info["io_counters"], there, other, nice) == (None, None, True, False, 7)
    gone, count = json.loads(out[1])
    assert gone == [WORKER]
    assert count >= len(ALL)


def test_psutil_with_a_procfs_path(shell: Shell, tmp_path: Path) -> None:
    script = f"""
import json, psutil
psutil.PROCFS_PATH = "{tmp_path}"
own = psutil.Process()
print(json.dumps([psutil.pids(), psutil.Process({WORKER}).name(), own.cmdline()[1], own.ppid()]))
print(psutil.virtual_memory().total >> 30, len(psutil.cpu_times(True)), flush=True)
"""
    mounted = f"mount --rbind /proc {tmp_path} && {sys.executable} -c '{script}'"
    first, second = shell.run(mounted).splitlines()
    pids, name, option, parent = json.loads(first)
    assert set(ALL) <= set(pids)
    assert (name, option, parent in pids) == ("worker", "-c", True)
    assert second.split() == ["24", "6"]


def test_names_pass_as_they_are(shell: Shell) -> None:
    out = shell.run(f"cat -v /proc/{ODD}/cmdline; grep -c . /proc/{ODD}/stat; ps -o args= -p {ODD}")
    cmdline, _, args = out.partition("\n")[0], None, out.splitlines()[-1]
    assert cmdline.startswith("strange (name) ^[[31mM-^?")
    assert "\x1b" not in args and args.startswith("strange (name) ?[31m")


def test_calls_reach_the_right_process(shell: Shell) -> None:
    out = shell.run(f"""
        kill {WORKER}; kill -s HUP {WORKERS[1]}; renice -n 5 -p {ODD}; taskset -p 1 {ODD}
        taskset -p {ODD}; prlimit --nofile -o SOFT,HARD --noheadings --pid {ODD}; chrt -p {ODD}
        ps -o ni= -p {ODD}; ps -o pid= -p {WORKER}; true""")
    assert f"{ODD} (process ID) old priority 0, new priority 5" in out
    assert f"pid {ODD}'s current affinity mask: 3" in out
    assert "1024 unlimited" in out
    assert "SCHED_OTHER" in out
    assert out.splitlines()[-1].strip() == "5", "it is told what it did, and who is gone is gone"
    where = {"node": "tokyo/tokyo-1", "start": 100, "uid": 0}
    changes = [order for order in shell.orders() if not order.get("dry_run")]
    assert changes == [
        {**where, "pid": 9001, "verb": "signal", "signal": 15},
        {**where, "node": "osaka/osaka-1", "pid": 9001, "verb": "signal", "signal": 1},
        {**where, "pid": 9002, "verb": "nice", "nice": 5},
        {**where, "pid": 9002, "verb": "affinity", "cpus": [0]},
    ]


def test_killall_by_descriptor(shell: Shell) -> None:
    script = f"""
        sleep 998 & kill $!; wait $!; echo own $?
        killall -HUP worker; killall -0 nobody_here 2>&1
        {sys.executable} -c '
import os, signal, subprocess
child = subprocess.Popen(["sleep", "997"])
signal.pidfd_send_signal(os.pidfd_open(child.pid), 15)
print(child.wait())
for fd in (os.open("/proc", os.O_RDONLY), os.open("/proc/{WORKER}/stat", os.O_RDONLY), 99):
    try:
        signal.pidfd_send_signal(fd, 15)
    except OSError as error:
        print(error.errno)'"""
    out = shell.run(script)
    assert out == "own 143\nnobody_here: no process found\n-15\n9\n9\n9\n"
    assert [(order["node"][:5], order["signal"]) for order in shell.orders()] == [
        ("tokyo", 1),
        ("osaka", 1),
        ("ishik", 1),
    ]


def test_calls_are_made_as_who_makes_them(shell: Shell) -> None:
    ended = shell.ended(f"setpriv --reuid 65534 --clear-groups kill {WORKER}; cat /proc/tabane/log")
    assert "Operation not permitted" in ended.err
    assert "for uid 65534: only root may do that" in ended.out
    assert [order["uid"] for order in shell.orders()] == [65534]


def test_arguments_are_not_for_other_users(shell: Shell) -> None:
    script = f"setpriv --reuid 65534 --clear-groups ps -o args= -p {FIRST + 1}"
    assert shell.run(script).strip() == "[sleep]"


def test_who_is_not_there(shell: Shell) -> None:
    nobody = FIRST + 999
    ended = shell.ended(f"kill {nobody}; renice -n 1 -p {nobody}; cat /proc/{nobody}/stat")
    assert ended.err.count("No such process") == 2
    assert "No such file or directory" in ended.err
    assert shell.orders() == []


def test_what_cannot_be_carried_says_why(shell: Shell) -> None:
    ended = shell.ended(f"chrt -r -p 5 {ODD}; cat /proc/tabane/log")
    assert "Function not implemented" in ended.err
    assert "a scheduling policy cannot be set on another node" in ended.out


def test_many_at_once_reaches_the_shells_own_only(shell: Shell) -> None:
    with subprocess.Popen(["sleep", "1000"]) as outside:
        script = f"""
            sleep 999 & own=$!
            kill -s TERM -- -1; wait $own; echo ended with $?
            kill -- -{FIRST} 2>/dev/null || echo no such group
            kill -- -{outside.pid} 2>/dev/null || echo none of ours
        """
        try:
            assert shell.run(script) == "ended with 143\nno such group\nnone of ours\n"
            assert outside.poll() is None
        finally:
            outside.kill()
    assert shell.orders() == []


def test_own_processes_are_there(shell: Shell) -> None:
    out = shell.run("""
        sleep 999 & echo $(pgrep -x sleep | head -1) = $!; kill $!
        readlink /proc/self/exe /proc/$$/exe; ls /proc/$$/fd/ | head -1; readlink /proc/$$/ns/net
        cat /dev/fd/3 3<<<through; cat <(echo substituted)
        [ -r /proc/sys/kernel/pid_max ] && echo sys
    """)
    first, *rest = out.splitlines()
    assert len(set(first.split(" = "))) == 1
    assert rest[0].endswith("/readlink") and rest[1].endswith("/bash")
    assert rest[2] == "0" and rest[3].startswith("net:[")
    assert rest[4:] == ["through", "substituted", "sys"]


def test_the_shells_end_is_the_commands(shell: Shell) -> None:
    assert shell.ended("exit 7").code == 7
    assert shell.ended("kill -KILL $$").code == 137
    assert shell.run("sleep 1000 & echo left") == "left\n", "nobody waits for what is left"


def test_htop_kills_and_renices(shell: Shell) -> None:
    f7, f9 = "\x1b[18~", "\x1b[20~"
    with at_terminal(shell.argv("htop", "-p", f"{ODD}")) as type_keys:
        type_keys(f"{ODD}")
        type_keys("Send signal", f9)
        type_keys("", "\r")
        wait_for(lambda: len(shell.orders()) == 1, "the signal")
        type_keys("", "q")
    with at_terminal(shell.argv("htop", "-p", f"{WORKER}")) as type_keys:
        type_keys(f"{WORKER}")
        type_keys("", f7)
        wait_for(lambda: len(shell.orders()) == 2, "the nice value")
        type_keys("", "q")
    told = [(order["pid"], order["verb"]) for order in shell.orders()]
    assert told == [(9002, "signal"), (9001, "nice")]
    assert (shell.orders()[0]["signal"], shell.orders()[1]["nice"]) == (15, -1)


@contextmanager
def going_on(shell: Shell, script: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    argv = shell.argv("bash", "-c", script)
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_fuse_server(pid: int) -> bool:
    targets = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
    return "/dev/fuse" in targets


def test_a_killed_server_means_errors_and_leaves_nothing(shell: Shell) -> None:
    script = f"echo up; read; ps aux 2>&1; kill {WORKER} 2>&1; kill -0 $$ && echo alive"
    with going_on(shell, script) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "up\n"
        (server,) = filter(is_fuse_server, children(process.pid))
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: server not in children(process.pid), "the server's end")
        out, err = process.communicate("\n", timeout=GIVE_UP_S)
    assert "what serves this shell's /proc has ended" in err
    assert "Function not implemented" in out
    assert out.endswith("alive\n"), "calls about own processes need nobody"
    assert "4194305" not in out


def test_a_killed_parent_leaves_nothing(shell: Shell) -> None:
    with going_on(shell, "sleep 1000 & echo up; read; sleep 1000") as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        below = children(process.pid)
        assert len(below) == 2
        process.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "their end")


def test_a_shell_within_a_shell_is_refused(shell: Shell) -> None:
    ended = shell.ended(f"{sys.executable} {PRETENDED} 1 1 -- true")
    assert ended.code == 1
    assert "this is such a shell already" in ended.err


# Without root


def as_nobody(shell: Shell, *command: str) -> Ended:
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    done = subprocess.run(
        [*argv, *shell.argv(*command)], capture_output=True, text=True, timeout=GIVE_UP_S, cwd="/"
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def open_device(tmp_path: Path) -> Iterator[None]:
    """/dev/fuse for everyone, as most systems have it; in this run's own mount namespace."""
    device = tmp_path / "fuse"
    os.mknod(device, 0o020666, os.makedev(10, 229))
    device.chmod(0o666)
    subprocess.run(["mount", "--bind", str(device), "/dev/fuse"], check=True)
    yield
    subprocess.run(["umount", "/dev/fuse"], check=True)
    device.unlink()


def test_without_root_and_device_it_says_so(shell: Shell, closed_device: None) -> None:
    ended = as_nobody(shell, "true")
    assert ended.code == 1
    assert "/dev/fuse cannot be opened (Permission denied): run it as root" in ended.err


@pytest.fixture
def closed_device(tmp_path: Path) -> Iterator[None]:
    device = tmp_path / "fuse"
    os.mknod(device, 0o020600, os.makedev(10, 229))
    subprocess.run(["mount", "--bind", str(device), "/dev/fuse"], check=True)
    yield
    subprocess.run(["umount", "/dev/fuse"], check=True)
    device.unlink()


def test_without_root_in_a_user_namespace(shell: Shell, open_device: None, scratch: Path) -> None:
    (scratch / "orders").touch()
    (scratch / "orders").chmod(0o666)
    ended = as_nobody(shell, "bash", "-c", "id -u; ps -e -o pid=,args=; kill 4194310")
    assert ended.err.strip().endswith("Operation not permitted")
    uid, *lines = ended.out.splitlines()
    assert uid == "65534"
    assert set(ALL) <= {int(line.split()[0]) for line in lines}
