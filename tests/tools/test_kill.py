"""tabane kill, pkill, renice: who is meant, what is sent, and what is said of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
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
    """As nodes tell it, who leave out what is empty."""
    return {"target": target, "before": 0, "after": 5}


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
    """The one order after the one question, without its key."""
    (_, nothing), (line, body) = pretended.nodes["tokyo"].asked
    assert nothing == b""
    order = json.loads(body)
    assert re.fullmatch("[0-9a-f]{32}", order.pop("idempotency_key"))
    return line.removeprefix("POST /v2/processes/"), order


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
        ("42 --force tokyo/tokyo-1:43", [ROW, CHILD]),
        ("-s TERM -- 42 43", [ROW, CHILD]),
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
        ("99", 1, "no such process: 99"),
        ("tokyo/tokyo-1:99", 1, "no such process: tokyo/tokyo-1:99"),
        ("hello", 2, "hello is an app, not a process: `tabane pkill --app hello NAME`"),
        ("nope", 1, "nope is no process and no instance: write DC/NODE:PID, PID, or an id"),
        (EVIL, 1, "is no process and no instance"),
        ("ab", 1, "ab is no process and no instance"),
        ("", 2, "an empty word is no process"),
        ("0", 1, "no such process: 0"),
        ("9" * 40, 1, "is no process and no instance"),
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


def test_a_pid_that_is_gone_is_never_the_beginning_of_an_id(
    tabane: Run, pretended: Pretended
) -> None:
    cluster_of(pretended, ROW | {"instance": "471123456789"})
    check_refusal(tabane("kill", "4711"), 1, "no such process: 4711")
    assert tabane("kill", "47112345") == (0, "", "")


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
    assert ended.err.startswith(
        "tabane: kill: no such process: 99\ntabane: kill: nope is no process"
    )
    assert sent(pretended)[1]["targets"] == [identity(ROW)]


@pytest.mark.parametrize("said", ["", "tokyo/tokyo-1:43: "])
def test_what_a_node_refuses(said: str, tabane: Run, pretended: Pretended) -> None:
    def refuse(target: dict[str, Any]) -> dict[str, Any]:
        if target["pid"] == 42:
            return good(target)
        return good(target) | {"error": "stale", "message": f"{said}another has its pid {EVIL}"}

    cluster_of(pretended, *ROWS, outcome=refuse)
    ended = tabane("kill", "43", "42")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("tabane: kill: tokyo/tokyo-1:43: another has its pid \\x1b[2J")
    assert ended.err.count("tokyo-1:43") == 1
    shown = json.loads(tabane("kill", "--json", "43").out)
    assert shown["outcomes"][0]["error"] == "stale"


class Obedient:
    """A node that knows its orders by their keys; `lost`: so many answers go lost, of orders that
    were obeyed, on the way to the tool or (`between`) to the node that was asked."""

    def __init__(self, lost: int, *, between: bool = False) -> None:
        self.effects: list[int] = []
        self._lost = lost
        self._between = between
        self._known: dict[str, bytes] = {}

    def __call__(self, line: str, body: bytes) -> bytes | Iterator[bytes]:
        if line.startswith("GET"):
            return answer(ROW, CHILD)
        order = json.loads(body)
        key = order.pop("idempotency_key")
        if key not in self._known:
            self.effects += [target["pid"] for target in order["targets"]]
        if self._known.setdefault(key, body) != body:
            return reply({"error": "conflict", "message": "another order"}, 409)
        outcomes = [good(target) for target in order["targets"]]
        if self._lost > 0:
            self._lost -= 1
            if not self._between:
                return iter(())
            outcomes[0] |= {"error": "unreachable", "message": "it did not say whether"}
        return reply({"outcomes": outcomes})


@pytest.mark.parametrize("command", ["kill 42 43", "renice 1 --relative 42 43", "pkill ."])
@pytest.mark.parametrize("between", [False, True])
def test_a_lost_answer_means_no_second_effect(
    command: str, between: bool, tabane: Run, pretended: Pretended
) -> None:
    node = Obedient(1, between=between)
    pretended.begin(tokyo=node)
    assert tabane(*command.split())[::2] == (0, "")
    assert sorted(node.effects) == [42, 43]
    assert len(pretended.nodes["tokyo"].asked) == 3


def test_another_node_is_asked_for_a_lost_answer(tabane: Run, pretended: Pretended) -> None:
    node = Obedient(1)
    pretended.begin(broken=b"no HTTP", tokyo=node, osaka=node)
    assert tabane("kill", "42") == (0, "", "")
    assert node.effects == [42]
    asked = {name: len(node.asked) for name, node in pretended.nodes.items()}
    assert asked == {"broken": 2, "tokyo": 2, "osaka": 1}


def test_what_nobody_says_is_said_not_to_be_known(tabane: Run, pretended: Pretended) -> None:
    node = Obedient(99)
    pretended.begin(tokyo=node)
    said = "42: no node has confirmed it: tokyo/tokyo-1 did not say whether it was done: "
    check_refusal(tabane("kill", "42"), 1, said)
    assert node.effects == [42]
    between = Obedient(99, between=True)
    pretended.nodes["tokyo"].answer = between
    ended = tabane("kill", "42")
    assert ended == (1, "", "tabane: kill: tokyo/tokyo-1:42: it did not say whether\n")
    assert between.effects == [42]


def test_more_targets_than_one_order_takes(tabane: Run, pretended: Pretended) -> None:
    many = [ROW | {"pid": pid, "start_ticks": pid} for pid in range(100, 2600)]
    cluster_of(pretended, *many)
    assert tabane("pkill", "-c", "httpd") == (0, "2500\n", "")
    orders = [json.loads(body) for _, body in pretended.nodes["tokyo"].asked[1:]]
    assert [len(order["targets"]) for order in orders] == [1024, 1024, 452]
    assert len({order["idempotency_key"] for order in orders}) == 3
    pids = [target["pid"] for order in orders for target in order["targets"]]
    assert pids == list(range(100, 2600))


def test_what_became_of_other_orders_is_told(tabane: Run, pretended: Pretended) -> None:
    many = [ROW | {"pid": pid} for pid in range(100, 1125)]

    def respond(line: str, body: bytes) -> bytes | Iterator[bytes]:
        if line.startswith("GET"):
            return answer(*many)
        targets = json.loads(body)["targets"]
        return iter(()) if len(targets) == 1 else reply({"outcomes": [*map(good, targets)]})

    pretended.begin(tokyo=respond)
    ended = tabane("pkill", "-e", "httpd")
    assert (ended.code, ended.out.count("killed")) == (0, 1024)
    assert ended.err.startswith("tabane: pkill: tokyo/tokyo-1:1124: no node has confirmed it: ")


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
        ("-NOPE 1", "kill: -NOPE is neither an option nor a signal: `tabane kill -l` lists"),
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
    check_refusal(tabane("pkill", "-9", ""), 2, "pkill: an empty pattern matches all: write .")
    for option in ("-u", "-U", "-g", "-P", "-s", "-t"):
        check_refusal(tabane("pkill", "-9", option, " "), 2, "pkill: an empty list names nobody")
    for option in ("--app", "--dc", "--node", "--user"):
        check_refusal(
            tabane("pkill", "-9", option, ""), 2, f"{option}: an empty name means nothing"
        )
    assert len(pretended.nodes["tokyo"].asked) == 1


def test_pkill_that_may_not(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, ROW, outcome=lambda t: good(t) | {"error": "denied", "message": "no"})
    assert tabane("pkill", "--signal", "9", "httpd") == (
        3,
        "",
        "tabane: pkill: tokyo/tokyo-1:42: no\n",
    )


def test_what_runs_inside_of_an_instance_is_no_process_of_its_node(
    tabane: Run, pretended: Pretended
) -> None:
    guest = ROW | {"inside": "sandbox", "pid": 7, "start_ticks": 0, "name": "guest"}
    cluster_of(pretended, guest, ROW)
    ended = tabane("pkill", "-9", "httpd|guest")
    assert sent(pretended)[1]["targets"] == [identity(ROW)]
    said = "tokyo/tokyo-1:abc123:7: it runs inside of abc123, where no signal from outside reaches"
    said += " it: `tabane exec abc123 kill 7` does, if its image has a kill"
    assert ended == (0, "", f"tabane: pkill: {said}\n")
    (shown,) = (line for line in tabane("pgrep", ".").out.splitlines() if "abc123" in line)
    for word in (shown, "7"):
        check_refusal(tabane("kill", word), 1, said)
        check_refusal(tabane("renice", "5", word), 1, said)
    check_refusal(tabane("kill", "tokyo/tokyo-1:7"), 1, "no such process: tokyo/tokyo-1:7")
    assert tabane("ps", "-o", "pid=", shown).out == "7\n"
    assert tabane("pstree", shown).out == "tokyo/tokyo-1---guest[hello,container]\n"


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
        ("40 42", 19, False, [ROW]),
        ("-n -30 42", -20, False, [ROW]),
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
        ("-n 99 42", "renice: -n/--priority: '99' is no nice value"),
    ],
)
def test_what_renice_refuses(argv: str, said: str, tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    check_refusal(tabane("renice", *argv.split()), 2, said)


def test_renice_of_a_user_without_processes(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    check_refusal(tabane("renice", "5", "-u", "nobody"), 1, "renice: no process is nobody's")


def test_kill_of_a_node_that_is_not_there(tabane: Run, pretended: Pretended) -> None:
    cluster_of(pretended, *ROWS)
    said = "there is no node 'tokyo/nope', only tokyo/tokyo-1"
    check_refusal(tabane("kill", "tokyo/nope:42"), 1, said)


def test_many_refusals_of_a_kind_are_counted(tabane: Run, pretended: Pretended) -> None:
    rows = [ROW | {"pid": 1000 + n, "start_ticks": n} for n in range(12)]

    def denied(target: dict[str, Any]) -> dict[str, Any]:
        error = "stale" if target["pid"] == 1011 else "denied"
        return {"error": error, "message": f"tokyo/tokyo-1:{target['pid']} is not yours"}

    cluster_of(pretended, *rows, outcome=denied)
    ended = tabane("renice", "5", *(f"tokyo/tokyo-1:{row['pid']}" for row in rows))
    assert (ended.code, ended.out) == (1, "")
    lines = ended.err.splitlines()
    assert lines[0] == "tabane: renice: tokyo/tokyo-1:1000 is not yours"
    assert lines[4:] == [
        "tabane: renice: tokyo/tokyo-1:1004 is not yours",
        "tabane: renice: tokyo/tokyo-1:1011 is not yours",
        "tabane: renice: 6 more in the same way: denied",
    ]
