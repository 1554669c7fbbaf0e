"""Checkpoints in a cluster, as far as its nodes keep them: the commands, the memory, the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.real.conftest import LocalCluster, wait_for

from tabane.node.config import NodePaths, node_directory

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"


def memory_mounts(cluster: LocalCluster) -> list[str]:
    """Options of what a node has mounted for opened checkpoints."""
    text = Path(f"/proc/{cluster.holder(NODE)}/mounts").read_text()
    lines = (line.split() for line in text.splitlines())
    return [words[3] for words in lines if words[1].endswith("/run/checkpoints")]


def test_every_node_can_keep_some(cluster: LocalCluster) -> None:
    ended = cluster.tabane("checkpoint", "ls", "--json")
    told = json.loads(ended.out)
    assert (ended.code, told["checkpoints"], told["silent"]) == (0, [], [])
    assert len(told["stores"]) == 3
    for store in told["stores"]:
        assert store["problem"] == "" and store["used_bytes"] == store["memory_used_bytes"] == 0
        assert store["limit_bytes"] > 1 << 20 and store["memory_limit_bytes"] > 1 << 20
    assert cluster.tabane("checkpoint", "gc").out == "nothing removed\n"
    ended = cluster.tabane("checkpoint", "rm", "hello")
    assert ended.code == 1 and "no node has a checkpoint 'hello'" in ended.err


def test_the_plain_ones_are_in_memory_of_their_own(cluster: LocalCluster) -> None:
    (options,) = memory_mounts(cluster)
    assert {"nosuid", "nodev", "mode=711"} < {*options.split(",")}
    paths = NodePaths(node_directory(cluster.root, NODE))
    assert paths.checkpoint_key.stat().st_mode & 0o777 == 0o600
    key = paths.checkpoint_key.read_bytes()
    cluster.kill("agentd")
    wait_for(lambda: cluster.answers(NODE), "the agent")
    assert len(memory_mounts(cluster)) == 1 and paths.checkpoint_key.read_bytes() == key


def test_a_node_with_another_key_says_so_and_runs(cluster: LocalCluster) -> None:
    paths = NodePaths(node_directory(cluster.root, NODE))
    key = paths.checkpoint_key.read_bytes()
    paths.checkpoint_key.write_bytes(key[:-1])
    cluster.kill("agentd")
    wait_for(lambda: cluster.answers(NODE), "the agent")
    ended = cluster.tabane("checkpoint", "ls")
    assert ended.code == 0
    assert f"{NODE} has none: " in ended.err and "is no key of 32 bytes" in ended.err
    paths.checkpoint_key.write_bytes(key)
    cluster.kill("agentd")
    wait_for(lambda: cluster.answers(NODE), "the agent")
    assert cluster.tabane("checkpoint", "ls").err == ""
