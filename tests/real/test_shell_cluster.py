"""`tabane shell` over a cluster of three data centers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from tests.real.at_terminal import at_terminal
from tests.real.conftest import LocalCluster

from tabane.tools.procfs.numbers import FIRST

pytestmark = pytest.mark.real

SLEEPER = ["sh", "-c", "sleep 4321 & sleep 4322 & exec busybox httpd -f -p 8000 -h /tmp"]


@pytest.fixture(scope="module")
def sleeping(cluster: LocalCluster) -> LocalCluster:
    """A cluster with an instance of `sleeper` in tokyo."""
    cluster.deploy("sleeper", ["sh", "-c", f"echo here >/tmp/index.html; {SLEEPER[2]}"])
    cluster.wake("sleeper", path="/")
    return cluster


def test_three_data_centers(sleeping: LocalCluster) -> None:
    ended = sleeping.tabane("shell", "-c", "cat /proc/tabane/nodes; ps -ww -e -o pid=,user=,args=")
    assert (ended.code, ended.err) == (0, "")
    nodes = [line.split()[0] for line in ended.out.splitlines()[1:4]]
    assert nodes == ["tokyo/tokyo-1", "osaka/osaka-1", "ishikari/ishikari-1"]
    for node in nodes:
        line = re.compile(rf"^ *([0-9]+) root .*tabane.node.agentd .*/{node}/", re.MULTILINE)
        (pid,) = line.findall(ended.out)
        assert int(pid) >= FIRST
    assert len(re.findall(r"sleep 432[12]$", ended.out, re.MULTILINE)) == 2


def test_signals_and_nice_values_reach_another_data_center(sleeping: LocalCluster) -> None:
    script = """
        renice -n 7 -p $(pgrep -fx "sleep 4322") && ps -o ni= -p $(pgrep -fx "sleep 4322")
        kill $(pgrep -fx "sleep 4321"); pgrep -fx "sleep 4321" || echo gone
        setpriv --reuid 65534 --clear-groups kill $(pgrep -fx "sleep 4322"); cat /proc/tabane/log
        kill $(pgrep -f tabane.node.agentd | tail -1)"""
    ended = sleeping.tabane("shell", "-c", script)
    lines = ended.out.splitlines()
    assert lines[1].strip() == "7"
    assert lines[2] == "gone"
    assert "another user's process" in ended.out
    assert ended.err.count("Operation not permitted") == 2, "nor is a node's own agent killed so"
    _, there = sleeping.inside("sleeper", "ps", "-e", "-o", "ni=,args=")
    assert re.search(r"^ *7 sleep 4322$", there, re.MULTILINE)
    assert not re.search(r"[0-9] sleep 4321$", there, re.MULTILINE)


def test_a_silent_node_vanishes_and_comes_back(sleeping: LocalCluster) -> None:
    agent = sleeping.part("agentd", "osaka/osaka-1")
    script = r"""
        all() { ps -ww -e -o args=; }
        seen() { all | grep -q 'nodes/osaka/[o]saka-1/'; }
        seen && echo up; read; while seen; do sleep 0.2; done; all | grep -c 'node.[a]gentd'
        read; until seen; do sleep 0.2; done; echo back"""
    argv = [sys.executable, "-m", "tabane.tools.cli", "--root", str(sleeping.root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*argv, "shell", "-c", script], stdin=pipe, stdout=pipe, text=True, bufsize=1
    ) as process:
        assert process.stdin and process.stdout
        try:
            assert process.stdout.readline() == "up\n"
            os.kill(agent, signal.SIGSTOP)
            process.stdin.write("\n")
            assert process.stdout.readline() == "2\n"
            os.kill(agent, signal.SIGCONT)
            process.stdin.write("\n")
            assert process.stdout.readline() == "back\n"
        finally:
            os.kill(agent, signal.SIGCONT)
            process.kill()


def test_the_prompt_says_where_one_is(sleeping: LocalCluster) -> None:
    argv = [sys.executable, "-m", "tabane.tools.cli", "--root", str(sleeping.root), "shell"]
    with at_terminal(argv, SHELL="/bin/bash") as type_keys:
        assert "/proc is the cluster's here" in type_keys(r"\(cluster\) ")
        type_keys(r"3\r?\n", "pgrep -fc tabane.node.agentd\r")
        type_keys("exit", "exit\r")
