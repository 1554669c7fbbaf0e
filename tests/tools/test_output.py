"""What the cluster says, as people and programs read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.tools.answers import APP, EVENT, INSTANCE, MEMBER, WAKE, answer
from tests.tools.conftest import APP_FILE, EVIL, Pretended, Run, check_refusal, reply

from tabane.api.frames import BEGIN, CLIENTS, Parser
from tabane.tools.cli import run
from tabane.tools.cli.common import NAME
from tabane.tools.cli.places import placed

LINES = [
    ["deploy", "APP_FILE"],
    ["apps"],
    ["show", "hello"],
    ["rm", "hello"],
    ["scale", "hello", "--max", "1"],
    ["wakes"],
    ["wakes", "hello"],
    ["events"],
    ["events", "hello"],
    ["stop", "hello"],
    ["members"],
    ["doctor"],
    ["doctor", "-v"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_nothing_that_moves_the_cursor_is_shown(
    line: list[str], tabane: Run, pretended: Pretended, tmp_path: Path
) -> None:
    """`tabane` checks each line; here: that it was shown at all, and that JSON is whole."""
    (tmp_path / "hello.toml").write_text(APP_FILE)
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
    (tmp_path / "hello.toml").write_text(APP_FILE)
    words = [str(tmp_path / "hello.toml") if word == "APP_FILE" else word for word in line]

    def answer_alone(line: str, body: bytes) -> bytes:
        whole = json.loads(answer(line, body).partition(b"\r\n\r\n")[2])
        return reply(whole | {"silent": [EVIL], "unreachable": [EVIL]})

    pretended.begin(tokyo=answer_alone)
    for shown in (tabane(*words), tabane(*words, "--json")):
        assert shown.code == 1
        assert shown.out
        assert re.match(r"tabane: no answer from (data center )?\\x1b\[2J", shown.err)


def test_wakes_in_json_say_who_is_silent(tabane: Run, pretended: Pretended) -> None:
    told = reply({"records": [WAKE], "silent": ["osaka/osaka-1"]})
    pretended.begin(tokyo=told)
    ended = tabane("wakes", "--json")
    assert json.loads(ended.out) == {"wakes": [placed(WAKE)], "silent": ["osaka/osaka-1"]}
    assert (ended.code, ended.err) == (1, "tabane: no answer from osaka/osaka-1\n")


@pytest.mark.parametrize("command", ["wakes", "events"])
def test_records_of_one_app_are_its_latest(command: str, tabane: Run, pretended: Pretended) -> None:
    record = EVENT | WAKE | {"trust": "trusted"}
    mine = [record | {"instance": str(number)} for number in range(3)]
    told = {"records": [*mine, record | {"app": "default/other"}], "silent": []}
    pretended.begin(tokyo=reply(told))
    shown = tabane(command, "hello", "-n", "2").out
    assert ("trusted" in shown, "other" in shown) == (command == "wakes", False)
    found = tabane(command, "hello", "-n", "2", "--json").out
    lines = (
        json.loads(found)["wakes"]
        if command == "wakes"
        else map(json.loads, found.split("\n")[:-1])
    )
    assert [line["instance"] for line in lines] == ["1", "2"]


@pytest.mark.parametrize("command", ["wakes", "events"])
def test_records_of_an_app_that_is_not_there(
    command: str, tabane: Run, pretended: Pretended
) -> None:
    def nobody(line: str, body: bytes) -> bytes:
        missing = reply({"error": "not_found", "message": "there is no app default/x"}, 404)
        return missing if "/apps/" in line else answer(line, body)

    pretended.begin(tokyo=nobody)
    check_refusal(tabane(command, "x"), 1, f"{command}: there is no app default/x")


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
    assert ended.err == "tabane: stop: gone is not here\n"


def test_what_a_silent_node_has_of_an_app_is_said_to_go_on(
    tabane: Run, pretended: Pretended
) -> None:
    def with_silence(line: str, body: bytes) -> bytes:
        found = {"instances": [INSTANCE], "silent": ["osaka/osaka-1"]}
        return reply(found) if "/instances HTTP" in line else answer(line, body)

    pretended.begin(tokyo=with_silence)
    ended = tabane("stop", "hello")
    assert (ended.code, ended.out) == (1, "abc123 on tokyo/tokyo-1 is told to stop\n")
    said = "no answer from osaka/osaka-1: what runs of hello there goes on"
    assert ended.err == f"tabane: stop: {said}\n"
    assert json.loads(tabane("stop", "hello", "--json").out)["silent"] == ["osaka/osaka-1"]
    assert tabane("stop", "abc123") == (0, ended.out, "")  # all that was meant


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["cp", "/nowhere", "web:/tmp"], 1, "cp: there is no /nowhere"),
        (["cp", "web:/tmp", "/nowhere/"], 1, "cp: there is no directory /nowhere/"),
        (["trigger", "fire", "x"], 2, "trigger: name an app and one of its triggers"),
        (["trigger", "ls", "x"], 2, "trigger: ls lists all, and takes no names"),
        (["volume", "rm", "x"], 2, "volume: name what is to be removed as APP/VOLUME"),
        (["pstree", "nobody's"], 1, "pstree: nobody's is no process"),
    ],
)
def test_mistakes_are_said_in_the_commands_name(
    argv: list[str], code: int, said: str, tabane: Run, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer)
    check_refusal(tabane(*argv), code, f"tabane: {said}")


@pytest.mark.parametrize("argv", [["rm", "hello"], ["scale", "hello", "--min", "0"]])
def test_a_data_center_that_is_silent_is_called_one(
    argv: list[str], tabane: Run, pretended: Pretended
) -> None:
    done = APP | {"name": "hello", "known": ["tokyo"], "unreachable": ["osaka"]}
    pretended.begin(tokyo=reply(done))
    ended = tabane(*argv)
    assert (ended.code, ended.err) == (1, "tabane: no answer from data center osaka\n")


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_members_that_say_nothing_are_named(
    tabane: Run, pretended: Pretended, option: list[str]
) -> None:
    """Whatever is to be said of their hubs."""
    pretended.begin(tokyo=reply({"members": [MEMBER], "silent": ["osaka/osaka-1"]}))
    ended = tabane("members", *option)
    assert (ended.code, ended.err) == (1, "tabane: no answer from osaka/osaka-1\n")
    assert not option or json.loads(ended.out)["silent"] == ["osaka/osaka-1"]


@pytest.mark.parametrize(
    ("option", "out"), [([], ""), (["--json"], '{"instances":[],"silent":[]}')]
)
def test_stop_of_an_app_at_rest_has_nothing_to_do(
    tabane: Run, pretended: Pretended, option: list[str], out: str
) -> None:
    def at_rest(line: str, body: bytes) -> bytes:
        none = {"instances": [], "silent": []}
        return reply(none) if "/instances HTTP" in line else answer(line, body)

    pretended.begin(tokyo=at_rest)
    ended = tabane("stop", "hello", *option)
    assert (ended.code, "".join(ended.out.split())) == (0, out)
    assert ended.err == "tabane: stop: no instance of hello runs, so there is nothing to stop\n"


@pytest.mark.parametrize(
    ("least", "silent", "ready"),
    [(0, [], "at rest"), (1, [], "0/0"), (0, ["osaka/osaka-1"], "0/0")],
)
def test_ready_of_an_app_without_instances(
    tabane: Run, pretended: Pretended, least: int, silent: list[str], ready: str
) -> None:
    app = APP | {"instances": 0, "reactive": {"min": least, "max": 1}}
    pretended.begin(tokyo=lambda line, _: reply({"apps": [app], "silent": silent}))
    assert tabane("apps").out.splitlines()[-1].endswith(f" {ready}")


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
    (begin,) = Parser(CLIENTS).feed(pretended.nodes["tokyo"].asked[-1][1])
    body = {"argv": argv, "stdin": False} | ({"timeout_s": 5.0} if before else {})
    assert (begin[0], json.loads(begin[1])) == (BEGIN, body)


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
    line = {
        "instance": "abc123",
        "at": "2026-01-31T23:59:59.1Z",
        "stream": "stdout",
        "text": "\x1b[2J\\xff",
    }
    shown = tabane("logs", "--json", "hello")
    assert json.loads(shown.out) == line | {"whole": True}


def test_instance_ids_and_app_names_have_one_form() -> None:
    from tabane.model import new_instance_id

    assert NAME.fullmatch(new_instance_id())
    assert NAME.fullmatch("shop/hello-1")
