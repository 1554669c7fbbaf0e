"""Orders across a cluster: to processes and instances of other nodes, also of one that is gone."""

import io
import json
import os
import re
import signal
import subprocess
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from tabane.errors import Conflict, Denied, NotFound, Stale, TabaneError
from tabane.tools.cli import run
from tabane.tools.client import Cluster

from .conftest import HTTPD, LocalCluster, find_cgroups, wait_for

pytestmark = pytest.mark.real

TOKYO, OSAKA, ISHIKARI = "tokyo/tokyo-1", "osaka/osaka-1", "ishikari/ishikari-1"
PLACE = ("dc", "node", "incarnation", "pid", "start_ticks")


def rows(cluster: LocalCluster, **wanted: Any) -> list[dict[str, Any]]:
    found = cluster.api.get("/v2/processes?scope=cluster", node=TOKYO)["processes"]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def servers(cluster: LocalCluster, app: str, count: int) -> list[dict[str, Any]]:
    """The web servers of an app with so many instances, once the copies of itself that each makes
    for a request have ended."""

    def alone() -> list[dict[str, Any]] | None:
        found = rows(cluster, app=f"default/{app}", name="busybox")
        return found if len(found) == count else None

    return wait_for(alone, f"the servers of {app} alone")


def server(cluster: LocalCluster, app: str) -> dict[str, Any]:
    """Of an app with one instance."""
    return servers(cluster, app, 1)[0]


def target(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in PLACE}


def order(
    cluster: LocalCluster, verb: str, targets: list[dict[str, Any]], **args: Any
) -> list[dict[str, Any]]:
    """Asked of tokyo."""
    body = {"targets": [target(row) for row in targets], **args}
    answer = cluster.api.post(f"/v2/processes/{verb}", body, node=TOKYO)
    outcomes: list[dict[str, Any]] = answer["outcomes"]
    return outcomes


def order_instance(
    cluster: LocalCluster, instance: dict[str, Any], verb: str, **args: Any
) -> dict[str, Any]:
    dc, _, node = instance["node"].partition("/")
    generation = instance["generation"]
    life = {"incarnation": generation["incarnation"], "counter": generation["counter"]}
    path = f"/v2/instances/{instance['id']}/{verb}"
    answer: dict[str, Any] = cluster.api.post(
        path, {"dc": dc, "node": node, **life, **args}, node=TOKYO
    )
    return answer


def curl(example: str, instead: dict[str, str]) -> dict[str, Any]:
    """What a command of the page answers, with other names in it."""
    for word, value in instead.items():
        example = example.replace(word, value)
    done = subprocess.run(["sh", "-c", example], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def as_user(uid: int, work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of that user; JSON goes through a pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            said = work()
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    result = json.loads(said)
    assert not isinstance(result, str), result
    return result


def test_one_order_reaches_processes_of_several_nodes(cluster: LocalCluster) -> None:
    cluster.deploy("many")
    for dc in ("tokyo", "osaka", "ishikari"):
        cluster.wake("many", dc)
    found = servers(cluster, "many", 3)
    assert {row["dc"] for row in found} == {"tokyo", "osaka", "ishikari"}
    reniced = order(cluster, "nice", found, nice=3)
    assert [(one["target"], one["before"], one["after"]) for one in reniced] == [
        (target(row), 0, 3) for row in found
    ]
    assert {row["nice"] for row in servers(cluster, "many", 3)} == {3}

    wrong = {**found[0], "start_ticks": found[0]["start_ticks"] + 1}
    then = {**found[1], "incarnation": "then"}
    outcomes = order(cluster, "signal", [wrong, then, found[2]], signal="KILL")
    assert [outcome.get("error", "") for outcome in outcomes] == ["stale", "stale", ""]
    gone = found[2]["pid"]
    wait_for(lambda: not rows(cluster, dc=found[2]["dc"], pid=gone), "the end of one")
    left = rows(cluster, app="default/many", name="busybox")
    assert {row["pid"] for row in found[:2]} <= {row["pid"] for row in left}


def test_every_line_is_in_the_log_of_the_node_that_did_it(cluster: LocalCluster) -> None:
    cluster.deploy("logged")
    cluster.wake("logged", "osaka")
    row = server(cluster, "logged")
    order(cluster, "affinity", [row], cpus=[0], idempotency_key="a key")
    log = cluster.root / "nodes" / OSAKA / "audit.log"
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    mine = [line for line in lines if line.get("key") == "a key"]
    assert [line["outcome"] for line in mine] == ["doing", "done"]
    for line in mine:
        assert line["target"] == f"{OSAKA}:{row['pid']}"
        assert line["start_ticks"] == row["start_ticks"]
        assert (line["action"], line["process"], line["via"]) == ("affinity 0", "busybox", TOKYO)
        assert (line["kind"], line["uid"]) == ("peer", 0)
    cluster.api.post(f"/api/v1/instances/{row['instance']}/stop", {}, node=TOKYO)
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    (line,) = [line for line in lines if line["action"] == "stop"]
    assert (line["kind"], line["uid"], line["via"]) == ("peer", 0, TOKYO)


def test_what_a_node_cannot_do_without_is_protected(cluster: LocalCluster) -> None:
    own = [row for row in rows(cluster, dc="osaka") if "tabane.node." in row["command"]]
    modules = {word for row in own for word in row["command"].split() if "tabane.node." in word}
    assert modules == {f"tabane.node.{part}" for part in ("holder", "agentd", "hubd", "gatewayd")}
    outcomes = order(cluster, "signal", own, signal=9)
    assert {outcome["error"] for outcome in outcomes} == {"denied"}
    assert cluster.answers(OSAKA)
    holder = [row for row in own if row["pid"] == 1]
    (outcome,) = order(cluster, "signal", holder, signal=9, force=True)
    assert outcome["error"] == "unsupported", "the kernel drops it"
    assert "no SIGKILL to it from within" in outcome["message"]
    hub = next(row for row in own if "tabane.node.hubd" in row["command"])
    order(cluster, "signal", [hub], signal=9, force=True)
    wait_for(lambda: not rows(cluster, dc="osaka", pid=hub["pid"]), "the end of the hub")
    wait_for(lambda: rows(cluster, dc="osaka"), "the hub's return")


def test_users_control_their_own(cluster: LocalCluster) -> None:
    """Its own is a process of the user's uid, wherever; all else is refused."""
    cluster.deploy("theirs")
    cluster.wake("theirs", "osaka")
    row = server(cluster, "theirs")
    root = rows(cluster, dc="osaka", pid=1)[0]

    directory = os.open(cluster.root, os.O_PATH)  # the way there may be closed to other users

    def ask() -> Any:
        api = Cluster(Path(f"/proc/self/fd/{directory}"))
        body = {"targets": [target(row), target(root)], "signal": "CONT"}
        outcomes = api.post("/v2/processes/signal", body, node=TOKYO)["outcomes"]
        seen = api.get("/v2/processes?scope=cluster", node=TOKYO)["processes"]
        try:
            api.get("/api/v1/apps", node=TOKYO)
        except Denied as error:
            return outcomes, [one["command"] for one in seen if one["pid"] == 1], error.code
        return None

    def kill() -> Any:
        """What the tool says to who types it."""
        words = ["kill", "-CONT", f"osaka/osaka-1:{row['pid']}"]
        with redirect_stderr(io.StringIO()) as err:
            code = run(["--root", f"/proc/self/fd/{directory}", *words])
        return [code, err.getvalue()]

    assert as_user(row["uid"], kill) == [0, ""]
    code, said = as_user(row["uid"] + 1, kill)
    assert (code, said.count("\n")) == (1, 1)
    assert f"osaka/osaka-1:{row['pid']}" in said and "is another user's process" in said
    outcomes, commands, code = as_user(row["uid"], ask)
    assert [outcome.get("error", "") for outcome in outcomes] == ["", "denied"]
    assert all(command.startswith("[") for command in commands)
    assert code == "denied"
    outcomes, _, _ = as_user(row["uid"] + 1, ask)
    os.close(directory)
    assert [outcome["error"] for outcome in outcomes] == ["denied", "denied"]
    assert "is another user's process" in outcomes[0]["message"]


def test_a_hub_that_restarts_in_the_middle_makes_no_second_change(cluster: LocalCluster) -> None:
    cluster.deploy("once")
    cluster.wake("once", "osaka")
    row = server(cluster, "once")
    how = {"nice": 1, "relative": True, "idempotency_key": "once only"}
    first = order(cluster, "nice", [row], **how)
    for node in (TOKYO, OSAKA):
        cluster.kill("hubd", node)
        (outcome,) = order(cluster, "nice", [row], **how)
        assert outcome.get("error", "") in ("", "unreachable", "timed_out"), outcome

        def again() -> bool:
            return order(cluster, "nice", [row], **how) == first

        wait_for(again, "the first answer")
    assert server(cluster, "once")["nice"] == 1


def test_an_order_as_the_page_gives_it_with_curl(cluster: LocalCluster) -> None:
    cluster.deploy("curled")
    cluster.wake("curled", "osaka")
    page = (Path(__file__).parents[2] / "docs/k2i-control.md").read_text()
    look, give = re.findall(r"^(curl --unix.*?)\n(?=curl|```)", page, re.M | re.S)
    socket = {"$socket": str(cluster.api.socket_of(TOKYO))}
    shown = curl(look, socket | {"hello": "curled"})["processes"]
    row = next(row for row in rows(cluster, app="default/curled") if target(row) in shown)
    address = {"8c1e...": row["incarnation"], "91337": str(row["start_ticks"])}
    place = {'"tokyo"': '"osaka"', '"tokyo-1"': '"osaka-1"', "/4242/": f"/{row['pid']}/"}
    outcome = curl(give, socket | address | place)
    assert (outcome["target"], outcome.get("error", "")) == (target(row), "")


def test_an_instance_is_paused_and_confined(cluster: LocalCluster) -> None:
    held = f"x=$(head -c 8M /dev/zero | tr '\\0' x); {' '.join(HTTPD)} & wait"
    cluster.deploy("paused", ["sh", "-c", held], resources={"memory": "64MiB", "disk": "1MiB"})
    instance = cluster.wake("paused", "osaka")
    would = order_instance(cluster, instance, "pause", dry_run=True)
    assert (would["before"], would["after"]) == ({"paused": 0}, {"paused": 1})
    assert cluster.get("paused", "osaka", "/GPL-3").status == 200
    assert order_instance(cluster, instance, "pause") == would
    with pytest.raises(TimeoutError):
        cluster.get("paused", "osaka", "/GPL-3", timeout_s=0.3)
    assert [each["paused"] for each in cluster.instances("paused")] == [True]
    assert " paused " in cluster.tabane("show", "paused").out
    assert order_instance(cluster, instance, "resume")["after"] == {"paused": 0}
    assert [each for each in cluster.instances("paused") if "paused" in each] == []
    assert cluster.get("paused", "osaka", "/GPL-3").status == 200

    done = order_instance(cluster, instance, "limits", cpu=0.25, memory_bytes=96 << 20, pids=40)
    assert done["before"] == {"cpu": 1.0, "memory_bytes": 64 << 20, "pids": 256}
    assert done["after"] == {"cpu": 0.25, "memory_bytes": 96 << 20, "pids": 40}
    found = [place / "pids.max" for place in find_cgroups(instance["id"])]
    assert {path.read_text() for path in found if path.exists()} == {"40\n"}
    with pytest.raises(Conflict, match="bytes now: the kernel would kill for it"):
        order_instance(cluster, instance, "limits", memory_bytes=4 << 20)
    with pytest.raises(Stale):
        order_instance(
            cluster, {**instance, "generation": {**instance["generation"], "counter": 99}}, "pause"
        )


def test_a_paused_instance_can_be_stopped(cluster: LocalCluster) -> None:
    cluster.deploy("stopped")
    instance = cluster.wake("stopped", "osaka")
    order_instance(cluster, instance, "pause")
    assert cluster.tabane("stop", instance["id"]).code == 0

    def is_gone() -> bool:
        try:
            order_instance(cluster, instance, "resume", dry_run=True)
        except (NotFound, Conflict, Stale):
            return True
        return False

    wait_for(is_gone, "the end of the instance")


def test_a_dead_node_is_said_and_others_obey(cluster: LocalCluster) -> None:
    """The last: the node stays dead."""
    cluster.deploy("alive")
    cluster.wake("alive", "osaka")
    row = server(cluster, "alive")
    dead = rows(cluster, dc="ishikari", pid=1)[0]
    os.kill(cluster.holder(ISHIKARI), signal.SIGKILL)
    first, second = order(cluster, "nice", [dead, row], nice=2)
    assert first["error"] in ("unreachable", "timed_out")
    assert ISHIKARI in first["message"]
    assert second["after"] == 2

    def is_unseen() -> bool:
        (outcome,) = order(cluster, "signal", [dead], signal=0)
        return "nothing was done" in outcome["message"]

    wait_for(is_unseen, "that it cannot be seen")
    instance = {"id": "abc", "node": ISHIKARI, "generation": {"incarnation": "i", "counter": 1}}
    with pytest.raises(TabaneError, match=ISHIKARI):
        order_instance(cluster, instance, "pause")
