"""Every command of the table, given what nobody should give it: one sentence, never a traceback."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conftest import (
    APP_FILE,
    EVIL,
    Ended,
    Pretended,
    Run,
    check_refusal,
    failing,
    reply,
)

from tabane import __version__
from tabane.tools.cli import COMMANDS, MEANT, run
from tabane.tools.cli.common import Parser

NO_CLUSTER_NEEDED = {"up", "node", "demo", "doctor", "completion"}
MINIMAL = {"deploy": ["APP_FILE"], "scale": ["x", "--min", "1"], "exec": ["x", "ls"]}
MINIMAL |= {"cp": ["x:/etc", "/tmp/x"]}
MINIMAL |= {
    "pgrep": ["x"],
    "pidof": ["x"],
    "pkill": ["x"],
    "kill": ["x"],
    "renice": ["5", "x"],
    "nice": ["x", "ls"],
    "image": ["ls"],
    "checkpoint": ["ls"],
    "volume": ["ls"],
    "trigger": ["ls"],
}
"""The shortest right command line, where it is not `x` for each argument that must be there."""


NO_OPTION = dict.fromkeys(("kill", "pkill"), " option ")
"""Where it might have been a signal."""


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
    found = [a for a in parser_of(name)._actions if not a.option_strings and a.required]
    return [a for a in found if a.nargs != "*"]  # which argparse takes for required, too


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


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(name: str, option: str, tabane: Run) -> None:
    assert tabane(*name.split(), option) == (0, f"tabane {__version__}\n", "")


@pytest.mark.parametrize("name", ["pss", "PS", "-x", "--bogus", "", "ps ps", "../ps", EVIL])
def test_unknown_commands(name: str, tabane: Run) -> None:
    check_refusal(tabane(name), 2, "there is no command")


def test_a_near_miss_is_corrected(tabane: Run) -> None:
    check_refusal(tabane("deplyo"), 2, "did you mean 'deploy'?")
    check_refusal(tabane("pull"), 2, "did you mean 'image pull'?")
    assert not MEANT.keys() & COMMANDS
    assert {meant.split()[0] for meant in MEANT.values()} <= COMMANDS.keys()


@pytest.mark.parametrize("name", ["top", "htop"])
def test_what_the_shell_has_is_named(name: str, tabane: Run) -> None:
    check_refusal(tabane(name), 2, f"there is no command '{name}': `tabane shell -c {name}` is")


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
        assert run(argv) == failing(name, 1)
        assert f"{name}: no cluster below {root}" in capsys.readouterr().err


@every_command
@pytest.mark.parametrize("option", ["--bogus", "-Z", f"--{EVIL}"])
def test_unknown_options(name: str, option: str, tabane: Run, tmp_path: Path) -> None:
    line = right_line(name, tmp_path)
    check_refusal(
        tabane(name, option, *line),
        failing(name, 2),
        f"{name}: ",
        NO_OPTION.get(name, "there is no option "),
    )


@every_command
def test_missing_and_superfluous_arguments(name: str, tabane: Run, tmp_path: Path) -> None:
    if arguments(name):
        check_refusal(tabane(name), failing(name, 2), f"{name}: something is missing: write ")
    takes_any = (argparse.REMAINDER, "*", "+")
    if all(a.option_strings or a.nargs not in takes_any for a in parser_of(name)._actions):
        check_refusal(tabane(name, "x", "y", "z"), failing(name, 2), f"{name}: ")


@every_command
def test_options_without_their_value(name: str, tabane: Run) -> None:
    for action in options(name):
        option = action.option_strings[-1]
        ended = tabane(name, option)
        check_refusal(ended, failing(name, 2), f"{option} needs a value after it")


@every_command
@pytest.mark.parametrize("value", ["x", "", "1.5x", "0x1", "9" * 5000, EVIL])
def test_values_of_the_wrong_type(name: str, value: str, tabane: Run, tmp_path: Path) -> None:
    for action in options(name):
        if action.type not in (None, Path):
            option = action.option_strings[-1]
            ended = tabane(name, f"{option}={value}", *right_line(name, tmp_path))
            check_refusal(ended, failing(name, 2), f"{name}: -", f"{option}: ")


@every_question
def test_no_cluster_there(name: str, tabane: Run, tmp_path: Path) -> None:
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, failing(name, 1), "no cluster below", "tabane up")


@every_question
def test_a_root_that_is_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = right_line(name, tmp_path)
    code = run(["--root", f"{tmp_path}/hello.toml" if line else __file__, name, *line])
    check_refusal(Ended(code, *capsys.readouterr()), failing(name, 1), "no cluster below")


@every_question
def test_a_cluster_file_that_cannot_be_read(name: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").mkdir()
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, failing(name, 1), "cluster.json: Is a directory")


@every_question
def test_a_cluster_file_that_is_damaged(name: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"nodes":')
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, failing(name, 1), "does not describe a cluster")


every_node_question = pytest.mark.parametrize(
    "name", sorted(set(COMMANDS) - NO_CLUSTER_NEEDED - {"down"})
)


@every_node_question
def test_a_cluster_that_is_down(
    name: str, tabane: Run, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.begin(tokyo=b"", osaka=b"")
    ended = tabane(name, *right_line(name, tmp_path))
    check_refusal(ended, failing(name, 1), "tokyo/tokyo-1", "osaka/osaka-1")


@every_node_question
def test_a_cluster_that_was_stopped(
    name: str, tabane: Run, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.begin(tokyo=b"", osaka=b"")
    for file in tmp_path.glob("nodes/*/*/process.json"):
        file.unlink()
    said = f"the cluster below {tmp_path} is stopped: `tabane up` starts it"
    check_refusal(tabane(name, *right_line(name, tmp_path)), failing(name, 1), said)


@every_node_question
@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (404, {"error": "not_found", "message": f"no such {EVIL}"}, 1, "no such"),
        (403, {"error": "denied", "message": "not you"}, 1, "not you"),
        (400, {"error": "usage", "message": "limit: x is no number"}, 2, "limit: x"),
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
    check_refusal(tabane(name, *right_line(name, tmp_path)), failing(name, code), words)


@every_question
def test_every_question_has_json(name: str) -> None:
    has = {option for action in parser_of(name)._actions for option in action.option_strings}
    assert "--json" in has or name in ("down", "shell")


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
    pretended.begin(tokyo=reply({"instances": [], "silent": []}))
    argv = [*line[:-1], f"{line[-1]}={what}"] if line[0] == "ps" else [*line, "--", what]
    ended = tabane(*argv, *(["ls"] if line[0] == "exec" else []))
    check_refusal(ended, failing(line[0], 2))
    assert not pretended.nodes["tokyo"].asked


@pytest.mark.parametrize("name", ["logs", "exec", "cp"])
def test_an_instance_that_is_nowhere(name: str, tabane: Run, pretended: Pretended) -> None:
    empty = {"instances": [], "records": [], "silent": []}
    missing = reply({"error": "not_found", "message": "there is no app default/x"}, 404)
    pretended.begin(tokyo=lambda asked, _: missing if "/apps/" in asked else reply(empty))
    line = MINIMAL.get(name, ["x"])
    code = failing(name, 1)
    check_refusal(tabane(name, *line), code, f"{name}: no instance is called x")
    pretended.nodes["tokyo"].answer = reply(empty)
    check_refusal(tabane(name, *line), code, "the app x is at rest", "tabane scale x --min 1")
    pretended.nodes["tokyo"].answer = reply(empty | {"homes": [{"reason": "it is in a pause"}]})
    check_refusal(tabane(name, *line), code, "the app x has no instance: it is in a pause")
    pretended.nodes["tokyo"].answer = reply(empty | {"silent": ["osaka/osaka-1"]})
    check_refusal(tabane(name, *line), code, "osaka/osaka-1 did not")


def test_a_node_that_is_not_there(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=reply({}))
    check_refusal(tabane("doctor", "--node", EVIL), 1, "there is no node", "only tokyo/tokyo-1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["up", "--nodes", "0"], "nodes: want 1 to 250"),
        (["up", "--datacenters", ""], "datacenters: "),
        (["up", "--datacenters", "a,a"], "datacenters: each name once"),
        (["up", "--datacenters", EVIL], "datacenters: "),
        (["up", "--driver", "nope"], "driver: there is none named 'nope', only crun, runc"),
        (["demo", "--nodes", "0"], "nodes: want 1 to 250"),
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
        (["exec", "--timeout", "nan", "x", "ls"], "'nan' is no number of seconds"),
        (["exec", "--timeout", "inf", "x", "ls"], "up to 3600"),
        (["exec", "-it", "x", "ls"], "-t needs a terminal"),
        (["exec", "-e", "=x", "x", "ls"], "neither NAME=VALUE nor"),
        (["exec", "-e", "NOT_SET_HERE", "x", "ls"], "neither NAME=VALUE nor"),
        (["cp", "x", "y"], "one of the two is INSTANCE:PATH"),
        (["cp", "x:/a", "y:/b"], "one of the two is INSTANCE:PATH"),
        (["cp", "-", "x:/b"], "there is none"),
        (["ps", "auxx!"], "write aux, -ef, --app NAME, or nothing"),
        (["ps", "hello"], "nodes do not tell environments (an app is named by --app hello)"),
        (["shell", "ps", "aux"], "a command comes after -c: `tabane shell -c 'ps aux'`"),
    ],
)
def test_wrong_values(line: list[str], words: str, tabane: Run) -> None:
    check_refusal(tabane(*line), failing(line[0], 2), words)


@pytest.mark.parametrize("name", ["up", "down"])
def test_another_s_cluster(
    name: str, tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended.begin(tokyo=reply({}))
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    check_refusal(tabane(name), 1, "belongs to ", ": use sudo")
    assert not pretended.nodes["tokyo"].asked


def test_doctor_without_a_cluster(
    tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = {"driver": "runc", "class": "container", "works": False, "reason": "not installed"}
    driver |= {"emulated": False, "detail": "looked everywhere"}
    default = {"default": "seccomp", "enforced": True, "how": "by a list"}
    answer = {"node": "", "lacks": ["no nft"], "drivers": [driver | {"defaults": [default]}]}
    monkeypatch.setattr("tabane.tools.probing.probe_machine", lambda: answer)
    pretended.begin(tokyo=b"")
    ended = tabane("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(
        "this machine (no cluster runs)\na local cluster cannot run here: no"
    )
    heading, row, hint = ended.out.splitlines()[2:]
    assert heading.split() == ["DRIVER", "CLASS", "WORKS", "REASON"]
    assert row.split(maxsplit=3) == ["runc", "container", "no", "not installed"]
    assert hint.startswith("-v ")
    detailed = tabane("doctor", "-v").out.splitlines()
    assert detailed[3:6] == [row, "", "runc: looked everywhere"]
    assert detailed[-1].split(maxsplit=2) == ["seccomp", "enforced", "by a list"]
    check_refusal(tabane("doctor", "--node", "tokyo-1"), 1, "tokyo/tokyo-1")


def test_the_beginning_of_several_ids(tabane: Run, pretended: Pretended) -> None:
    found = [{"id": f"abcd{n}", "app": "default/x", "node": "tokyo/tokyo-1"} for n in (1, 2)]
    pretended.begin(tokyo=reply({"instances": found, "silent": []}))
    check_refusal(tabane("stop", "abcd"), 2, "write more of abcd1, abcd2")
