"""Which of an app's instances exec, nice and cp take, and the exit codes of exec."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.tools.answers import INSTANCE
from tests.tools.conftest import Pretended, Run, check_refusal, reply

from tabane.api.frames import EXIT, FAILURE, OUTPUT, encode, encode_number
from tabane.tools.cli.asking import Filters
from tabane.tools.cli.finding import is_in, nearness

SAID = encode(OUTPUT, b"hi\n") + encode_number(EXIT, 7)


def instance(name: str, dc: str, **more: object) -> dict[str, Any]:
    return INSTANCE | {"id": name, "node": f"{dc}/{dc}-1", "created_at": 1.0, **more}


FAR, NEAR, YOUNG = instance("aaaa", "osaka"), instance("cccc", "tokyo"), instance("bbbb", "tokyo")
YOUNG["created_at"] = 2.0
STARTING = instance("a000", "tokyo", state="starting")


def cluster_of(pretended: Pretended, *instances: dict[str, Any], said: bytes = SAID) -> None:
    def respond(line: str, body: bytes) -> bytes:
        if line.startswith("GET"):
            return reply({"instances": instances, "silent": []})
        return reply(said)

    pretended.begin(tokyo=respond, osaka=respond)


def talked_with(pretended: Pretended) -> list[str]:
    """The nodes and instances that conversations were begun with."""
    return [
        f"{name} {line.split('/')[4]}"
        for name, node in pretended.nodes.items()
        for line, _ in node.asked
        if line.startswith("POST")
    ]


@pytest.mark.parametrize(
    ("instances", "chosen"),
    [
        ([FAR, STARTING, YOUNG, NEAR], NEAR),
        ([NEAR, YOUNG, FAR], NEAR),
        ([FAR, STARTING], FAR),
        ([STARTING], STARTING),
        ([FAR, instance("a001", "osaka")], instance("a001", "osaka")),
    ],
)
def test_the_nearest_that_is_ready(instances: list[dict[str, Any]], chosen: Any) -> None:
    for order in (instances, instances[::-1]):
        assert min(order, key=lambda one: nearness(one, "tokyo/tokyo-1")) == chosen


def test_a_node_s_neighbour_comes_before_another_data_center() -> None:
    neighbour = instance("ffff", "tokyo") | {"node": "tokyo/tokyo-2"}
    assert nearness(neighbour, "tokyo/tokyo-1") < nearness(FAR, "tokyo/tokyo-1")
    assert nearness(NEAR, "tokyo/tokyo-1") < nearness(neighbour, "tokyo/tokyo-1")


@pytest.mark.parametrize(
    ("place", "is_there"),
    [
        (Filters(), True),
        (Filters(dc="tokyo"), True),
        (Filters(dc="osaka"), False),
        (Filters(node="tokyo-1"), True),
        (Filters(node="tokyo/tokyo-1"), True),
        (Filters(node="tokyo-2"), False),
        (Filters(dc="osaka,tokyo", node="tokyo-2,tokyo-1"), True),
        (Filters(dc="osaka,nara"), False),
        (Filters(dc="osaka", node="tokyo-1"), False),
    ],
)
def test_places(place: Filters, is_there: bool) -> None:
    assert is_in("tokyo/tokyo-1", place) is is_there


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("exec hello ls", "tokyo cccc"),
        ("exec --dc osaka hello ls", "osaka aaaa"),
        ("exec --node osaka-1 hello ls", "osaka aaaa"),
        ("exec bbbb ls", "tokyo bbbb"),
        ("nice --dc osaka hello ls", "osaka aaaa"),
    ],
)
def test_one_of_several_is_taken(line: str, where: str, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, FAR, YOUNG, NEAR)
    ended = tabane(*line.split())
    assert ended.code == 7
    assert ended.err == "", "nobody asked which, and there is no terminal"
    assert talked_with(pretended) == [where]


def test_cp_takes_one_of_several(tabane: Run, pretended: Pretended, tmp_path: Path) -> None:
    cluster_of(pretended, FAR, YOUNG, NEAR, said=encode_number(EXIT, 7))
    assert tabane("cp", "hello:/etc/hosts", str(tmp_path)) == (7, "", "")
    assert talked_with(pretended) == ["tokyo cccc"]


def test_which_it_is_is_told_to_who_asks(
    tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(pretended, FAR, NEAR)
    said = "tabane: hello: instance cccc on tokyo/tokyo-1\n"
    assert tabane("exec", "-v", "hello", "ls") == (7, "hi\n", said)
    assert (
        tabane("exec", "-v", "cccc", "ls").err == "tabane: cccc: instance cccc on tokyo/tokyo-1\n"
    )
    monkeypatch.setattr("tabane.tools.cli.exec._is_terminal", lambda stream: stream is not None)
    assert tabane("exec", "hello", "ls") == (7, "hi\n", said)
    assert tabane("exec", "cccc", "ls") == (7, "hi\n", ""), "there was no choice"
    assert tabane("exec", "--dc", "osaka", "hello", "ls") == (7, "hi\n", "")


def test_a_place_without_an_instance(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, FAR)
    said = "exec: hello has no instance on tokyo, only on osaka/osaka-1"
    check_refusal(tabane("exec", "--dc", "tokyo", "hello", "ls"), 125, said)
    said = "exec: there is no data center nara, only tokyo, osaka"
    check_refusal(tabane("exec", "--dc", "nara", "hello", "ls"), 125, said)
    check_refusal(tabane("exec", "--dc", "", "hello", "ls"), 125, "exec: --dc: an empty name")
    assert not talked_with(pretended)


def test_into_several_nothing_is_copied(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, FAR, NEAR)
    said = "name one of aaaa (osaka/osaka-1), cccc (tokyo/tokyo-1)"
    check_refusal(tabane("cp", "/etc/hosts", "hello:/etc"), 2, "cp: hello has 2 instances", said)
    assert not talked_with(pretended)
    assert tabane("cp", "--dc", "tokyo", "/etc/hosts", "hello:/etc").code == 7
    assert talked_with(pretended) == ["tokyo cccc"]


@pytest.mark.parametrize("option", ["-r", "-R", "-a", "-p"])
def test_habits_of_cp_are_accepted(option: str, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, NEAR)
    assert tabane("cp", option, "/etc/hosts", "hello:/etc").code == 7


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        (["--timeout", "5"], "timed_out", 124),
        (["--timeout", "5s"], "timed_out", 124),
        ([], "timed_out", 125),
        (["--timeout", "5"], "engine", 125),
        ([], "denied", 125),
    ],
)
def test_what_exec_ends_with_when_the_command_did_not(
    options: list[str], kind: str, code: int, tabane: Run, pretended: Pretended
) -> None:
    problem = json.dumps({"error": kind, "message": "ls in cccc was not to be"}).encode()
    cluster_of(pretended, NEAR, said=encode(FAILURE, problem))
    ended = tabane("exec", *options, "hello", "ls")
    check_refusal(ended, code, "ls in cccc was not to be")


@pytest.mark.parametrize("line", ["exec hello ls", "cp hello:/x -", "nice hello ls"])
def test_a_node_that_hangs_is_given_up(
    line: str, tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.tools.talk.BEGIN_S", 0.01)
    over = threading.Event()

    def respond(asked: str, body: bytes) -> bytes:
        if asked.startswith("GET"):
            return reply({"instances": [NEAR], "silent": []})
        over.wait()
        return b""

    pretended.begin(tokyo=respond)
    try:
        said = "tokyo/tokyo-1 has not begun it within 0.01 s: does tokyo/tokyo-1 hang?"
        check_refusal(tabane(*line.split()), 1 if line[:2] == "cp" else 125, said)
    finally:
        over.set()
