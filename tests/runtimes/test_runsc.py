"""What runsc is given and what it says; and how a command inside it is brought to its end."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import EngineError, NotFound
from tabane.model import App, GuestProcess, Resources, SecurityPolicy
from tabane.runtimes.oci import parse_log
from tabane.runtimes.runsc import formats
from tabane.runtimes.runsc import inside as inside_sandbox
from tabane.runtimes.runsc.driver import read_file_server, within
from tabane.runtimes.runsc.engine import covering, joining
from tabane.runtimes.runsc.inside import Sandbox, below
from tabane.runtimes.wishes import refusal

TABLE = """\
UID       PID       PPID      C         TTY       STIME     TIME      CMD
0         1         0         0         ?         00:14     0s        init
33        2         1         12        pts/0     Nov25     1m2.5s    python3
0         17        2         0         ?         2025      40ms      a name
"""
CONFIG = {
    "process": {"args": ["true"], "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]},
    "mounts": [
        {"destination": path, "type": kind, "source": kind, "options": []}
        for path, kind in (("/proc", "proc"), ("/dev", "bind"), ("/dev/pts", "devpts"))
    ]
    + [{"destination": "/usr", "type": "bind", "source": "/usr", "options": ["bind", "ro"]}],
    "linux": {
        "namespaces": [{"type": kind} for kind in ("user", "network", "pid", "cgroup")],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "maskedPaths": ["/proc/kcore"],
        "resources": {"pids": {"limit": 9}},
        "cgroupsPath": "/t/i",
    },
}
APP = App("app", "image", resources=Resources(pids=9, disk_bytes=4096))


def test_the_table_of_processes() -> None:
    first, second, third = formats.parse_processes(TABLE)
    assert first == GuestProcess("sandbox", 1, "init", command="init")
    assert (second.uid, second.pid, second.ppid, second.tty) == (33, 2, 1, "pts/0")
    assert (second.name, second.cpu_s) == ("python3", 62.5)
    assert (third.name, third.cpu_s) == ("a name", 0.04)


@pytest.mark.parametrize("text", ["", "[1,2]", "PID CMD\n1 x\n", "warning\n" + TABLE])
def test_other_words_are_no_table(text: str) -> None:
    with pytest.raises(EngineError, match="runsc ps gave no table"):
        formats.parse_processes(text)


@pytest.mark.parametrize("line", ["0 1", "0 x 0 0 ? 00:14 0s init", "root 1 0 0 ? 00:14 0s init"])
def test_a_broken_line_is_an_error(line: str) -> None:
    with pytest.raises(EngineError, match="runsc ps gave no table but"):
        formats.parse_processes(TABLE + line + "\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("1h2m3.5s", 3723.5), ("250µs", 0.00025), ("250us", 0.00025), ("7ns", 7e-9)],
)
def test_durations(text: str, seconds: float) -> None:
    assert formats.parse_duration(text) == pytest.approx(seconds)


def test_usage() -> None:
    data = {"pids": {"current": 3}, "memory": {"usage": {"usage": 4096}}}
    event = json.dumps({"type": "stats", "id": "x", "data": data})
    assert formats.parse_usage(event) == (3, 4096)


@pytest.mark.parametrize(
    "event", ["", "{}", "[]", '{"data": {}}', '{"data": {"pids": null}}', "no"]
)
def test_other_words_are_no_usage(event: str) -> None:
    with pytest.raises(EngineError, match="runsc events gave no statistics"):
        formats.parse_usage(event)


@given(st.text())
def test_any_text_is_a_table_usage_or_an_error(text: str) -> None:
    for parse in (formats.parse_processes, formats.parse_usage):
        with pytest.raises(EngineError):
            parse(text)
    assert formats.parse_duration(text) >= 0
    assert formats.parse_release(text) >= 0


@pytest.mark.parametrize(
    ("words", "release"),
    [
        ("runsc version 0.0~20240729.0", 20240729),
        ("runsc version release-20250120.0", 20250120),
        ("runsc version VERSION_MISSING", 0),
        ("", 0),
    ],
)
def test_releases(words: str, release: int) -> None:
    assert formats.parse_release(words) == release


def test_the_configuration_of_a_sandbox() -> None:
    """What its kernel makes is left to it; what the node's kernel would do is left out."""
    config = json.loads(formats.for_sandbox(json.dumps(CONFIG).encode(), APP, own_tmp="/i/tmp"))
    mounts = {mount["destination"]: mount for mount in config["mounts"]}
    assert list(mounts) == ["/tmp", "/usr", "/dev/shm"], "what is below /tmp is mounted after it"
    assert (mounts["/tmp"]["type"], mounts["/tmp"]["source"]) == ("bind", "/i/tmp")
    assert "size=4096" in mounts["/dev/shm"]["options"]
    assert config["linux"] == {"namespaces": [{"type": "network"}, {"type": "pid"}]}
    assert config["process"]["rlimits"][1:] == [{"type": "RLIMIT_NPROC", "soft": 9, "hard": 9}]
    bare = json.loads(formats.for_sandbox(json.dumps(CONFIG).encode(), APP, own_tmp=""))
    assert [mount["destination"] for mount in bare["mounts"]] == ["/usr", "/dev/shm"]


def test_capabilities_that_undo_a_limit_are_refused() -> None:
    for lax in ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE"):
        app = App("app", "image", security=SecurityPolicy(capabilities=("CAP_CHOWN", lax)))
        assert f"the number of processes in a sandbox with {lax}" in refusal(app, formats.REFUSES)
    harmless = App("app", "image", security=SecurityPolicy(capabilities=("CAP_NET_RAW",)))
    assert not refusal(harmless, formats.REFUSES)


def test_command_lines() -> None:
    assert joining(7, ("runsc", "ps")) == (
        *("nsenter", "--user", "--target", "7", "-S", "0", "-G", "0", "--"),
        *("runsc", "ps"),
    )
    argv = covering(Path("/i"), ("runsc", "run"))
    assert argv[:5] == ("unshare", "--mount", "--propagation", "slave", "--")
    assert argv[-4:] == ("sh", "/i/meminfo", "runsc", "run")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", []),
        ('{"msg":"one"}{"msg":"two"}', ["one", "two"]),
        ('{"msg":"one"}\n{"msg":"two"}\n', ["one", "two"]),
        ('{"msg":"one"}{"msg":"tw', ["one"]),
        ("no json", []),
    ],
)
def test_logs_of_engines(text: str, messages: list[str]) -> None:
    assert [entry["msg"] for entry in parse_log(text)] == messages


def test_where_the_file_server_is_named(tmp_path: Path) -> None:
    assert read_file_server(tmp_path, "x") == 0
    (tmp_path / "s1-x_sandbox:x.state").write_text('{"goferPid": 14}')
    state = tmp_path / "x_sandbox:x.state"
    state.write_text('{"id": "x", "goferPid": 12, "sandbox": {"pid": 13}}')
    assert read_file_server(tmp_path, "x") == 12
    for text in ("", "{}", '{"goferPid": null}'):
        state.write_text(text)
        with pytest.raises(EngineError, match="does not name the file server"):
            read_file_server(tmp_path, "x")


def test_what_lies_in_the_memory_of_its_kernel(tmp_path: Path) -> None:
    """Links count, wherever they stand; names that only begin alike do not."""
    mounts = ["/proc", "/dev", "/tmp"]
    for name in ("srv", "run", "devices", "dev"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/shm").symlink_to("/dev/shm")
    (tmp_path / "up").symlink_to("run/../../dev")
    for path in ("/dev", "/dev/", "/dev/null", "/run/shm/x", "/up/null", "/srv/../dev", "/tmp/x"):
        assert within(tmp_path, path, mounts) in ("/dev", "/tmp"), path
    for path in ("/", "/srv", "/srv/new", "/devices/x", "/nowhere/x", "/new"):
        assert within(tmp_path, path, mounts) is None, path


def process(pid: int, ppid: int) -> GuestProcess:
    return GuestProcess("sandbox", pid, "x", ppid=ppid)


def test_what_came_of_a_process() -> None:
    table = [process(*pair) for pair in ((1, 0), (9, 12), (5, 1), (12, 5), (7, 1), (13, 7))]
    assert below(table, {5}) == [5, 9, 12]
    assert below(table, {7, 12}) == [7, 9, 12, 13]
    assert below(table, {99}) == []


class Inside:
    """Processes of which some are deaf to HUP, and a log of what they were sent."""

    def __init__(
        self, table: Sequence[tuple[int, int]], deaf: frozenset[int] = frozenset()
    ) -> None:
        self.table = dict(table)
        self.deaf = deaf
        self.sent: list[tuple[int, int]] = []
        self.silent = False
        self.sandbox = Sandbox(self.processes, self.kill)

    async def processes(self) -> Sequence[GuestProcess]:
        if self.silent:
            raise EngineError("it does not answer")
        return [process(*pair) for pair in self.table.items()]

    async def kill(self, pid: int, number: int) -> None:
        self.sent.append((pid, number))
        if pid not in self.table:
            raise NotFound("no such process")
        if number == signal.SIGKILL or (number == signal.SIGHUP and pid not in self.deaf):
            del self.table[pid]
            self.table |= {child: 1 for child, parent in self.table.items() if parent == pid}


async def test_a_command_is_hung_up_on() -> None:
    inside = Inside([(1, 0), (5, 1), (6, 5), (8, 1)])
    await inside.sandbox.end(5)
    assert inside.table == {1: 0, 8: 1}
    assert [number for _, number in inside.sent] == [signal.SIGHUP, signal.SIGCONT] * 2


async def test_the_deaf_are_killed_also_when_their_parent_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inside_sandbox, "HANGUP_S", 0.0)
    inside = Inside([(1, 0), (5, 1), (6, 5), (7, 6), (8, 1)], deaf=frozenset({6, 7}))
    await inside.sandbox.end(5)
    assert inside.table == {1: 0, 8: 1}
    assert inside.sent[-1][1] == signal.SIGKILL


async def test_a_sandbox_that_is_silent_is_told_to_kill() -> None:
    inside = Inside([(1, 0), (5, 1)])
    inside.silent = True
    await inside.sandbox.end(5)
    assert inside.sent == [(5, signal.SIGKILL)]


async def test_one_that_has_ended_is_signalled_in_vain() -> None:
    inside = Inside([(1, 0)])
    await inside.sandbox.signal(5, signal.SIGTERM)
    await inside.sandbox.end(5)
    assert inside.table == {1: 0}
