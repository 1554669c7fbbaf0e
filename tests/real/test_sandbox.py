"""A sandboxed app from its first request to its end: the same tools, another kernel."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import LocalCluster, find_cgroups, wait_for

from tabane.errors import Unsupported, UsageError
from tabane.runtimes.cgroups import Cgroup

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"
HANGS_FOR_ITS_NAME = """
import socket, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.command, self.path)
        if socket.gethostname().endswith("-" + self.path[1:]) and self.path != "/":
            threading.Event().wait()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def processes_of(cluster: LocalCluster, app: str) -> list[dict[str, Any]]:
    """Those inside its instances, as `tabane ps` has them."""
    out = cluster.tabane("ps", "--json", "--app", app).out
    found: list[dict[str, Any]] = json.loads(out)["processes"]
    return [row for row in found if row.get("inside")]


def kernel_of(instance: dict[str, Any]) -> int:
    """The process that is the instance's kernel and network stack."""
    groups = find_cgroups(instance["id"])
    pids = {int(pid) for group in groups for pid in (group / "cgroup.procs").read_text().split()}
    return next(pid for pid in pids if command_of(pid).startswith(b"runsc-sandbox"))


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # it has ended by now


def post(cluster: LocalCluster, app: str, path: str) -> tuple[int, str]:
    with closing(HTTPConnection(cluster.addresses[NODE], 80, timeout=120)) as connection:
        connection.request("POST", path, b"once", {"Host": f"{app}.test"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_the_life_of_a_sandboxed_app(cluster: LocalCluster, tmp_path: Path) -> None:
    """Asked for, it wakes; it is entered, watched, copied from, and stopped; nothing is left."""
    cluster.deploy("shut-in", isolation="sandbox")
    instance = cluster.wake("shut-in")
    assert (instance["isolation"], instance["driver"]) == ("sandbox", "runsc")
    (wake,) = cluster.records("wakes", "shut-in")
    assert wake["option"] == "cold" and wake["phases_us"]["engine"] > 0

    code, out = cluster.inside("shut-in", "dmesg")
    assert code == 0 and "Starting gVisor" in out
    (tmp_path / "words").write_text("copied")
    where = f"{instance['id']}:/tmp/words"
    assert cluster.tabane("cp", str(tmp_path / "words"), where).code == 0
    assert cluster.inside("shut-in", "cat", "/tmp/words") == (0, "copied")

    def seen() -> list[dict[str, Any]]:
        return [row for row in processes_of(cluster, "shut-in") if row["name"] == "busybox"]

    row, *_ = wait_for(seen, "the program in the table")
    assert (row["class"], row["inside"], row["instance"]) == ("sandbox", "sandbox", instance["id"])
    assert row["ppid"] == 1

    assert cluster.tabane("stop", instance["id"]).code == 0
    wait_for(lambda: not cluster.instances("shut-in"), "its end")
    wait_for(lambda: not processes_of(cluster, "shut-in"), "an end in the table, too")


def test_its_limits_change_while_it_runs(cluster: LocalCluster) -> None:
    """As the app file means them: what the sandbox itself needs stays on top."""
    cluster.deploy("held", isolation="sandbox", resources={"memory": "64MiB", "disk": "1MiB"})
    instance = cluster.wake("held")
    limits = Cgroup(instance["cgroup"])
    before = limits.limits()
    order = {"dc": "tokyo", "node": "tokyo-1", **instance["generation"]}
    path = f"/v2/instances/{order.pop('instance')}/limits"
    done = cluster.api.post(path, {**order, "memory_bytes": 48 << 20, "cpu": 0.5})
    assert done["before"] == {"cpu": 1.0, "memory_bytes": 64 << 20, "pids": 256}
    assert done["after"] == {"cpu": 0.5, "memory_bytes": 48 << 20, "pids": 256}
    now = limits.limits()
    assert now["memory_bytes"] == before["memory_bytes"] - (16 << 20) and now["cpu"] == 0.5
    assert now["pids"] == before["pids"] > 256
    with pytest.raises(Unsupported, match="processes in a sandbox"):
        cluster.api.post(path, {**order, "pids": 40})
    assert cluster.get("held", path="/GPL-3").status == 200


def test_it_outlives_the_agent(cluster: LocalCluster) -> None:
    """The next one finds it, hears of its readiness by half a handshake, and can end it."""
    cluster.deploy("lasting", isolation="sandbox")
    first = cluster.wake("lasting")
    cluster.kill("agent", NODE)
    wait_for(lambda: cluster.answers(NODE), "the next agent")
    assert cluster.wake("lasting")["id"] == first["id"]
    assert cluster.inside("lasting", "echo", "there") == (0, "there\n")
    assert cluster.tabane("stop", first["id"]).code == 0
    wait_for(lambda: not cluster.instances("lasting"), "its end")


def test_requests_in_flight_hear_of_its_end_at_once(cluster: LocalCluster) -> None:
    """Its network stack dies with it, so nothing but the node's word ends their wait."""
    cluster.deploy(
        "ending",
        ["python3", "-u", "-c", HANGS_FOR_ITS_NAME],
        isolation="sandbox",
        resources={"memory": "128MiB"},
        reactive={"response_timeout": "10m", "concurrency": 10},
    )
    instance = cluster.wake("ending", path="/")
    path = f"/{instance['id']}"
    with ThreadPoolExecutor(2) as threads:
        may_be_sent_again = threads.submit(cluster.get, "ending", path=path)
        is_sent_once = threads.submit(post, cluster, "ending", path)

        def asked() -> bool:
            said = cluster.tabane("logs", instance["id"]).out
            return f"GET {path}" in said and f"POST {path}" in said

        wait_for(asked, "both requests at the instance")
        os.kill(kernel_of(instance), signal.SIGKILL)
        assert may_be_sent_again.result(timeout=60).status == 200
        status, text = is_sent_once.result(timeout=60)
    assert status == 502 and "its instance ended" in text


def test_a_command_inside_holds_it(cluster: LocalCluster) -> None:
    """Beyond its `stop_after`, and no longer."""
    cluster.deploy("entered", isolation="sandbox", reactive={"stop_after": "3s"})
    cluster.wake("entered")
    assert cluster.inside("entered", "sh", "-c", "sleep 5; echo done") == (0, "done\n")
    wait_for(lambda: not cluster.instances("entered"), "its end")


def test_one_that_never_listens_is_given_up_with_its_last_words(cluster: LocalCluster) -> None:
    command = ["sh", "-c", "echo cannot open the database; sleep 1000"]
    cluster.deploy("mute", command, isolation="sandbox", reactive={"start_timeout": "2s"})
    answer = cluster.get("mute")
    assert answer.status == 503
    failures = [e for e in cluster.records("events", "mute") if e["state"] == "failed"]
    assert "cannot open the database" in failures[-1]["reason"]
    wait_for(lambda: not cluster.instances("mute"), "its end")


def test_no_other_class_stands_in_for_it(cluster: LocalCluster) -> None:
    with pytest.raises(UsageError, match="runc does not run class sandbox"):
        cluster.deploy("unequal", isolation="sandbox", driver="runc")
