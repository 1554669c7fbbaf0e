"""The tools over three data centers, as people type them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tabane.clock import SYSTEM

from .conftest import Ended, LocalCluster, wait_for

pytestmark = pytest.mark.real

NODES = ["ishikari/ishikari-1", "osaka/osaka-1", "tokyo/tokyo-1"]
ODD = """
name=$(printf 'od) (\\033[2J\\nd \\377')
ln -s "$(command -v sleep)" "/tmp/$name"
PATH=/tmp
exec "$name" 1000
"""
SHOWN = r"od) (\x1b[2J\nd \xff"


def good(ended: Ended) -> list[str]:
    """Its lines; it said nothing else."""
    assert (ended.code, ended.err) == (0, "")
    assert all(line.isprintable() for line in ended.out.splitlines())
    return ended.out.splitlines()


def places(lines: list[str]) -> list[str]:
    """The nodes that lines begin with, each once."""
    return sorted({"/".join(line.split()[:2]) for line in lines})


@pytest.fixture(scope="module")
def awake(cluster: LocalCluster) -> dict[str, Any]:
    """Instances by app; that of `far` is in osaka. Commands are asked of tokyo, the first node."""
    found = {}
    for app, at in (("far", "osaka"), ("victim", "ishikari"), ("herd", "tokyo")):
        cluster.deploy(app)
        found[app] = cluster.wake(app, at=at)
    return found


def processes(cluster: LocalCluster, *columns: str) -> list[list[str]]:
    argv = ("ps", "--app", "far", "--no-headers", "-o", ",".join(columns))
    return [line.split() for line in good(cluster.tabane(*argv))]


def test_ps_and_its_likes(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    assert places(good(cluster.tabane("ps", "aux"))[1:]) == NODES
    assert places(good(cluster.tabane("ps", "axo", "dc,node,pid,args"))[1:]) == NODES
    assert places(good(cluster.tabane("ps", "-ef", "--forest"))[1:]) == NODES
    found = processes(cluster, "dc", "class", "instance")
    assert found and all(row == ["osaka", "container", awake["far"]["id"]] for row in found)
    heads = [line.split("-")[0] for line in good(cluster.tabane("pstree")) if line[0] != " "]
    assert heads == [node.split("-")[0] for node in NODES]
    (drawn,) = [line for line in good(cluster.tabane("pstree", "-p")) if "[far,container]" in line]
    pids = good(cluster.tabane("pgrep", "--app", "far"))
    assert all(pid.startswith("osaka/osaka-1:") for pid in pids)
    assert f"({pids[0].partition(':')[2]})[far,container]" in drawn


def test_threads(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """An agent has several, a busybox one."""
    _, *lines = good(cluster.tabane("ps", "-eLo", "dc,node,pid,lwp,nlwp,comm"))
    assert places(lines) == NODES
    agents = [line.split() for line in lines if "tabane-agent" in line]
    assert any(pid != lwp for _, _, pid, lwp, *_ in agents)
    argv = ("ps", "-mo", "pid=,lwp=", "--app", "far", "-C", "busybox")
    ((pid, dash), (blank, lwp)) = [line.split() for line in good(cluster.tabane(*argv))]
    assert (dash, blank, lwp) == ("-", "-", pid)
    assert "{tabane-agent}" in cluster.tabane("pstree").out
    assert "{" not in cluster.tabane("pstree", "-T").out


@pytest.mark.parametrize(
    ("argv", "headings"),
    [
        ("free -h", 1),
        ("free -m -t -w", 1),
        ("uptime", 0),
        ("uptime -p", 0),
        ("df -h -T", 1),
        ("df -i /", 1),
        ("vmstat", 2),
        ("vmstat -s -S M", 0),
        ("lsof -a -c tabane -d txt", 1),
    ],
)
def test_figures_of_every_node(argv: str, headings: int, cluster: LocalCluster) -> None:
    lines = good(cluster.tabane(*argv.split()))
    assert places(lines[headings:]) == NODES
    shown = cluster.tabane(*argv.split(), "--json")
    assert shown.code == 0 and json.loads(shown.out)["silent"] == []
    lines = good(cluster.tabane(*argv.split(), "--dc", "osaka"))
    assert places(lines[headings:]) == ["osaka/osaka-1"]


def test_w(cluster: LocalCluster) -> None:
    lines = good(cluster.tabane("w"))
    assert places(lines[:3]) == NODES
    assert lines[3].split()[:3] == ["DC", "NODE", "USER"]


def test_vmstat_again(cluster: LocalCluster) -> None:
    lines = good(cluster.tabane("vmstat", "0.1", "2"))
    assert places(lines[2:5]) == places(lines[5:]) == NODES


def test_who_listens_at_a_port(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    argv = ("lsof", "-nP", "--app", "far", "-iTCP:8000", "-sTCP:LISTEN")
    _, *lines = good(cluster.tabane(*argv))
    assert lines and all("(LISTEN)" in line and " far container " in line for line in lines)
    listening, own = cluster.tabane(*argv, "-t"), cluster.tabane("pgrep", "--app", "far")
    assert set(good(listening)) <= set(good(own))


def test_renice_there(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    pid = good(cluster.tabane("pgrep", "--app", "far"))[0]
    (said,) = good(cluster.tabane("renice", "-n", "7", "-p", pid))
    assert said == f"{pid} (process ID) old priority 0, new priority 7"
    assert [pid, "7"] in processes(cluster, "gpid", "ni")
    ended = cluster.tabane("nice", "-n", "3", awake["far"]["id"], "nice")
    assert ended.code == 0 and ended.out.strip().isdigit()


def test_a_pid_of_several_nodes(cluster: LocalCluster) -> None:
    """Each node has a first process."""
    ended = cluster.tabane("kill", "-0", "1")
    assert (ended.code, ended.out) == (2, "")
    assert all(f"{node}:1 (" in ended.err for node in NODES)


def test_kill_there(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    instance = awake["victim"]["id"]
    assert good(cluster.tabane("kill", "-0", instance)) == []
    first = good(cluster.tabane("pgrep", "--app", "victim"))
    assert good(cluster.tabane("kill", "-KILL", instance)) == []
    wait_for(lambda: not cluster.instances("victim"), "its end")
    again = cluster.tabane("kill", first[0])
    assert (again.code, again.out) == (1, "")
    assert again.err == f"tabane: kill: no such process: {first[0]}\n"


def test_pkill_there(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    said = good(cluster.tabane("pkill", "-KILL", "-e", "--app", "herd", "httpd|busybox"))
    assert said and all(" killed (pid tokyo/tokyo-1:" in line for line in said)
    wait_for(lambda: not cluster.instances("herd"), "its end")
    assert cluster.tabane("pkill", "--app", "herd", "nothing-like-it").code == 1


def test_odd_names_move_no_cursor(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """Parentheses, escape sequences, newlines and what is no UTF-8, in name and command line."""
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
    argv = [*command, "exec", awake["far"]["id"], "--", "bash", "-c", ODD]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as odd:

        def listed() -> list[str]:
            lines = good(cluster.tabane("ps", "axwwo", "comm=,args="))
            return [line for line in lines if line.startswith("od)")]

        try:
            (line,) = wait_for(listed, "it in the list")
            assert line.split("1000")[0].split(SHOWN) == ["", " ", " "]
            (pid,) = good(cluster.tabane("pgrep", "-x", r"od\) \(.*", "--app", "far"))
            assert good(cluster.tabane("pgrep", "-l", "^od")) == [f"{pid} {SHOWN}"]
            assert any(f"{SHOWN}(" in one for one in good(cluster.tabane("pstree", "-p")))
            assert SHOWN in good(cluster.tabane("lsof", "-a", "-c", "od)", "-d", "cwd"))[1]
            assert good(cluster.tabane("kill", "-KILL", pid)) == []
            odd.wait(timeout=60)
        finally:
            odd.kill()


def test_a_hub_that_restarts_in_the_middle(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """Each node is either shown or named; what an order does it does once, or says that it does
    not know; and all is well again soon."""
    hub = cluster.part("hubd", "tokyo/tokyo-1")
    (pid,) = good(cluster.tabane("pgrep", "--app", "far", "-n"))
    before = int(processes(cluster, "ni")[-1][0])
    subprocess.run(["kill", "-KILL", str(hub)], check=True)
    ended = [cluster.tabane("ps", "-e"), cluster.tabane("free")]
    order = cluster.tabane("renice", "-n", "1", "--relative", "-p", pid)
    for one in ended:
        shown = places(one.out.splitlines()[1:])
        named = [node for node in NODES if node in one.err]
        assert sorted(shown + named) == NODES
        assert one.code == bool(named) and one.err.count("\n") <= 1
    cluster.wait_whole()
    assert places(good(cluster.tabane("ps", "-e"))[1:]) == NODES
    now = {row[0]: int(row[1]) for row in processes(cluster, "gpid", "ni")}[pid]
    assert now - before in ((1,) if order.code == 0 else (0, 1)), order


# A node that is gone: last, since it is gone then.


@pytest.fixture(scope="module")
def crippled(cluster: LocalCluster) -> Any:
    """osaka's agent hangs: it neither answers nor goes away."""
    agent = cluster.part("agentd", "osaka/osaka-1")
    subprocess.run(["kill", "-STOP", str(agent)], check=True)
    yield cluster
    subprocess.run(["kill", "-CONT", str(agent)], check=True)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("ps aux", 1),
        ("pstree", 1),
        ("free", 1),
        ("uptime", 1),
        ("w", 1),
        ("df", 1),
        ("vmstat", 1),
        ("lsof -a -c tabane -d txt", 1),
        ("pgrep -f tabane", 3),
    ],
)
def test_a_silent_node_is_named_and_costs_its_deadline_once(
    argv: str, code: int, crippled: LocalCluster
) -> None:
    from tabane.node.k2i import ASK_S

    began = SYSTEM.now()
    ended = crippled.tabane(*argv.split())
    took_s = SYSTEM.now() - began
    assert ended.code == code
    assert ended.err.startswith("tabane: no answer from osaka/osaka-1\n")
    assert "tokyo" in ended.out and "ishikari" in ended.out
    assert took_s < 2 * ASK_S, "the deadline was waited for twice"


def test_a_pid_that_a_silent_node_may_have_too(crippled: LocalCluster) -> None:
    pid = good(crippled.tabane("pgrep", "--dc", "tokyo", "-f", "agentd"))[0]
    ended = crippled.tabane("kill", "-0", pid.partition(":")[2])
    assert ended.code in (1, 2) and ended.out == ""
    assert "osaka/osaka-1 too, who did not answer" in ended.err or "several nodes" in ended.err
    assert good(crippled.tabane("kill", "-0", pid)) == []
