"""tabane nice: what it has an instance run, through `tabane exec`."""

from __future__ import annotations

import pytest
from tests.tools.conftest import Pretended, Run, check_refusal, reply


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    lines: list[list[str]] = []

    def execute(argv: list[str]) -> int:
        lines.append([word for word in argv if not word.startswith("--root=")])
        return 7

    monkeypatch.setattr("tabane.tools.cli.nice.execute", execute)
    return lines


@pytest.mark.parametrize(
    ("argv", "number"),
    [
        ("hello ls -l", "10"),
        ("-n 5 hello ls -l", "5"),
        ("-n -5 hello -- ls -l", "-5"),
        ("-5 hello ls -l", "5"),
        ("--5 hello ls -l", "-5"),
        ("--adjustment=3 hello ls -l", "3"),
    ],
)
def test_it_is_run_nicely(argv: str, number: str, tabane: Run, executed: list[list[str]]) -> None:
    assert tabane("nice", *argv.split()).code == 7
    assert executed == [["hello", "--", "nice", "-n", number, "ls", "-l"]]


def test_what_else_exec_is_told(tabane: Run, executed: list[list[str]]) -> None:
    line = "nice -v --dc tokyo --node tokyo-1 --json hello ls"
    assert tabane(*line.split()).code == 7
    assert executed[0][:4] == ["--dc=tokyo", "--node=tokyo-1", "--json", "--verbose"]


def test_what_it_cannot_do(tabane: Run, pretended: Pretended) -> None:
    empty = {"instances": [], "records": [], "silent": []}
    missing = reply({"error": "not_found", "message": "there is no app default/x"}, 404)
    pretended.begin(tokyo=lambda asked, _: missing if "/apps/" in asked else reply(empty))
    said = "`tabane renice` changes what already runs"
    check_refusal(tabane("nice", "x", "ls"), 125, "nice: no instance is called x", said)
    check_refusal(tabane("nice", "x"), 125, "nice: name an instance and a command")
    check_refusal(tabane("nice", "-n", "x", "y", "ls"), 125, "'x' is no number from -99 to 99")
