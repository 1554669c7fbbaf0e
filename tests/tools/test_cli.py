"""Every command of the table, given what nobody should give it: one sentence, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.tools.conftest import Pretended, reply

from tabane import __version__
from tabane.tools.cli import COMMANDS, run
from tabane.tools.cli.common import NAME, Parser

NO_CLUSTER_NEEDED = {"up", "node", "demo"}
APP_FILE = 'name = "hello"\nimage = "host"\ncommand = ["true"]\n'
MINIMAL = {"deploy": ["APP_FILE"], "scale": ["x", "--min", "1"], "exec": ["x", "ls"]}
"""The shortest right command line, where it is not `x` for each argument that must be there."""
EVIL = "\x1b[2J\x9b31m\u202e\r\nx"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def tabane(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command on the cluster below `tmp_path`; what it says is safe to be shown."""

    def run_command(*argv: str) -> Ended:
        code = run(["--root", str(tmp_path), *argv])
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).split("\n"))
        return Ended(code, out, err)

    return run_command


def check_refusal(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.startswith("tabane: ") and ended.err.endswith("\n")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def parser_of(name: str) -> argparse.ArgumentParser:
    """What a command would parse with."""

    class Found(Exception):
        pass

    def stop_here(self: Parser, *_: Any, **__: Any) -> Any:
        raise Found(self)

    module = import_module(f"tabane.tools.cli.{COMMANDS[name][0]}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as caught:
        patch.setattr(Parser, "parse_args", stop_here)
        getattr(module, name)([])
    found: argparse.ArgumentParser = caught.value.args[0]
    return found


def arguments(name: str) -> list[argparse.Action]:
    """The positional ones that must be there."""
    return [a for a in parser_of(name)._actions if not a.option_strings and a.required]


def options(name: str) -> list[argparse.Action]:
    """Those that take a value."""
    return [a for a in parser_of(name)._actions if a.option_strings and a.nargs is None]


def right_line(name: str, tmp_path: Path) -> list[str]:
    file = tmp_path / "hello.toml"
    file.write_text(APP_FILE)
    words = MINIMAL.get(name, ["x" for _ in arguments(name)])
    return [str(file) if word == "APP_FILE" else word for word in words]


every_command = pytest.mark.parametrize("name", COMMANDS)
every_question = pytest.mark.parametrize("name", sorted(set(COMMANDS) - NO_CLUSTER_NEEDED))


@every_command
def test_help(name: str, tabane: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended = tabane(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: tabane {name} ")
    assert max(map(len, ended.out.splitlines())) <= 100
    for action in parser_of(name)._actions:
        assert all(option in ended.out for option in action.option_strings)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_command(argv: list[str], tabane: Run) -> None:
    ended = tabane(*argv)
    assert (ended.code, ended.err) == (0, "")
    assert set(COMMANDS) <= set(ended.out.split())
    assert max(map(len, ended.out.splitlines())) <= 100


def test_the_version(tabane: Run) -> None:
    assert tabane("--version") == (0, f"tabane {__version__}\n", "")


@pytest.mark.parametrize("name", ["pss", "PS", "-x", "--bogus", "", "ps ps", "../ps", EVIL])
def test_unknown_commands(name: str, tabane: Run) -> None:
    check_refusal(tabane(name), 2, "there is no command")


def test_a_near_miss_is_corrected(tabane: Run) -> None:
    check_refusal(tabane("deplyo"), 2, "did you mean 'deploy'?")


def test_root_without_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--root"]) == 2
    assert capsys.readouterr().err == "tabane: --root: name the cluster's directory after it\n"


@every_question
def test_root_may_stand_before_and_after_the_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, root = right_line(name, tmp_path), f"{tmp_path}/nowhere"
    for argv in (
        ["--root", root, name, *line],
        [f"--root={root}", name, *line],
        [name, "--root", root, *line],
    ):
        assert run(argv) == 2
        assert f"no cluster below {root}" in capsys.readouterr().err


@every_command
@pytest.mark.parametrize("option", ["--bogus", "-Z", f"--{EVIL}"])
def test_unknown_options(name: str, option: str, tabane: Run, tmp_path: Path) -> None:
    check_refusal(tabane(name, option, *right_line(name, tmp_path)), 2, name)


@every_command
def test_missing_and_superfluous_arguments(name: str, tabane: Run, tmp_path: Path) -> None:
    if arguments(name):
        check_refusal(tabane(name), 2, f"{name}: ")
    if all(a.nargs != argparse.REMAINDER for a in parser_of(name)._actions):
        check_refusal(tabane(name, "x", "y", "z"), 2, f"{name}: ")


@every_command
def test_options_without_their_value(name: str, tabane: Run) -> None:
    for action in options(name):
        check_refusal(tabane(name, action.option_strings[-1]), 2, "expected one argument")


@every_command
@pytest.mark.parametrize("value", ["x", "", "1.5x", "0x1", "9" * 5000, EVIL])
def test_values_of_the_wrong_type(name: str, value: str, tabane: Run, tmp_path: Path) -> None:
    for action in options(name):
        if action.type not in (None, Path):
            option = action.option_strings[-1]
            ended = tabane(name, f"{option}={value}", *right_line(name, tmp_path))
            check_refusal(ended, 2, f"{name}: argument ", option)


@every_question
def test_no_cluster_there(name: str, tabane: Run, tmp_path: Path) -> None:
    check_refusal(tabane(name, *right_line(name, tmp_path)), 2, "no cluster below", "tabane up")


@every_question
def test_a_root_that_is_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = right_line(name, tmp_path)
    code = run(["--root", f"{tmp_path}/hello.toml" if line else __file__, name, *line])
    check_refusal(Ended(code, *capsys.readouterr()), 2, "no cluster below")


@every_question
def test_a_cluster_file_that_cannot_be_read(name: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").mkdir()
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, 1, "cluster.json: Is a directory")


@every_question
def test_a_cluster_file_that_is_damaged(name: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"nodes":')
    check_refusal(tabane(name, *right_line(name, tmp_path)), 1, "does not describe a cluster")


every_node_question = pytest.mark.parametrize(
    "name", sorted(set(COMMANDS) - NO_CLUSTER_NEEDED - {"down"})
)


@every_node_question
def test_a_cluster_that_is_down(
    name: str, tabane: Run, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.begin(tokyo=b"", osaka=b"")
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, 1, "tokyo/tokyo-1", "osaka/osaka-1")


@every_node_question
@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (404, {"error": "not_found", "message": f"no such {EVIL}"}, 2, "no such"),
        (403, {"error": "denied", "message": "not you"}, 2, "not you"),
        (503, {"error": "unreachable", "message": "no control"}, 1, "no control"),
        (500, b"Internal Server Error", 1, "500"),
        (200, b"<html>", 1, "not JSON"),
    ],
)
def test_what_a_node_refuses(
    name: str,
    status: int,
    body: object,
    code: int,
    words: str,
    tabane: Run,
    tmp_path: Path,
    pretended: Pretended,
) -> None:
    pretended.begin(tokyo=reply(body, status))
    check_refusal(tabane(name, *right_line(name, tmp_path)), code, words)


@every_question
def test_every_question_has_json(name: str) -> None:
    has = {option for action in parser_of(name)._actions for option in action.option_strings}
    assert "--json" in has or name == "down"


@pytest.mark.parametrize(
    "what", ["", "a b", "A", "../x", "x/y/z", "/x", "x/", "-x", "a?b", "a%2fb", "a" * 64, EVIL]
)
@pytest.mark.parametrize(
    "line",
    [
        ["show"],
        ["rm"],
        ["scale", "--min=1"],
        ["wakes"],
        ["ps", "--app"],
        ["stop"],
        ["logs"],
        ["exec"],
    ],
    ids=lambda line: line[0],
)
def test_what_no_app_can_be_called(
    line: list[str], what: str, tabane: Run, pretended: Pretended
) -> None:
    """Nothing like it gets into a request."""
    pretended.begin(tokyo=reply({"instances": [], "processes": [], "silent": []}))
    argv = [*line[:-1], f"{line[-1]}={what}"] if line[0] == "ps" else [*line, "--", what]
    ended = tabane(*argv, *(["ls"] if line[0] == "exec" else []))
    check_refusal(ended, 2)
    assert all(
        question.split()[1] == "/api/v1/ps" for question, _ in pretended.nodes["tokyo"].asked
    )


@pytest.mark.parametrize("name", ["stop", "logs", "exec"])
def test_an_instance_that_is_nowhere(name: str, tabane: Run, pretended: Pretended) -> None:
    empty = {"instances": [], "records": [], "silent": []}
    pretended.begin(tokyo=reply(empty))
    line = ["x", "ls"] if name == "exec" else ["x"]
    check_refusal(tabane(name, *line), 2, "no instance is called x")
    pretended.nodes["tokyo"].answer = reply(empty | {"silent": ["osaka/osaka-1"]})
    check_refusal(tabane(name, *line), 1, "osaka/osaka-1 did not")


def test_a_node_that_is_not_there(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=reply({}))
    check_refusal(tabane("doctor", "--node", EVIL), 2, "there is no node", "only tokyo/tokyo-1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["up", "--nodes", "0"], "nodes: want 1 to 250"),
        (["up", "--datacenters", ""], "datacenters: "),
        (["up", "--datacenters", "a,a"], "datacenters: each name once"),
        (["up", "--datacenters", EVIL], "datacenters: "),
        (["up", "--gateways", "0"], "gateways: want 1 or more"),
        (["node", "/nowhere"], "there is no file /nowhere"),
        (["node", "/"], "there is no file /"),
        (["logs", "x", "-n", "0"], "'0' is not a whole number from 1"),
        (["events", "-n", "-1"], "-n/--limit"),
        (["wakes", "-n", "9999999"], "from 1 to 1000000"),
        (["scale", "x"], "give --min, --max, or both"),
        (["scale", "x", "--max", "0"], "from 1"),
        (["exec", "x"], "name the command"),
        (["exec", "x", "--"], "name the command"),
        (["exec", "x", "--timeout", "5", "--", "ls"], "options go before the instance"),
        (["exec", "--timeout", "nan", "x", "ls"], "'nan' is not a number of seconds"),
        (["exec", "--timeout", "inf", "x", "ls"], "up to 3600"),
        (["ps", "auxx!"], "write aux, -ef, or nothing"),
    ],
)
def test_wrong_values(line: list[str], words: str, tabane: Run) -> None:
    check_refusal(tabane(*line), 2, words)


# App files


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('name = "x', "1", "this is not TOML"),
        (APP_FILE + "prot = 80", "4: prot", "did you mean port? (allowed here: name"),
        (APP_FILE + 'port = "80"', "4: port", "'80' is not a whole number from 1 to 65535"),
        (APP_FILE + "[reactive]\nmin = 3\nmax = 2", "5: reactive.min", "lower it or raise max"),
        (APP_FILE + "[resources]\nmemory = 1", "5: resources.memory", "from 1MiB"),
        (APP_FILE + 'class = "pod"', "4: class", "none of container, sandbox"),
        (APP_FILE + f"{json.dumps(EVIL)} = 1", "", "there is no such field"),
        ('image = "host"', " name", "is missing"),
        (APP_FILE.replace("host", "docker://x"), "2: image", "use rootfs:DIR"),
        (APP_FILE.replace("host", "ftp:x"), "2: image", "none of rootfs:DIR, oci:DIR"),
        ("x = " + "[" * 100_000, "", "nested too deeply"),
        ("#" * (1 << 20) + "#", "", "longer than an app file may be"),
        ("\0", "1", "this is not TOML"),
    ],
)
def test_app_files_with_mistakes(
    text: str, where: str, words: str, tabane: Run, tmp_path: Path
) -> None:
    file = tmp_path / "app.toml"
    file.write_text(text)
    place = f"{file}:{where}: " if where else str(file)
    check_refusal(tabane("deploy", str(file)), 2, f"tabane: {place}", words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere.toml", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("file/app.toml", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("latin-1", "latin-1:2: is not UTF-8 text: save it as UTF-8"),
        ("/dev/zero", "is longer than an app file may be"),
    ],
)
def test_app_files_that_cannot_be_read(file: str, words: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin-1").write_bytes(b'# one\nname = "caf\xe9"\n')
    check_refusal(tabane("deploy", str(tmp_path / file)), 2, words)


@pytest.mark.parametrize(
    ("source", "code"),
    [("rootfs:nowhere", 2), ("rootfs:file", 2), ("oci:file", 1), ("archive:file", 1)],
)
def test_images_that_are_none(
    source: str, code: int, tabane: Run, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.begin(tokyo=reply({}))
    (tmp_path / "file").write_text("no image")
    file = tmp_path / "app.toml"
    file.write_text(APP_FILE.replace("host", source))
    check_refusal(tabane("deploy", str(file)), code, source.partition(":")[2])
    assert pretended.nodes["tokyo"].asked == []


# What the cluster says, as people and programs read it


APP = {
    "namespace": "default",
    "name": "hello",
    "class": "container",
    "image": EVIL,
    "command": [EVIL],
    "hosts": [EVIL],
    "port": 80,
    "revision": 1,
    "ready": 0,
    "instances": 1,
    "reactive": {"min": 0, "max": 1},
    "known": [EVIL],
    "unreachable": [],
}
INSTANCE = {
    "id": "abc123",
    "app": "default/hello",
    "node": "tokyo/tokyo-1",
    "state": "ready",
    "revision": 1,
    "driver": EVIL,
    "address": EVIL,
    "created_at": 0.0,
    "reason": EVIL,
}
EVENT = {"at": 0.0, "instance": "abc123", "app": "default/hello", "state": "failed", "reason": EVIL}
EVENT |= {"node": "tokyo/tokyo-1"}
WAKE = EVENT | {"option": EVIL, "total_us": 5, "phases_us": {}, "outcome": EVIL, "gateway": EVIL}
HOME = {"home": EVIL, "waiting": 0, "reason": EVIL, "failures": 1, "trouble": EVIL}
DRIVER = {"driver": EVIL, "class": EVIL, "works": False, "reason": EVIL}
DRIVER |= {"defaults": [{"default": EVIL, "enforced": True, "how": EVIL}]}
MEMBER = {"node": EVIL, "address": EVIL, "asked": False, "linked": True, "control": True}
MEMBER |= {"drivers": [EVIL], "instances": 3}
ANSWERS: dict[str, Any] = {
    "GET /api/v1/apps": {"apps": [APP], "silent": []},
    "POST /api/v1/apps": APP,
    "POST /api/v1/apps/default/hello/scale": APP,
    "DELETE /api/v1/apps/default/hello": {"name": EVIL, "known": [EVIL], "unreachable": []},
    "GET /api/v1/apps/default/hello": {
        "app": APP,
        "instances": [INSTANCE],
        "homes": [HOME],
        "events": [EVENT],
        "wakes": [WAKE],
        "silent": [],
    },
    "GET /api/v1/instances": {"instances": [INSTANCE], "silent": []},
    "POST /api/v1/instances/abc123/stop": {"instance": "abc123", "state": "draining"},
    "GET /api/v1/events": {"records": [EVENT], "silent": []},
    "GET /api/v1/wakes": {"records": [WAKE], "silent": []},
    "GET /api/v1/members": {"members": [MEMBER]},
    "GET /api/v1/doctor": {"node": EVIL, "drivers": [DRIVER]},
    "POST /api/v1/instances/abc123/exec": {"code": 7, "stdout": "G1syShs=", "stderr": "/w=="},
    "GET /api/v1/instances/abc123/log": b"2026-01-31T23:59:59.1Z stdout F \x1b[2J\xff\n",
    "GET /api/v1/ps": {"processes": [], "silent": []},
}
LINES = [
    ["deploy", "APP_FILE"],
    ["apps"],
    ["show", "hello"],
    ["rm", "hello"],
    ["scale", "hello", "--max", "1"],
    ["wakes"],
    ["wakes", "hello"],
    ["events"],
    ["stop", "hello"],
    ["members"],
    ["doctor"],
]


def answer(line: str, body: bytes) -> bytes:
    method, target = line.split()[:2]
    return reply(ANSWERS[f"{method} {target.partition('?')[0]}"])


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_nothing_that_moves_the_cursor_is_shown(
    line: list[str], tabane: Run, pretended: Pretended, tmp_path: Path
) -> None:
    """`tabane` checks each line; here: that it was shown at all, and that JSON is whole."""
    right_line("deploy", tmp_path)
    words = [str(tmp_path / "hello.toml") if word == "APP_FILE" else word for word in line]
    pretended.begin(tokyo=answer)
    for shown in (tabane(*words), tabane(*words, "--json")):
        assert (shown.code, shown.err) == (0, "")
        assert line[0] in ("stop", "scale") or "\\x1b[2J" in shown.out or "\\u001b[2J" in shown.out
    json.loads(shown.out)
    assert shown.out.isascii()


@pytest.mark.parametrize("line", LINES[:5], ids=" ".join)
def test_who_did_not_answer_is_told_with_and_without_json(
    line: list[str], tabane: Run, pretended: Pretended, tmp_path: Path
) -> None:
    right_line("deploy", tmp_path)
    words = [str(tmp_path / "hello.toml") if word == "APP_FILE" else word for word in line]

    def answer_alone(line: str, body: bytes) -> bytes:
        whole = json.loads(answer(line, body).partition(b"\r\n\r\n")[2])
        return reply(whole | {"silent": [EVIL], "unreachable": [EVIL]})

    pretended.begin(tokyo=answer_alone)
    for shown in (tabane(*words), tabane(*words, "--json")):
        assert shown.code == 1
        assert shown.out
        assert shown.err.startswith("tabane: no answer from \\x1b[2J")


def test_wakes_of_an_app_that_is_not_there(tabane: Run, pretended: Pretended) -> None:
    def nobody(line: str, body: bytes) -> bytes:
        missing = reply({"error": "not_found", "message": "there is no app default/x"}, 404)
        return missing if "/apps/" in line else answer(line, body)

    pretended.begin(tokyo=nobody)
    check_refusal(tabane("wakes", "x"), 2, "there is no app default/x")


def test_stop_goes_on_when_one_instance_is_gone(tabane: Run, pretended: Pretended) -> None:
    def one_is_gone(line: str, body: bytes) -> bytes:
        if "/gone/" in line:
            return reply({"error": "not_found", "message": "gone is not here"}, 404)
        if "/instances HTTP" in line:
            return reply({"instances": [INSTANCE | {"id": "gone"}, INSTANCE], "silent": []})
        return answer(line, body)

    pretended.begin(tokyo=one_is_gone)
    ended = tabane("stop", "hello")
    assert ended.code == 1
    assert ended.out == "abc123 on tokyo/tokyo-1 is told to stop\n"
    assert ended.err == "tabane: gone is not here\n"


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        (["ls", "-l", "--all"], ["ls", "-l", "--all"]),
        (["--", "ls", "--json"], ["ls", "--json"]),
        (["sh", "-c", "x", "--", "y"], ["sh", "-c", "x", "--", "y"]),
        (["--", "git", "log", "--", "file"], ["git", "log", "--", "file"]),
        (["echo", ""], ["echo", ""]),
    ],
)
@pytest.mark.parametrize("before", [[], ["--timeout", "5"]])
def test_exec_passes_flags_on(
    before: list[str], line: list[str], argv: list[str], pretended: Pretended, capfdbinary: Any
) -> None:
    pretended.begin(tokyo=answer)
    assert run(["exec", "--root", str(pretended.root), *before, "hello", *line]) == 7
    body = json.loads(pretended.nodes["tokyo"].asked[-1][1])
    assert body == {"argv": argv, "timeout_s": 5.0 if before else 60.0}


def test_exec_and_logs_pass_bytes_on_as_they_are(pretended: Pretended, capfdbinary: Any) -> None:
    pretended.begin(tokyo=answer)
    root = ["--root", str(pretended.root)]
    assert run([*root, "exec", "hello", "ls"]) == 7
    assert capfdbinary.readouterr() == (b"\x1b[2J\x1b", b"\xff")
    assert run([*root, "logs", "hello"]) == 0
    assert capfdbinary.readouterr() == (b"\x1b[2J\xff\n", b"")
    assert run([*root, "logs", "-t", "-n", "5", "hello"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"2026-01-31T23:59:59.1Z \x1b")
    assert "tail=5&follow=false" in pretended.nodes["tokyo"].asked[-1][0]


def test_exec_and_logs_escape_them_in_json(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer)
    ended = tabane("exec", "--json", "hello", "ls")
    assert ended.code == 7
    assert json.loads(ended.out) == {"code": 7, "stdout": "\x1b[2J\x1b", "stderr": "\\xff"}
    line = {"at": "2026-01-31T23:59:59.1Z", "stream": "stdout", "text": "\x1b[2J\\xff"}
    shown = tabane("logs", "--json", "hello")
    assert json.loads(shown.out) == line | {"whole": True}


def test_instance_ids_and_app_names_have_one_form() -> None:
    from tabane.model import new_instance_id

    assert NAME.fullmatch(new_instance_id())
    assert NAME.fullmatch("shop/hello-1")


# As programs


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tabane.tools.cli", *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


PS = {"processes": [], "silent": []}
FULL_DISK = [["--help"], ["ps", "--help"], ["ps"], ["ps", "--json"], ["apps"], ["events"]]


@pytest.mark.parametrize("line", FULL_DISK, ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written(
    line: list[str], unbuffered: str, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer)
    environment = os.environ | {"TABANE_ROOT": str(pretended.root), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full, start(*line, stdout=full, env=environment) as done:
        _, err = done.communicate(timeout=30)
    assert err == b"tabane: cannot write: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("line", FULL_DISK, ids=" ".join)
def test_a_reader_that_goes_away(line: list[str], pretended: Pretended) -> None:
    pretended.begin(tokyo=answer)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with start("--root", str(pretended.root), *line, stdout=writer) as done:
            assert done.communicate(timeout=30) == (None, b"")
    finally:
        os.close(writer)
    assert done.returncode == 1


def test_closed_streams(pretended: Pretended) -> None:
    pretended.begin(tokyo=answer)
    script = 'exec "$0" -m tabane.tools.cli --root "$1" apps >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable, str(pretended.root)], timeout=30)
    assert done.returncode == 0


def test_a_terminal_without_unicode(pretended: Pretended) -> None:
    known = {"apps": [APP | {"hosts": ["束ね"]}], "silent": []}
    pretended.begin(tokyo=reply(known))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = ["--root", str(pretended.root), "apps"]
    with start(*argv, stdout=subprocess.PIPE, env=environment) as done:
        out, err = done.communicate(timeout=30)
    assert (done.returncode, err) == (0, b"")
    assert b"\\u675f\\u306d" in out


@pytest.mark.parametrize("line", [["events", "-f"], ["logs", "-f", "hello"], ["ps"]])
def test_ctrl_c(line: list[str], pretended: Pretended) -> None:
    """Sent when the node has the question and does not answer it."""
    pretended.begin(tokyo=answer)
    node = pretended.nodes["tokyo"]
    asked, written = os.pipe()

    def hang(question: str, body: bytes) -> bytes:
        if "follow=true" not in question and "/ps" not in question:
            return answer(question, body)
        os.write(written, b"!")
        node.over.wait()
        return b""

    node.answer = hang
    with start("--root", str(pretended.root), *line, stdout=subprocess.PIPE) as child:
        os.read(asked, 1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    os.close(asked)
    os.close(written)
    assert (child.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("module", "program", "lines"),
    [
        (
            "tabane.k2i.cli",
            "k2i",
            [["--bogus"], ["x"], ["--port"], ["--port", "x"], ["--port", "-1"], ["--host", "::"]],
        ),
        (
            "tabane.middlecon.cli",
            "middlecon",
            [
                ["bogus"],
                ["--bogus"],
                ["say"],
                ["join", "r", "--hub"],
                ["ask", "r", "t", "--timeout", "x"],
            ],
        ),
    ],
)
def test_the_other_programs(module: str, program: str, lines: list[list[str]]) -> None:
    main = f"import sys; from {module} import main; sys.argv[0] = {program!r}; sys.exit(main())"
    for line in lines:
        command = [sys.executable, "-c", main, *line]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{program}: ")
        assert done.stderr.count("\n") == 1
    command = [sys.executable, "-c", main, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {program} ")
