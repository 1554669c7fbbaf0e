"""What goes wrong with checkpoints in a cluster: apps answer all the same, and people are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for
from tests.real.test_cluster_away import kept, rest
from tests.real.test_cluster_saving import checkpoints, is_tried, wakes

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"
PROGRAM = """
import http.server, json, os, pathlib, socket, sys, uuid
me, count = str(uuid.uuid4()), 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global count
        is_copy = pathlib.Path("/run/tabane/epoch").exists()
        count += self.path == "/"
        body = json.dumps({"me": me, "count": count}).encode()
        self.send_response(500 if is_copy and self.path == "/ready" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

address = socket.gethostbyname(socket.gethostname()) if "own" in sys.argv else ""
http.server.ThreadingHTTPServer((address, 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    cluster = make_cluster(["tokyo"])
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")
    return cluster


def deploy(cluster: LocalCluster, name: str, *words: str, **reactive: Any) -> None:
    limits = {"stop_after": "1h", "max": 1, "start_timeout": "30s"} | reactive
    sections = {"reactive": limits, "resources": {"memory": "96MiB"}}
    cluster.deploy(name, ["python3", "-c", PROGRAM, *words], driver="crun", **sections)


def ask(cluster: LocalCluster, name: str) -> dict[str, Any]:
    answer = cluster.get(name)
    assert answer.status == 200, answer
    told: dict[str, Any] = json.loads(answer.body)
    return told


def is_said(cluster: LocalCluster, name: str, words: str) -> bool:
    events = cluster.records("events", name)
    return any(words in event.get("reason", "") for event in events)


def test_what_no_engine_can_save_runs_on_and_people_are_told_why(cluster: LocalCluster) -> None:
    """It listens at its own address, which a copy would not have."""
    deploy(cluster, "bound", "own", checkpoint=True, checkpoint_after="1s")
    first = ask(cluster, "bound")
    for words in ("no checkpoint of it could be made", "it could not be put away"):
        wait_for(lambda: is_said(cluster, "bound", words), words)  # noqa: B023
    assert ask(cluster, "bound") == first | {"count": 2}
    assert len(cluster.instances("bound")) == 1 and not checkpoints(cluster, "bound")
    assert "which is its own address" in cluster.tabane("why", "bound").out


def damage(cluster: LocalCluster) -> None:
    """Somebody has been at the disk; what is open is closed, as by an agent's end."""
    for path in (cluster.root / "nodes" / NODE / "checkpoints" / "chunks").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    cluster.kill("agentd")
    cluster.wait_whole()
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")


def test_what_was_changed_on_disk_is_found_out_and_the_next_begins_cold(
    cluster: LocalCluster,
) -> None:
    deploy(cluster, "copied", checkpoint=True, stop_after="1s")
    deploy(cluster, "away", checkpoint_after="1s")
    copied, away = ask(cluster, "copied"), ask(cluster, "away")
    rest(cluster, "away")
    wait_for(lambda: not cluster.instances("copied"), "the end of copied")
    damage(cluster)
    assert ask(cluster, "copied")["me"] != copied["me"]
    assert ask(cluster, "away")["me"] != away["me"]
    notes = {name: wakes(cluster, name, 2)[-1]["note"] for name in ("copied", "away")}
    assert "is damaged" in notes["copied"] and "is damaged" in notes["away"]
    assert "was put away, and is lost" in notes["away"]
    assert kept(cluster, "away") == []


def test_what_is_never_ready_again_gives_way_and_is_not_lost(cluster: LocalCluster) -> None:
    """A copy answers its check with 500; one that was put away stays so."""
    deploy(cluster, "stuck", checkpoint=True, stop_after="1s", ready="http:/ready")
    deploy(cluster, "sleepy", checkpoint_after="1s", ready="http:/ready")
    stuck, sleepy = ask(cluster, "stuck"), ask(cluster, "sleepy")
    rest(cluster, "sleepy")
    wait_for(lambda: not cluster.instances("stuck"), "the end of stuck")
    for name, first in (("stuck", stuck), ("sleepy", sleepy)):
        assert ask(cluster, name)["me"] != first["me"]
        wake = wakes(cluster, name, 2)[-1]
        assert wake["option"] == "cold" and "did not become ready" in wake["note"]
    assert len(kept(cluster, "sleepy")) == 1
