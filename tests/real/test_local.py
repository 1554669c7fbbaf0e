"""Local nodes with real namespaces, a real bridge and real cgroups."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tabane.errors import EngineError, TimedOut, UsageError
from tabane.network import links, netlink, uplink
from tabane.network.netlink import Rtnetlink, run_in_network_of
from tabane.network.uplink import ClusterNetwork, set_up_network, tear_down_network
from tabane.node.cgroups import find_hierarchies, parse_hierarchies, remove_cgroups
from tabane.node.local import (
    NodeProcess,
    NodeSpec,
    ask_to_end,
    entry_script,
    missing,
    start_node,
    stop_node,
)
from tabane.tools.probing import probe_machine

pytestmark = pytest.mark.real

SILENCE_S = 0.4
ANSWER_S = 60.0
SLEEP = ("sleep", "infinity")
OBEY = ("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done")

Start = Callable[..., NodeProcess]


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def connects(address: object, port: int) -> bool:
    try:
        socket.create_connection((str(address), port), SILENCE_S).close()
    except OSError:
        return False
    return True


def listener(address: object, port: int) -> socket.socket:
    return socket.create_server((str(address), port))


@pytest.fixture
def make_cluster() -> Iterator[Callable[[], ClusterNetwork]]:
    made: list[ClusterNetwork] = []

    def make() -> ClusterNetwork:
        made.append(set_up_network(f"t{secrets.token_hex(3)}"))
        return made[-1]

    yield make
    for network in made:
        tear_down_network(network)
        assert not [name for name in interfaces() if network.cluster in name]


@pytest.fixture
def cluster(make_cluster: Callable[[], ClusterNetwork]) -> ClusterNetwork:
    return make_cluster()


@pytest.fixture
def start(cluster: ClusterNetwork, tmp_path: Path) -> Iterator[Start]:
    started: list[tuple[ClusterNetwork, NodeProcess]] = []

    def start_one(
        number: int, *argv: str, network: ClusterNetwork = cluster, **options
    ) -> NodeProcess:
        name = f"n{number}"
        log = tmp_path / f"{network.cluster}-{name}.log"
        cgroup = f"/tabane/{network.cluster}/{name}"
        spec = NodeSpec(name, number, argv or SLEEP, log, cgroup)
        started.append((network, start_node(network, spec, **options)))
        return started[-1][1]

    yield start_one
    for network, node in started:
        stop_node(network, node, timeout_s=0)
        assert not node.runs


def read_when(log: Path, word: str) -> str:
    """The log once `word` is in it."""
    with subprocess.Popen(["tail", "-n+1", "-f", log], stdout=subprocess.PIPE, text=True) as tail:
        text = ""
        assert tail.stdout is not None
        timer = threading.Timer(ANSWER_S, tail.kill)
        timer.start()
        while word not in text and (line := tail.stdout.readline()):
            text += line
        timer.cancel()
        timer.join()
        tail.kill()
    assert word in text
    return text


def test_this_machine_has_what_local_nodes_need() -> None:
    assert missing() == []


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    lacks = "; ".join(missing())
    assert "need root" in lacks
    assert "the program nft is not installed: install nftables" in lacks
    assert "the program unshare is not installed: install util-linux" in lacks


def test_a_node_has_namespaces_of_its_own_and_is_connected(
    cluster: ClusterNetwork, start: Start, tmp_path: Path
) -> None:
    show = "ls /sys/class/net; echo pid $$; ls -d /proc/[0-9]*; grep cgroup /proc/mounts; echo end"
    node = start(1, "sh", "-c", f"{show}; exec sleep infinity")
    text = read_when(tmp_path / f"{cluster.cluster}-n1.log", "end")
    assert {"lo", "uplink", "pid 1"} <= set(text.splitlines())
    assert cluster.bridge not in text
    assert f"/proc/{os.getpid()}" not in text.split()
    points = [line.split()[1] for line in text.splitlines() if line.startswith("cgroup")]
    assert points
    assert len(points) == len(set(points))
    for kind in ("net", "pid", "mnt"):
        own = Path(f"/proc/{node.pid}/ns/{kind}").readlink()
        assert own != Path(f"/proc/self/ns/{kind}").readlink()
    assert Path(f"/proc/{node.pid}/stat").read_text().split()[5] == str(node.pid), "own session"


def test_nodes_reach_each_other_and_the_machine_reaches_them(
    cluster: ClusterNetwork, start: Start
) -> None:
    nodes = [start(number) for number in (1, 2, 3)]
    addresses = [cluster.node_address(number) for number in (1, 2, 3)]
    servers = [
        run_in_network_of(node.pid, lambda a=address: listener(a, 8000))
        for node, address in zip(nodes, addresses, strict=True)
    ]
    try:
        for address in addresses:
            assert connects(address, 8000)
            for node in nodes:
                assert run_in_network_of(node.pid, lambda a=address: connects(a, 8000))
    finally:
        for server in servers:
            server.close()


def test_clusters_side_by_side_do_not_reach_each_other(
    make_cluster: Callable[[], ClusterNetwork], cluster: ClusterNetwork, start: Start
) -> None:
    other = make_cluster()
    assert not other.network.overlaps(cluster.network)
    here, there = start(1), start(1, network=other)
    address = other.node_address(1)
    with run_in_network_of(there.pid, lambda: listener(address, 8000)):
        assert connects(address, 8000)
        assert not run_in_network_of(here.pid, lambda: connects(address, 8000))


def test_nodes_get_out_looking_like_the_machine(cluster: ClusterNetwork, start: Start) -> None:
    node = start(1)
    outside = int(subprocess.check_output(links.park_command("test-outside", 0).argv))
    port = f"out{cluster.cluster}"
    here, there = (netlink.IPv4Address(f"198.51.100.{n}") for n in (1, 2))
    try:
        with Rtnetlink() as machine, run_in_network_of(outside, Rtnetlink) as inside:
            macs = bytes.fromhex("027a00000001"), bytes.fromhex("027a00000002")
            machine.perform([netlink.new_veth(port, macs[0], "eth0", macs[1], outside)])
            machine.perform([netlink.add_address(machine.index(port), here, 24)])
            eth0 = inside.index("eth0")
            inside.perform([netlink.set_up(eth0), netlink.add_address(eth0, there, 24)])
            Path(f"/proc/sys/net/ipv4/conf/{port}/forwarding").write_text("1")
            with run_in_network_of(outside, lambda: listener(there, 9000)) as server:
                assert run_in_network_of(node.pid, lambda: connects(there, 9000))
                server.settimeout(ANSWER_S)
                accepted, source = server.accept()
                accepted.close()
                assert source[0] == str(here)
    finally:
        os.kill(outside, signal.SIGKILL)
        with Rtnetlink() as machine:
            machine.perform([netlink.delete_link(port)])


def test_stop_gives_the_program_time_and_removes_everything(
    cluster: ClusterNetwork, start: Start, tmp_path: Path
) -> None:
    node = start(1, *OBEY)
    log = tmp_path / f"{cluster.cluster}-n1.log"
    read_when(log, "ready")
    cgroups = [root / node.cgroup.lstrip("/") for root in find_hierarchies().roots]
    for cgroup in cgroups:
        (cgroup / "instance").mkdir()
    assert cluster.port(1) in interfaces()
    stop_node(cluster, node, timeout_s=30)
    assert log.read_text() == "ready\nbye\n"
    assert not node.runs
    assert cluster.port(1) not in interfaces()
    assert not any(cgroup.parent.exists() for cgroup in cgroups)
    stop_node(cluster, node)


def test_what_does_not_obey_is_killed_with_all_it_started(
    cluster: ClusterNetwork, start: Start, tmp_path: Path
) -> None:
    node = start(1, "sh", "-c", "sleep infinity & trap '' TERM; echo ready; wait")
    read_when(tmp_path / f"{cluster.cluster}-n1.log", "ready")
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    stop_node(cluster, node, timeout_s=0.05)
    assert not node.runs
    assert children
    assert not any(Path("/proc", pid).exists() for pid in children)


def test_one_that_would_not_hear_term_yet_is_not_waited_for(
    cluster: ClusterNetwork, start: Start
) -> None:
    node = start(1, "sleep", "infinity")
    ask_to_end(node)
    stop_node(cluster, node, timeout_s=3600)
    assert not node.runs
    ask_to_end(node)


def test_after_a_crash_the_records_are_enough(cluster: ClusterNetwork, start: Start) -> None:
    remembered: list[bytes] = []
    node = start(1, remember=lambda node: remembered.append(msgspec.json.encode(node)))
    os.kill(node.pid, signal.SIGKILL)
    again = msgspec.json.decode(remembered[0], type=NodeProcess)
    network = msgspec.json.decode(msgspec.json.encode(cluster), type=ClusterNetwork)
    assert again == node
    for _ in range(2):
        stop_node(network, again)
        tear_down_network(network)
    assert not [name for name in interfaces() if cluster.cluster in name]


def test_a_node_outlives_its_starter(cluster: ClusterNetwork, tmp_path: Path) -> None:
    program = """
import sys, msgspec
from pathlib import Path
from tabane.network.uplink import ClusterNetwork
from tabane.node.local import NodeSpec, start_node
network = msgspec.json.decode(sys.argv[1], type=ClusterNetwork)
spec = NodeSpec("n1", 1, ("sleep", "infinity"), Path(sys.argv[2]), "/tabane/none/n1")
print(msgspec.json.encode(start_node(network, spec)).decode())
"""
    argv = [sys.executable, "-c", program, msgspec.json.encode(cluster), str(tmp_path / "log")]
    node = msgspec.json.decode(subprocess.check_output(argv), type=NodeProcess)
    try:
        assert node.runs
    finally:
        stop_node(cluster, node, timeout_s=0)


def test_nothing_is_left_of_a_node_that_cannot_be_connected(tmp_path: Path) -> None:
    nowhere = ClusterNetwork("tnowhere", "10.255.255.0/24")
    spec = NodeSpec("n1", 1, SLEEP, tmp_path / "log", "/tabane/none/n1")
    remembered: list[NodeProcess] = []
    with pytest.raises(EngineError, match="no interface tbntnowhere"):
        start_node(nowhere, spec, remember=remembered.append)
    assert not remembered
    assert nowhere.port(1) not in interfaces()


def test_a_node_ends_when_its_starter_dies_before_it_was_remembered(
    cluster: ClusterNetwork, tmp_path: Path
) -> None:
    seen: list[NodeProcess] = []

    def fail(node: NodeProcess) -> None:
        seen.append(node)
        raise OSError("the disk is full")

    spec = NodeSpec("n1", 1, SLEEP, tmp_path / "log", "/tabane/none/n1")
    with pytest.raises(OSError, match="disk is full"):
        start_node(cluster, spec, remember=fail)
    assert not seen[0].runs
    assert cluster.port(1) not in interfaces()


@pytest.mark.parametrize("cluster_id", ["", "ABC", "toolonganame", "a/b", "a b"])
def test_bad_cluster_ids_are_refused(cluster_id: str) -> None:
    with pytest.raises(UsageError, match="cluster id"):
        set_up_network(cluster_id)


def test_the_last_cluster_restores_forwarding(
    make_cluster: Callable[[], ClusterNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "eth9").mkdir(parents=True)
    switch = tmp_path / "conf" / "eth9" / "forwarding"
    switch.write_text("0\n")
    monkeypatch.setattr(uplink, "_RUN", tmp_path)
    monkeypatch.setattr(uplink, "_CONF", tmp_path / "conf")
    for _ in range(2):
        uplink._forward_from("eth9")
        assert switch.read_text() == "1"
    uplink._restore_forwarding()
    assert switch.read_text() == "0"
    switch.write_text("1\n")
    uplink._forward_from("eth9")
    uplink._restore_forwarding()
    assert switch.read_text() == "1\n", "it was on before us"


def test_a_cgroup_with_processes_is_not_removed() -> None:
    name = f"/tabane/t{secrets.token_hex(3)}"
    root = find_hierarchies().roots[0]
    directory = root / name.lstrip("/") / "instance"
    directory.mkdir(parents=True)
    with subprocess.Popen(SLEEP) as process:
        (directory / "cgroup.procs").write_text(str(process.pid))
        with pytest.raises(TimedOut, match="still has processes"):
            remove_cgroups(name, timeout_s=0)
        threading.Timer(0.05, process.kill).start()
        remove_cgroups(name, timeout_s=ANSWER_S)
    assert not directory.parent.exists()


def test_hierarchies_are_told_apart() -> None:
    v1 = "30 29 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    v2 = "31 29 0:26 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n"
    hybrid = parse_hierarchies(v1 + "32 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + v2)
    assert hybrid == ((Path("/sys/fs/cgroup/cpu"),), (Path("/sys/fs/cgroup/unified"),))
    assert hybrid.is_hybrid
    assert not parse_hierarchies(v1).is_hybrid
    assert not parse_hierarchies(v2).is_hybrid
    assert "umount '/a b'" in entry_script([Path("/a b")])


def test_drivers_are_probed_without_a_cluster() -> None:
    found = probe_machine()
    assert found["lacks"] == []
    works = {row["driver"]: row["works"] for row in found["drivers"]}
    assert {name for name, does in works.items() if does} >= {"crun", "runc", "runsc", "wasmtime"}
    assert all(row["reason"] for row in found["drivers"])


def test_the_last_cluster_takes_the_lock_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uplink, "_RUN", tmp_path / "run")
    network = set_up_network(f"t{secrets.token_hex(3)}")
    lock = tmp_path / "run/network.lock"
    assert lock.exists()
    with uplink._locked():
        waiting = threading.Thread(target=tear_down_network, args=(network,))
        waiting.start()
        lock.parent.rename(tmp_path / "gone")  # in one step: who waits may make it anew
    waiting.join()
    others = [name for name in interfaces() if name.startswith("tbn")]
    assert lock.parent.exists() is bool(others)
