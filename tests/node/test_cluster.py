"""What is decided before a local cluster is started or stopped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tabane.errors import Conflict, Denied, UsageError
from tabane.model import NodeName
from tabane.network.uplink import ClusterNetwork
from tabane.node.cluster import check_driver, check_owner, choose_control, former_shape
from tabane.node.config import ClusterConfig, NodeConfig, NodePaths, Peer, node_directory, save

TOKYO, OSAKA, NAHA = (NodeName(f"{dc}/{dc}-1") for dc in ("tokyo", "osaka", "naha"))


@pytest.fixture
def before(tmp_path: Path) -> ClusterConfig:
    """A cluster of tokyo and osaka was below `tmp_path`, and has stored something."""
    peers = tuple(Peer(dc, f"{dc}-{n}", "") for dc in ("tokyo", "osaka") for n in (1, 2))
    cluster = ClusterConfig("c1", peers, TOKYO, ClusterNetwork("c1", "10.0.0.0/24"))
    save(tmp_path / "cluster.json", cluster)
    paths = NodePaths(node_directory(tmp_path, TOKYO))
    paths.directory.mkdir(parents=True)
    paths.store.write_bytes(b"")
    node = NodeConfig(
        cluster, peers[0], "", "", "", "", gateways=2, driver="runc", allow_emulation=True
    )
    save(paths.config, node)
    return cluster


def test_the_first_node_holds_a_new_store(tmp_path: Path) -> None:
    assert choose_control(tmp_path, [OSAKA, TOKYO]) == OSAKA
    assert former_shape(tmp_path) is None


def test_the_store_stays_where_it_is(tmp_path: Path, before: ClusterConfig) -> None:
    assert choose_control(tmp_path, [NAHA, OSAKA, TOKYO]) == TOKYO


def test_a_cluster_without_the_node_of_the_store_is_refused(
    tmp_path: Path, before: ClusterConfig
) -> None:
    with pytest.raises(Conflict, match=r"stored on tokyo/tokyo-1.*--datacenters tokyo,osaka,"):
        choose_control(tmp_path, [OSAKA])
    NodePaths(node_directory(tmp_path, TOKYO)).store.unlink()
    assert choose_control(tmp_path, [OSAKA]) == OSAKA


def test_a_stopped_cluster_is_remembered_as_it_was(tmp_path: Path, before: ClusterConfig) -> None:
    assert former_shape(tmp_path) == (["tokyo", "osaka"], 2, 2, "runc", True, 0, 0, 0, 0)
    NodePaths(node_directory(tmp_path, TOKYO)).config.unlink()
    assert former_shape(tmp_path) == (["tokyo", "osaka"], 2, 1, "", False, 0, 0, 0, 0)


def test_another_user_s_cluster_is_left_alone(
    tmp_path: Path, before: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_owner(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(Denied, match=r"belongs to .*: use sudo"):
        check_owner(tmp_path)


def test_drivers_are_named(tmp_path: Path) -> None:
    check_driver("")
    check_driver("runc")
    for name in ("nope", "fake"):
        with pytest.raises(UsageError, match=f"none named '{name}', only crun, runc"):
            check_driver(name)
