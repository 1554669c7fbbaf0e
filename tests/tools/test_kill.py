"""tabane kill, pkill, renice: who is meant, what is sent, and what is said of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal, reply
from tests.tools.rows import HOST, ROW
from tests.tools.test_ps import answer

CHILD = ROW | {"pid": 43, "ppid": 42, "start_ticks": 101}
TWIN = ROW | {"dc": "nara", "node": "nara-1", "incarnation": "i-3", "pid": 7, "instance": "abd999"}
ROWS = [CHILD, ROW, HOST, TWIN]

Outcome = Callable[[dict[str, Any]], dict[str, Any]]


def good(target: dict[str, Any]) -> dict[str, Any]:
    return {"target": target, "error": "", "message": "", "before": 0, "after": 5}


def cluster_of(
    pretended: Pretended,
    *rows: dict[str, Any],
    outcome: Outcome = good,
    silent: tuple[str, ...] = (),
) -> None:
    """One that obeys all orders as `outcome` says."""

    def respond(line: str, body: bytes) -> bytes:
        if line.startswith("GET"):
            return answer(*rows, silent=silent)
        targets = json.loads(body)["targets"]
        return reply({"outcomes": [outcome(target) for target in targets]})

    pretended.begin(tokyo=respond)


def sent(pretended: Pretended) -> tuple[str, dict[str, Any]]:
    """The one order after the one question."""
    (_, nothing), (line, body) = pretended.nodes["tokyo"].asked
    assert nothing == b""
    return line.removeprefix("POST /v2/processes/"), json.loads(body)


def identity(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("dc", "node", "incarnation", "pid", "start_ticks")}


@pytest.mark.parametrize(
    ("argv", "number"),
    [
        ("42", 15),
        ("-9 42", 9),
        ("-TERM 42", 15),
        ("-KILL 42", 9),
        ("-SIGHUP 42", 1),
        ("-hup 42", 1),
        ("-s USR1 42", 10),
        ("-s 12 42", 12),
        ("--signal=INT 42", 2),
        ("42 -9", 9),
        ("-0 42", 0),
        ("-RTMIN+1 42", 35),
    ],
)
def test_signals(argv: str, number: int, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    assert tabane("kill", *argv.split()) == (0, "", "")
    body = {"targets": [identity(ROW)], "signal": number, "force": False}
    assert sent(pretended) == ("signal", body)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("42", [ROW]),
        ("tokyo/tokyo-1:43", [CHILD]),
        ("nara/nara-1:7", [TWIN]),
        ("osaka/osaka-1:7", [HOST]),
        ("abc123", [ROW]),
        ("abc1", [ROW]),
        ("abd999 42", [TWIN, ROW]),
        ("42 abc123 42", [ROW]),
    ],
)
def test_who_is_meant(words: str, meant: list[Any], tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    assert tabane("kill", *words.split()).code == 0
    assert sent(pretended)[1]["targets"] == [identity(row) for row in meant]


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("7", 2, "7 is a process of several nodes: choose nara/nara-1:7 (httpd), osaka/osaka-1:7"),
        ("99", 2, "no such process: 99"),
        ("tokyo/tokyo-1:99", 2, "no such process: tokyo/tokyo-1:99"),
        ("hello", 2, "hello is an app: `tabane stop hello` stops its instances"),
        ("nope", 2, "nope is no process and no instance: write DC/NODE:PID, PID, or an id"),
        (EVIL, 2, "is no process and no instance"),
        ("ab", 2, "ab is no process and no instance"),
        ("-5000", 2, "kill: -5000 is neither a signal nor a process: `tabane pkill -g"),
    ],
)
def test_who_is_not_meant(
    word: str, code: int, said: str, tabane: Run, pretended: Pretended
) -> None:
    cluster_of(pretended, *ROWS)
    check_refusal(tabane("kill", word), code, said)
    assert all(line.startswith("GET") for line, _ in pretended.nodes["tokyo"].asked)


def test_the_beginning_of_several_ids(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, ROW, TWIN | {"instance": "abc199"})
    check_refusal(
        tabane("kill", "abc1"), 2, "abc1 begins several ids: write more of abc123, abc199"
    )


def test_who_is_silent_may_have_that_pid_too(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, ROW, silent=("nara/nara-1",))
    said = "42 may be on nara/nara-1 too, who did not answer: for this one write tokyo/tokyo-1:42"
    check_refusal(tabane("kill", "42"), 1, said)
    check_refusal(tabane("kill", "43"), 1, "43 is not on the nodes that answered (nara/nara-1 did")
    check_refusal(tabane("kill", "nara/nara-1:4"), 1, "nara/nara-1:4 is not on the nodes")
    check_refusal(tabane("kill", "beef"), 1, "beef is not on the nodes that answered")
    assert tabane("kill", "tokyo/tokyo-1:42").code == 0


def test_others_are_signalled_when_one_is_not_there(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    ended = tabane("kill", "99", "42", "nope")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("tabane: no such process: 99\ntabane: nope is no process")
    assert sent(pretended)[1]["targets"] == [identity(ROW)]


def test_what_a_node_refuses(tabane: Run, pretended: Pretended) -> None:
    def refuse(target: dict[str, Any]) -> dict[str, Any]:
        if target["pid"] == 42:
            return good(target)
        return good(target) | {"error": "stale", "message": f"another has its pid {EVIL}"}

    cluster_of(pretended, *ROWS, outcome=refuse)
    ended = tabane("kill", "43", "42")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("tabane: tokyo/tokyo-1:43: another has its pid \\x1b[2J")
    shown = json.loads(tabane("kill", "--json", "43").out)
    assert shown["outcomes"][0]["error"] == "stale"


def test_lists_of_signals(tabane: Run) -> None:
    """As /usr/bin/kill prints them, which is the oracle here; no cluster is needed."""
    for option in ("-l", "-L"):
        done = subprocess.run(["/usr/bin/kill", option], capture_output=True, text=True)
        said = "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())
        assert tabane("kill", option) == (0, said, "")
    assert tabane("kill", "-l", "9", "TERM", "SIGHUP", "137") == (0, "KILL\n15\n1\nKILL\n", "")
    check_refusal(tabane("kill", "-l", "77"), 2, "kill: 77 is no signal's number")
    check_refusal(tabane("kill", "-l", "NOPE"), 2, "no signal")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "kill: name processes: DC/NODE:PID"),
        ("-9", "kill: name processes"),
        ("-s NOPE 1", "'NOPE' is no signal"),
        ("-NOPE 1", "kill: unrecognized arguments: -NOPE"),
        ("-99 1", "kill: -99 is neither a signal nor a process"),
    ],
)
def test_what_is_not_understood(argv: str, said: str, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    check_refusal(tabane("kill", *argv.split()), 2, said)


# pkill


def test_pkill_signals_all_that_match(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    ended = tabane("pkill", "-HUP", "-e", "-u", "www-data", "httpd")
    order, body = sent(pretended)
    assert (order, body["signal"]) == ("signal", 1)
    assert body["targets"] == [identity(row) for row in (TWIN, ROW, CHILD)]
    assert ended == (
        0,
        "httpd killed (pid nara/nara-1:7)\nhttpd killed (pid tokyo/tokyo-1:42)\n"
        "httpd killed (pid tokyo/tokyo-1:43)\n",
        "",
    )


def test_pkill_of_nobody(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    assert tabane("pkill", "-9", "nope") == (1, "", "")
    assert len(pretended.nodes["tokyo"].asked) == 1
    check_refusal(tabane("pkill", "-9"), 2, "pkill: say which")


def test_pkill_that_may_not(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, ROW, outcome=lambda t: good(t) | {"error": "denied", "message": "no"})
    assert tabane("pkill", "--signal", "9", "httpd") == (1, "", "tabane: tokyo/tokyo-1:42: no\n")


def test_what_runs_inside_of_an_instance_is_no_process_of_its_node(
    tabane: Run, pretended: Pretended
) -> None:
    guest = ROW | {"inside": "sandbox", "pid": 7, "start_ticks": 0, "name": "guest"}
    cluster_of(pretended, guest, ROW)
    ended = tabane("pkill", "-9", "httpd|guest")
    assert sent(pretended)[1]["targets"] == [identity(ROW)]
    said = "tokyo/tokyo-1:7: it runs inside of its instance: `tabane exec abc123` reaches it"
    assert ended == (0, "", f"tabane: {said}\n")
    for word in ("7", "tokyo/tokyo-1:7"):
        check_refusal(tabane("kill", word), 2, f"no such process: {word}")


def test_pkill_with_a_silent_node(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, ROW, silent=("nara/nara-1",))
    ended = tabane("pkill", "httpd")
    assert (ended.code, ended.err) == (3, "tabane: no answer from nara/nara-1\n")


# renice


@pytest.mark.parametrize(
    ("argv", "nice", "relative", "rows"),
    [
        ("-n 5 -p 42", 5, False, [ROW]),
        ("5 42", 5, False, [ROW]),
        ("+5 -p 42 43", 5, False, [ROW, CHILD]),
        ("-5 42", -5, False, [ROW]),
        ("-n -5 abc123", -5, False, [ROW]),
        ("-n 3 --relative 42", 3, True, [ROW]),
        ("-n 3 -u root", 3, False, [HOST]),
        ("3 -u 0", 3, False, [HOST]),
    ],
)
def test_renice(
    argv: str, nice: int, relative: bool, rows: list[Any], tabane: Run, pretended: Pretended
) -> None:
    cluster_of(pretended, *ROWS)
    ended = tabane("renice", *argv.split())
    said = [
        f"{r['dc']}/{r['node']}:{r['pid']} (process ID) old priority 0, new priority 5"
        for r in rows
    ]
    assert ended == (0, "\n".join(said) + "\n", "")
    body = {"targets": [identity(row) for row in rows], "nice": nice, "relative": relative}
    assert sent(pretended) == ("nice", body | {"force": False})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "renice: name a nice value and processes"),
        ("5", "renice: name a nice value and processes"),
        ("x 42", "renice: 'x' is no nice value: write -20 to 19"),
        ("-n 99 42", "renice: argument -n/--priority: '99' is no nice value"),
        ("5 -u nobody", "renice: no process is nobody's"),
    ],
)
def test_what_renice_refuses(argv: str, said: str, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    check_refusal(tabane("renice", *argv.split()), 2, said)
