"""Orders between the nodes of a cluster, whose agents call each other directly."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tabane.clock import SYSTEM
from tabane.errors import (
    Busy,
    Closed,
    Conflict,
    Denied,
    NotFound,
    Refused,
    Stale,
    SystemFault,
    TabaneError,
    TimedOut,
    Unreachable,
    Unsupported,
)
from tabane.k2i import orders as do
from tabane.k2i.orders import Gpid, InstanceOrder, InstanceTarget, Nice, Order, Signal
from tabane.k2i.procfs import start_ticks
from tabane.model import (
    App,
    AppName,
    Generation,
    Instance,
    InstanceId,
    NodeName,
    Resources,
    State,
)
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node.config import Peer, agent_of
from tabane.node.orders import NodeSurroundings, Orders, with_pause
from tabane.node.records import Record, encode_record, parse_record
from tabane.node.session import HubSession
from tabane.runtimes import cgroups
from tabane.runtimes.api import Capabilities, Handle, Image
from tabane.security.audit import AuditLog, read_lines
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

ROOT = Principal("peer", 0, 0, 42)
ALICE = Principal("peer", 5001, 5001, 43)
NODES = tuple(Peer(dc, f"{dc}-1", "10.0.0.1") for dc in ("tokyo", "osaka", "ishikari"))
TOKYO, OSAKA, ISHIKARI = (peer.key for peer in NODES)


class FakeExecutor:
    def __init__(self) -> None:
        self.running: dict[str, Any] = {}
        self.signalled: list[str] = []
        self.freezer = SimpleNamespace(wait_awake=self.wait_awake)
        self.held: list[Any] = []
        self.saved: list[bytes] = []

    async def wait_awake(self, running: Any) -> None:
        self.held.append(running)

    def save(self, running: Any) -> None:
        self.saved.append(encode_record(running.record))

    def on_signal(self, instance: str) -> None:
        self.signalled.append(instance)

    def get(self, instance: str) -> Any:
        if instance not in self.running:
            raise NotFound(f"there is no instance {instance}")
        return self.running[instance]


class Node:
    """As much of an agent as orders need."""

    def __init__(self, cluster: Cluster, peer: Peer, directory: Path) -> None:
        self.config = SimpleNamespace(
            key=peer.key,
            incarnation=f"{peer.name}-now",
            cluster=SimpleNamespace(nodes=NODES, keys=(TOKYO, OSAKA, ISHIKARI)),
        )
        directory.mkdir()
        self.log = directory / "audit.log"
        self.audit = AuditLog(self.log)
        self.clock = SYSTEM
        self.tasks = cluster.tasks
        self.executor: Any = FakeExecutor()
        self.touched: list[int] = []
        self.table = SimpleNamespace(touch=self.touched.append)
        self.me = SimpleNamespace(call=self._call)
        self.calls = 0
        self.session = HubSession(SYSTEM)
        self.session.on_open()
        self._cluster = cluster
        self.orders = Orders(self)  # type: ignore[arg-type]

    async def _call(self, member: str, data: bytes, *, timeout_s: float) -> bytes:
        self.calls += 1
        return await self._cluster.deliver(agent_of(self.config.key), member, data)


class Cluster:
    """`faults`: what a call to a node raises, before or (`late`) after it was obeyed."""

    def __init__(self, directory: Path, tasks: Supervisor) -> None:
        self.tasks = tasks
        self.faults: dict[str, TabaneError] = {}
        self.late = False
        self.nodes = {peer.key: Node(self, peer, directory / peer.name) for peer in NODES}

    async def deliver(self, sender: str, member: str, data: bytes) -> bytes:
        node = member.rpartition("/")[0]
        if node in self.faults and not self.late:
            raise self.faults[node]
        try:
            answer = await self.nodes[NodeName(node)].orders.act(sender, say.parse(data))
        except TabaneError as error:
            answer = say.encode(say.to_failure(error))
        if node in self.faults:
            raise self.faults[node]
        return answer

    @property
    def orders(self) -> Orders:
        """Of the node that people ask."""
        return self.nodes[TOKYO].orders


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Supervisor("test") as tasks:
        cluster = Cluster(tmp_path, tasks)
        yield cluster
    for node in cluster.nodes.values():
        node.audit.close()


@contextmanager
def sleep() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "1000"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with sleep() as child:
        yield child


@pytest.fixture
def other_sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with sleep() as child:
        yield child


def at(node: str, pid: int) -> Gpid:
    dc, _, name = node.partition("/")
    return Gpid(dc, name, f"{name}-now", pid, start_ticks(pid))


async def test_each_node_gets_its_targets_once_in_their_order(
    cluster: Cluster, sleeper: subprocess.Popen[bytes]
) -> None:
    pid = sleeper.pid
    stale = msgspec.structs.replace(at(OSAKA, pid), incarnation="then")
    targets = (at(OSAKA, pid), at(TOKYO, pid), stale, at(ISHIKARI, pid), at(OSAKA, pid))
    outcomes = await cluster.orders.obey(Order(targets, Signal(0)), ROOT)
    assert [outcome.target for outcome in outcomes] == list(targets)
    assert [outcome.error for outcome in outcomes] == ["", "", "stale", "", ""]
    assert cluster.nodes[TOKYO].calls == 2
    lines = {key: read_lines(node.log) for key, node in cluster.nodes.items()}
    assert {key: len(found) for key, found in lines.items()} == {TOKYO: 2, OSAKA: 5, ISHIKARI: 2}
    assert {line.via for line in lines[OSAKA]} == {TOKYO}
    assert {line.via for line in lines[TOKYO]} == {""}
    assert {(line.uid, line.pid) for line in lines[OSAKA]} == {(0, 42)}


async def test_it_is_done_there_with_the_askers_rights(
    cluster: Cluster, sleeper: subprocess.Popen[bytes]
) -> None:
    target = at(OSAKA, sleeper.pid)
    (outcome,) = await cluster.orders.obey(Order((target,), Nice(7)), ALICE)
    assert outcome.error == "denied"
    (outcome,) = await cluster.orders.obey(Order((target,), Nice(7)), ROOT)
    assert (outcome.before, outcome.after) == (0, 7)
    assert os.getpriority(os.PRIO_PROCESS, sleeper.pid) == 7
    assert cluster.nodes[OSAKA].touched == [sleeper.pid]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (NotFound("no such member"), "unreachable", "nothing was done, osaka/osaka-1 cannot be"),
        (Unreachable("link is down"), "unreachable", "nothing was done, osaka/osaka-1 cannot be"),
        (Busy("too much waits"), "unreachable", "nothing was done, osaka/osaka-1 cannot be"),
        (Refused("takes no messages"), "unreachable", "nothing was done, osaka/osaka-1 cannot be"),
        (Refused("a bug", reason="error"), "unreachable", "did not say whether it was done"),
        (Closed("session ended"), "unreachable", "osaka/osaka-1 did not say whether it was done"),
        (TimedOut("no answer"), "timed_out", "the same order again is done once at most"),
    ],
)
async def test_a_dead_node_costs_only_its_own_targets(
    cluster: Cluster, sleeper: subprocess.Popen[bytes], fault: TabaneError, code: str, said: str
) -> None:
    cluster.faults[OSAKA] = fault
    targets = (at(OSAKA, sleeper.pid), at(TOKYO, sleeper.pid))
    dead, alive = await cluster.orders.obey(Order(targets, Signal(0)), ROOT)
    assert (dead.error, alive.error) == (code, "")
    assert said in dead.message


async def test_without_a_hub_nothing_is_sent_and_that_is_said(
    cluster: Cluster, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.node.calling.HUB_BACK_S", 0.0)
    cluster.nodes[TOKYO].session.on_lost()
    targets = (at(OSAKA, sleeper.pid), at(TOKYO, sleeper.pid))
    lost, own = await cluster.orders.obey(Order(targets, Signal(0)), ROOT)
    assert (lost.error, own.error) == ("unreachable", "")
    assert lost.message.startswith("nothing was done, osaka/osaka-1 cannot be told now: ")
    assert cluster.nodes[TOKYO].calls == 0


async def test_a_repeat_reaches_only_who_did_not_answer(
    cluster: Cluster, sleeper: subprocess.Popen[bytes], other_sleeper: subprocess.Popen[bytes]
) -> None:
    """Both nodes had obeyed, and the answer of one was lost."""
    targets = (at(OSAKA, sleeper.pid), at(ISHIKARI, other_sleeper.pid))
    order = Order(targets, Nice(1, relative=True), key="once")
    cluster.faults, cluster.late = {OSAKA: Closed("the link died")}, True
    first = await cluster.orders.obey(order, ROOT)
    assert [outcome.error for outcome in first] == ["unreachable", ""]
    nice = partial(os.getpriority, os.PRIO_PROCESS)
    assert [nice(sleeper.pid), nice(other_sleeper.pid)] == [1, 1]
    cluster.faults.clear()
    again = await cluster.orders.obey(order, ROOT)
    assert [outcome.error for outcome in again] == ["", ""]
    assert [nice(sleeper.pid), nice(other_sleeper.pid)] == [1, 1]


async def test_a_key_for_two_orders_is_refused_there(
    cluster: Cluster, sleeper: subprocess.Popen[bytes]
) -> None:
    target = at(OSAKA, sleeper.pid)
    await cluster.orders.obey(Order((target,), Signal(0), key="k"), ROOT)
    (outcome,) = await cluster.orders.obey(Order((target,), Nice(1), key="k"), ROOT)
    assert outcome.error == Conflict.code


@pytest.mark.parametrize("node", ["kobe/kobe-1", ""])
async def test_a_node_that_is_not_there(cluster: Cluster, node: str) -> None:
    dc, _, name = node.partition("/")
    target = Gpid(dc, name, "now", 7, 100)
    (outcome,) = await cluster.orders.obey(Order((target,), Signal(0)), ROOT)
    assert outcome.error == "not_found"
    assert f"there is no node {node or 'without a name'}" in outcome.message


async def test_an_order_without_sense_goes_nowhere(cluster: Cluster) -> None:
    target = Gpid("osaka", "osaka-1", "now", 7, 100)
    with pytest.raises(Denied, match="force is for root"):
        await cluster.orders.obey(Order((target,), Signal(9), force=True), ALICE)
    assert cluster.nodes[TOKYO].calls == 0
    assert [line.outcome for line in read_lines(cluster.nodes[TOKYO].log)] == ["refused"]


@pytest.mark.parametrize("sender", ["kobe/kobe-1/agent", f"{TOKYO}/gateway-0", "default/x-1/agent"])
async def test_only_agents_pass_orders_on(cluster: Cluster, sender: str) -> None:
    order = Order((Gpid("osaka", "osaka-1", "now", 7, 100),), Signal(9))
    with pytest.raises(Denied, match="is no agent of this cluster"):
        await cluster.nodes[OSAKA].orders.act(sender, wire.ActK2i(order, ROOT))


def test_what_the_holder_started_is_the_nodes_own() -> None:
    executor: Any = FakeExecutor()
    executor.running["abc"] = SimpleNamespace(record=SimpleNamespace(app=App("a", "host", owner=5)))
    around = NodeSurroundings(executor, 77)
    assert around.protects(77, 1, "") == "the holder of its node"
    assert around.protects(80, 77, "") == "a process of Tabane's own"
    assert around.protects(80, 77, "abc") == ""
    assert around.protects(81, 80, "") == ""
    assert (around.owner("abc"), around.owner("gone")) == (5, -1)


async def test_whose_instance_gets_a_signal_by_order_is_told_before(
    cluster: Cluster, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.node.orders.instance_at", lambda pid: f"of-{pid}")
    told = cluster.nodes[OSAKA].executor.signalled
    target = at(OSAKA, sleeper.pid)
    for order in (
        Order((target,), Signal(0)),
        Order((target,), Signal(signal.SIGCONT)),
        Order((target,), Signal(signal.SIGTERM), dry_run=True),
        Order((target,), Nice(1)),
    ):
        await cluster.orders.obey(order, ROOT)
    (refused,) = await cluster.orders.obey(Order((target,), Signal(signal.SIGTERM)), ALICE)
    assert refused.error == Denied.code
    assert told == []
    await cluster.orders.obey(Order((target,), Signal(signal.SIGTERM)), ROOT)
    assert told == [f"of-{sleeper.pid}"]


class Driver:
    """Freezes, and sets the processors, by the files of a made-up cgroup; remembers `limits`."""

    name = "fake"

    def __init__(self, state: Path) -> None:
        self.capabilities = Capabilities(freeze=True, limit=True)
        self.state = state
        self.on_freeze = lambda: None
        self.limits: list[Resources] = []
        self.problem: TabaneError | None = None

    async def freeze(self, handle: Handle) -> None:
        self.state.write_text("FROZEN")
        self.on_freeze()

    async def thaw(self, handle: Handle) -> None:
        self.state.write_text("THAWED")

    async def limit(self, handle: Handle, resources: Resources) -> None:
        if self.problem is not None:
            raise self.problem
        self.limits.append(resources)
        self.state.with_name("cpu.cfs_quota_us").write_text(f"{resources.cpu * 100000:.0f}\n")


@pytest.fixture
def running(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An instance `abc` of Alice's app on osaka-1, with the limits that it declares."""
    roots = dict.fromkeys(("cpu", "cpuacct", "freezer", "memory", "pids"), tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "find_hierarchies", lambda: roots)
    directory = tmp_path / "cgroup/t/abc"
    directory.mkdir(parents=True)
    files = {
        "cpu.cfs_quota_us": 100000,
        "cpu.cfs_period_us": 100000,
        "pids.max": 100,
        "memory.limit_in_bytes": 64 << 20,
        "freezer.state": "THAWED",
    }
    for name, value in files.items():
        (directory / name).write_text(f"{value}\n")
    app = App("a", "host", owner=5001, resources=Resources(1.0, 64 << 20, 100))
    generation = Generation("osaka-1-now", InstanceId("abc"), 3)
    instance = Instance(
        InstanceId("abc"), AppName("default/a"), 1, OSAKA, generation, State.READY, cgroup="/t/abc"
    )
    handle = Handle("fake", 1, InstanceId("abc"), {})
    record = Record(instance, app, Image("host", Path("/")), handle=handle)
    driver = Driver(directory / "freezer.state")
    running = SimpleNamespace(record=record, instance=instance, driver=driver, stopping=False)
    cluster.nodes[OSAKA].executor.running["abc"] = running
    return running


TARGET = InstanceTarget(OSAKA, Generation("osaka-1-now", InstanceId("abc"), 3))


@pytest.mark.usefixtures("running")
async def test_an_instance_is_paused_and_resumed_by_its_owner(cluster: Cluster) -> None:
    for action, before, after in ((do.Pause(), 0, 1), (do.Pause(), 1, 1), (do.Resume(), 1, 0)):
        dry = InstanceOrder(TARGET, action, dry_run=True)
        order = InstanceOrder(TARGET, action)
        would = await cluster.orders.obey_instance(dry, ALICE)
        done = await cluster.orders.obey_instance(order, ALICE)
        assert would == done
        assert (done.before, done.after) == ({"paused": before}, {"paused": after})
    lines = read_lines(cluster.nodes[OSAKA].log)
    assert [line.outcome for line in lines] == ["would", "doing", "done"] * 3
    assert {(line.target, line.process) for line in lines} == {("osaka/osaka-1:abc", "default/a")}


async def test_who_asks_what_runs_is_told_what_is_paused(cluster: Cluster, running: Any) -> None:
    assert with_pause(running.instance) == running.instance
    await cluster.orders.obey_instance(InstanceOrder(TARGET, do.Pause()), ALICE)
    assert with_pause(running.instance) == msgspec.structs.replace(running.instance, paused=True)
    frozen = msgspec.structs.replace(running.instance, state=State.FROZEN)
    assert with_pause(frozen) == frozen, "by its life cycle"
    absent = msgspec.structs.replace(running.instance, cgroup="")
    assert with_pause(absent) == absent


async def test_limits_are_the_owners_within_what_the_app_declares(
    cluster: Cluster, running: Any
) -> None:
    order = InstanceOrder(TARGET, do.Confine(cpu=0.5, pids=50))
    done = await cluster.orders.obey_instance(order, ALICE)
    assert done.before == {"cpu": 1.0, "memory_bytes": 64 << 20, "pids": 100}
    assert done.after == {"cpu": 0.5, "memory_bytes": 64 << 20, "pids": 50}
    assert running.driver.limits == [running.record.ordered]
    (saved,) = cluster.nodes[OSAKA].executor.saved
    assert parse_record(saved) == running.record, "the next agent knows them, too"
    more = InstanceOrder(TARGET, do.Confine(memory_bytes=65 << 20))
    with pytest.raises(Denied, match="the app declares 67108864: only root may give"):
        await cluster.orders.obey_instance(more, ALICE)
    done = await cluster.orders.obey_instance(more, ROOT)
    assert done.after["memory_bytes"] == 65 << 20


async def test_limits_are_the_drivers_to_set(cluster: Cluster, running: Any) -> None:
    """In its cgroup may be more than the app's, and some cannot change."""
    order = InstanceOrder(TARGET, do.Confine(memory_bytes=40 << 20))
    running.driver.problem = Unsupported("set at its start")
    with pytest.raises(Unsupported, match="set at its start"):
        await cluster.orders.obey_instance(order, ALICE)
    assert running.record.ordered is None, "what follows its sessions goes on"
    running.driver.problem = None
    running.driver.state.with_name("memory.limit_in_bytes").write_text(f"{164 << 20}\n")
    done = await cluster.orders.obey_instance(order, ALICE)
    assert (done.before["memory_bytes"], done.after["memory_bytes"]) == (64 << 20, 40 << 20)
    running.driver.capabilities = Capabilities(freeze=True)
    for dry_run in (True, False):
        order = InstanceOrder(TARGET, do.Confine(pids=50), dry_run=dry_run)
        with pytest.raises(Unsupported, match="its driver fake cannot change limits"):
            await cluster.orders.obey_instance(order, ALICE)


@pytest.mark.usefixtures("running")
async def test_another_users_instance(cluster: Cluster) -> None:
    order = InstanceOrder(TARGET, do.Pause())
    with pytest.raises(Denied, match="another user's app"):
        await cluster.orders.obey_instance(order, Principal("peer", 5002))
    (line,) = read_lines(cluster.nodes[OSAKA].log)
    assert (line.outcome, line.uid) == ("refused", 5002)


async def refusal(cluster: Cluster, target: InstanceTarget = TARGET) -> TabaneError:
    with pytest.raises(TabaneError) as raised:
        await cluster.orders.obey_instance(InstanceOrder(target, do.Pause(), key="k"), ROOT)
    return raised.value


async def test_instances_that_cannot_be_paused(cluster: Cluster, running: Any) -> None:
    stale = InstanceTarget(OSAKA, Generation("osaka-1-now", InstanceId("abc"), 2))
    assert isinstance(await refusal(cluster, stale), Stale)
    gone = InstanceTarget(OSAKA, Generation("osaka-1-now", InstanceId("gone"), 3))
    assert isinstance(await refusal(cluster, gone), NotFound)
    running.driver.capabilities = Capabilities()
    assert isinstance(await refusal(cluster), Unsupported)
    running.driver.capabilities = Capabilities(freeze=True)
    running.stopping = True
    assert isinstance(await refusal(cluster), Conflict)
    running.stopping = False
    cluster.faults[OSAKA] = Closed("gone")
    assert isinstance(await refusal(cluster), Unreachable)


async def test_one_that_is_stopped_meanwhile_is_not_left_frozen(
    cluster: Cluster, running: Any
) -> None:
    """A frozen one would never end."""

    def stop() -> None:
        running.stopping = True

    running.driver.on_freeze = stop
    error = await refusal(cluster)
    assert "is being stopped, and was not paused" in error.message
    assert running.driver.state.read_text() == "THAWED"


async def test_a_fault_of_the_machine_is_told(cluster: Cluster, running: Any) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    running.driver.on_freeze = fail
    error = await refusal(cluster)
    assert isinstance(error, SystemFault)
    assert error.message == "osaka/osaka-1:abc: [Errno 5] Input/output error"
    assert read_lines(cluster.nodes[OSAKA].log)[-1].outcome == "failed"


async def test_a_repeated_key_is_one_change(cluster: Cluster, running: Any) -> None:
    order = InstanceOrder(TARGET, do.Confine(pids=50), key="once")
    first = await cluster.orders.obey_instance(order, ALICE)
    await cluster.orders.obey_instance(InstanceOrder(TARGET, do.Confine(pids=60)), ALICE)
    assert await cluster.orders.obey_instance(order, ALICE) == first
    assert [limits.pids for limits in running.driver.limits] == [50, 60]
