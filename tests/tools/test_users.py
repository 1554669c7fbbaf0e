"""Users that are named: those of this machine, and whom processes belong to."""

from __future__ import annotations

import json

import pytest
from tests.tools.conftest import Pretended, Run, check_refusal, reply
from tests.tools.rows import ROW

NOBODY = "there is no user nosuchuser, neither here nor of any process"
COMMANDS = [
    ("ps -u nosuchuser", 1),
    ("ps -U 33,nosuchuser", 1),
    ("ps -u www-data -u nosuchuser", 1),
    ("ps U nosuchuser", 1),
    ("ps --user nosuchuser", 1),
    ("pstree --user nosuchuser", 1),
    ("w --user nosuchuser", 1),
    ("lsof -u nosuchuser", 1),
    ("lsof -u ^www-data,nosuchuser", 1),
    ("pgrep -u nosuchuser", 2),
    ("pgrep -U nosuchuser", 2),
    ("pkill -u nosuchuser,www-data", 2),
    ("pgrep --user nosuchuser", 3),
]


def begin(pretended: Pretended, *, silent: tuple[str, ...] = ()) -> None:
    """A cluster where www-data and `far` have a process each."""

    def answer(line: str, body: bytes) -> bytes:
        _, _, query = line.split()[1].partition("?")
        kind = line.split("?")[0].rpartition("/")[2]
        found = [ROW, ROW | {"user": "far", "uid": 7, "node": "tokyo-2"}]
        if "user=" in query:
            users = query.partition("user=")[2].partition("&")[0].split(",")
            found = [row for row in found if row["user"] in users]
        rows = found if kind == "processes" else []
        return reply({kind: rows, "nodes": [], "silent": silent, "at": 0.0})

    pretended.begin(tokyo=answer)


@pytest.mark.parametrize(("line", "code"), COMMANDS)
def test_a_user_that_nobody_knows(line: str, code: int, tabane: Run, pretended: Pretended) -> None:
    begin(pretended)
    check_refusal(tabane(*line.split()), code, NOBODY)


@pytest.mark.parametrize("line", ["ps -u games", "ps -U root", "pgrep -u games", "lsof -u games"])
def test_one_of_this_machine_without_processes(
    line: str, tabane: Run, pretended: Pretended
) -> None:
    begin(pretended)
    ended = tabane(*line.split())
    assert (ended.code, ended.err) == (1, "")


def test_one_that_only_another_node_knows(tabane: Run, pretended: Pretended) -> None:
    begin(pretended)
    assert tabane("lsof", "-u", "far").err == ""
    assert len(json.loads(tabane("ps", "-u", "far", "--json").out)["processes"]) == 1


def test_a_number_needs_no_name(tabane: Run, pretended: Pretended) -> None:
    begin(pretended)
    assert tabane("pgrep", "-u", "4711") == (1, "", "")


def test_a_silent_node_may_know_more(tabane: Run, pretended: Pretended) -> None:
    begin(pretended, silent=("osaka/osaka-1",))
    ended = tabane("ps", "-u", "nosuchuser", "--no-headers")
    assert (ended.code, ended.err) == (1, "tabane: no answer from osaka/osaka-1\n")
