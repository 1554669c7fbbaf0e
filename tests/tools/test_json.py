"""What `--json` prints is alike in all commands: kinds of rows, and where each thing is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.tools.answers import APP, INSTANCE
from tests.tools.answers import answer as answer_control
from tests.tools.conftest import Pretended, Run, reply
from tests.tools.rows import ROW
from tests.tools.test_hosts import MOUNT
from tests.tools.test_lsof import FILE

from tabane.tools.cli import COMMANDS
from tabane.tools.cli.places import placed, placed_app, short

PLACE = {"dc", "node"}
OWNED = {*PLACE, "app", "instance", "class"}
TABLE: dict[str, tuple[str, set[str]]] = {
    "apps": ("apps", {"app", "class"}),
    "show hello": ("instances", OWNED),
    "show  hello": ("events", OWNED - {"class"}),
    "show hello ": ("wakes", OWNED - {"class"}),
    "wakes": ("wakes", OWNED - {"class"}),
    "why hello": ("wakes", OWNED - {"class"}),
    "events": ("", OWNED - {"class"}),
    "stop hello": ("instances", OWNED),
    "logs hello": ("", {"instance"}),
    "members": ("members", PLACE),
    "doctor": ("", PLACE),
    "deploy APP_FILE": ("", {"app", "class"}),
    "scale hello --max 1": ("", {"app", "class"}),
    "rm hello": ("", {"app"}),
    "ps": ("processes", OWNED),
    "ps -L": ("threads", OWNED),
    "pstree": ("processes", OWNED),
    "pgrep httpd": ("processes", OWNED),
    "pidof httpd": ("processes", OWNED),
    "pkill httpd": ("processes", OWNED),
    "kill 42": ("outcomes", OWNED),
    "renice 5 42": ("outcomes", OWNED),
    "lsof": ("files", OWNED),
    "free": ("host", PLACE),
    "uptime": ("host", PLACE),
    "vmstat": ("host", PLACE),
    "df": ("mounts", PLACE),
    "w": ("logins", PLACE),
    "image ls": ("images", PLACE),
    "checkpoint ls": ("checkpoints", OWNED),
    "volume ls": ("volumes", {*PLACE, "app"}),
    "trigger ls": ("triggers", {"app"}),
}
"""Lines, the name of the rows (none: one object), and of the five what each row has."""
ODD = ("doctor", "members")
"""Whose nodes have odd names in these tests."""
WITHOUT = {"up", "down", "demo", "node", "shell", "completion", "exec", "nice", "cp"}
"""Commands whose JSON, if any, is about nothing that is somewhere: a command's result, names."""
FILE_ROW = FILE | {"instance": "abc123", "namespace": "default"}
MACHINE = {"dc": "tokyo", "node": "tokyo-1", "user": "root"}
KINDS: dict[str, dict[str, Any]] = {"processes": ROW, "files": FILE_ROW, "mounts": MOUNT}


def answer(line: str, body: bytes) -> bytes:
    method, target = line.split()[:2]
    if target == "/api/v1/volumes":
        row = {"node": "tokyo/tokyo-1", "app": "default/hello", "name": "data"}
        return reply({"volumes": [row], "silent": []})
    if not target.startswith("/v2/"):
        return answer_control(line, body)
    if method == "POST":
        targets = json.loads(body)["targets"]
        return reply({"outcomes": [{"target": one, "before": 0, "after": 5} for one in targets]})
    kind = target.partition("?")[0].removeprefix("/v2/")
    rows = [KINDS.get(kind, MACHINE)]
    return reply({kind: rows, "nodes": [], "silent": ["nara/nara-1"], "at": 0.0})


def test_every_command_is_looked_at() -> None:
    assert {line.split()[0] for line in TABLE} | WITHOUT == set(COMMANDS)


@pytest.mark.parametrize(("line", "told"), TABLE.items(), ids=TABLE)
def test_where_things_are(
    line: str, told: tuple[str, set[str]], tabane: Run, pretended: Pretended, tmp_path: Any
) -> None:
    kind, fields = told
    file = tmp_path / "hello.toml"
    file.write_text('name = "hello"\nimage = "host"\ncommand = ["true"]\n')
    pretended.begin(tokyo=answer)
    words = [str(file) if word == "APP_FILE" else word for word in line.split()]
    ended = tabane(*words, "--json")
    shown = json.loads(ended.out)
    if kind:
        assert isinstance(shown["silent"], list)
    for row in shown[kind] if kind else [shown]:
        assert row.keys() & OWNED == fields
        if "node" in fields and words[0] not in ODD:
            assert row["dc"] and row["node"].startswith(row["dc"] + "-"), "its name in its dc"
        if "app" in fields and words[0] != "rm":
            assert row["app"] == "default/hello"
        if "instance" in fields:
            assert row["instance"] == "abc123"
        if "class" in fields:
            assert row["class"] == "container"


def test_one_that_is_nowhere() -> None:
    """As a wake of which nothing came."""
    assert placed({"node": "", "app": "a/b"}) == {"dc": "", "node": "", "app": "a/b"}


def test_the_words_of_the_control_api() -> None:
    assert placed(INSTANCE | {"isolation": "vm"})["class"] == "vm"
    assert "id" not in placed(INSTANCE)
    assert placed_app(APP | {"namespace": "shop"})["app"] == "shop/hello"
    assert [short("default/a"), short("shop/a"), short("")] == ["a", "shop/a", "-"]
