"""tabane pgrep: which match, how they are shown, how it ends."""

from __future__ import annotations

import json

import pytest
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal
from tests.tools.rows import HOST, ROW
from tests.tools.test_ps import answer

from tabane.tools.cli.pgrep import is_program


@pytest.fixture
def started(pretended: Pretended) -> Pretended:
    young = ROW | {"pid": 50, "elapsed_s": 5.0, "command": f"httpd {EVIL}"}
    pretended.begin(tokyo=answer(ROW, young, HOST | {"name": "sshd", "command": "sshd -D"}))
    return pretended


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ("httpd", "tokyo/tokyo-1:42\ntokyo/tokyo-1:50\n"),
        ("-l sshd", "osaka/osaka-1:7 sshd\n"),
        ("-a sshd", "osaka/osaka-1:7 sshd -D\n"),
        ("-af -- -D", "osaka/osaka-1:7 sshd -D\n"),
        ("-fa 2J", "tokyo/tokyo-1:50 httpd \\x1b[2J\\x9b31m\\u202e\\r\\nx\n"),
        ("-x http", ""),
        ("-fx httpd.*J.*x", "tokyo/tokyo-1:50\n"),
        ("-n httpd", "tokyo/tokyo-1:50\n"),
        ("-o .", "osaka/osaka-1:7\n"),
        ("-c .", "3\n"),
        ("-c nope", "0\n"),
        ("-v httpd", "osaka/osaka-1:7\n"),
        ("-d, httpd", "tokyo/tokyo-1:42,tokyo/tokyo-1:50\n"),
        ("-u root", "osaka/osaka-1:7\n"),
        ("-g 7", "osaka/osaka-1:7\n"),
        ("-P 1 -O 60 httpd", "tokyo/tokyo-1:42\n"),
    ],
)
def test_matches(argv: str, shown: str, tabane: Run, started: Pretended) -> None:
    ended = tabane("pgrep", *argv.split())
    assert ended == (0 if shown.strip() not in ("", "0") else 1, shown, "")
    assert len(started.nodes["tokyo"].asked) == 1


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ("httpd", "tokyo/tokyo-1:50 tokyo/tokyo-1:42\n"),
        ("http", ""),
        ("-s httpd sshd", "tokyo/tokyo-1:50\n"),
        ("httpd -S ,", "tokyo/tokyo-1:50,tokyo/tokyo-1:42\n"),
        ("-o 50,osaka/osaka-1:7 httpd sshd", "tokyo/tokyo-1:42\n"),
    ],
)
def test_pidof(argv: str, shown: str, tabane: Run, started: Pretended) -> None:
    assert tabane("pidof", *argv.split()) == (0 if shown else 1, shown, "")
    assert tabane("pidof", "-q", *argv.split()) == (0 if shown else 1, "", "")


def test_a_program_is_known_by_its_path_and_its_name() -> None:
    row = ROW | {"name": "renamed", "command": "/usr/sbin/nginx -g x"}
    for name in ("renamed", "/usr/sbin/nginx", "nginx"):
        assert is_program(row, [name])
    assert not is_program(row, ["sbin/nginx", "x"])
    assert not is_program(row | {"command": "[nginx]"}, ["nginx]", "[nginx]", "nginx"])


def test_json(tabane: Run, started: Pretended) -> None:
    found = json.loads(tabane("pgrep", "--json", "sshd").out)
    assert [row["pid"] for row in found["processes"]] == [7]


def test_filters_are_criteria(tabane: Run, started: Pretended) -> None:
    assert tabane("pgrep", "--app", "hello").code == 0
    assert started.nodes["tokyo"].asked[0][0].endswith("&app=default/hello")


def test_who_is_silent_may_have_one_that_matches(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(ROW, silent=("osaka/osaka-1",)))
    silent = "tabane: no answer from osaka/osaka-1\n"
    assert tabane("pgrep", "nope") == (3, "", silent)
    assert tabane("pgrep", "httpd") == (3, "tokyo/tokyo-1:42\n", silent)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "pgrep: say which: a pattern, or one of the options"),
        ("-l", "pgrep: say which"),
        ("(", "'(' is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("-n -o x", "-n and -o exclude each other"),
        ("-O x y", "-O/--older: 'x' is no number of seconds"),
        ("-P x", "pgrep: 'x' is no number"),
        ("x y", "there are more words than `tabane pgrep PATTERN` takes"),
    ],
)
def test_what_is_not_understood(argv: str, said: str, tabane: Run) -> None:
    check_refusal(tabane("pgrep", *argv.split()), 2, said)
