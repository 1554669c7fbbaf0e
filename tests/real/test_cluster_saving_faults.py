"""What goes wrong with checkpoints in a cluster: apps answer all the same, and people are told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.real.conftest import Factory, LocalCluster, open_to_all, wait_for
from tests.real.test_cluster_away import kept, rest
from tests.real.test_cluster_saving import checkpoints, is_tried, wakes

from tabane.images.checkpoint.manifest import encode_manifest
from tabane.images.checkpoint.seal import Sealer, load_key
from tabane.images.checkpoint.vault import Vault
from tabane.images.room import Room
from tabane.node.local import HERE
from tabane.runtimes.criu.engine import OWN

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


def begin_two(cluster: LocalCluster, copied: str, away: str) -> dict[str, dict[str, Any]]:
    """Two apps, of which one has a checkpoint and the other is put away; what they answered."""
    deploy(cluster, copied, checkpoint=True, stop_after="1s")
    deploy(cluster, away, checkpoint_after="1s")
    told = {name: ask(cluster, name) for name in (copied, away)}
    rest(cluster, away)
    wait_for(lambda: not cluster.instances(copied), f"the end of {copied}")
    return told


def begin_anew(cluster: LocalCluster, told: dict[str, dict[str, Any]]) -> list[str]:
    """None of them goes on from where it was; returns why."""
    for name, first in told.items():
        assert ask(cluster, name)["me"] != first["me"]
    last = [wakes(cluster, name, 2)[-1] for name in told]
    assert [wake["option"] for wake in last] == ["cold", "cold"]
    return [wake["note"] for wake in last]


def restart(cluster: LocalCluster) -> None:
    """What is open is closed by it."""
    cluster.kill("agentd")
    cluster.wait_whole()
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")


def place_of(cluster: LocalCluster) -> Path:
    return cluster.root / "nodes" / NODE / "checkpoints"


def damage(cluster: LocalCluster) -> None:
    """Somebody has been at the disk."""
    for path in (place_of(cluster) / "chunks").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def seal_anew(cluster: LocalCluster, name: str, **changes: Any) -> None:
    """With the node's key, as if it had been made on another machine."""
    sealer = Sealer(load_key(place_of(cluster).parent / "checkpoint.key"))
    vault = Vault(place_of(cluster), sealer, Room(place_of(cluster)))
    (row,) = checkpoints(cluster, name)
    manifest = vault.manifest(row["digest"])
    digest, data = encode_manifest(replace(manifest, about=replace(manifest.about, **changes)))
    vault.manifest_path(row["digest"]).unlink()
    path = vault.manifest_path(digest)
    path.write_bytes(vault.seal(path.name.encode(), data))


def test_what_was_changed_on_disk_is_found_out_and_what_was_made_elsewhere_is_refused(
    cluster: LocalCluster,
) -> None:
    """Both begin cold. What is refused is not even looked at, as its chunks are damaged, too."""
    changed = begin_two(cluster, "copied", "away")
    foreign = begin_two(cluster, "moved", "waiting")
    elsewhere = {"cpu_vendor": "AnotherMaker", "cpu_flags": "fpu avx9", "kernel": "9.1.2-other"}
    seal_anew(cluster, "moved", versions={"criu": "9.9"}, **elsewhere)
    seal_anew(cluster, "waiting", kernel="9.1.2-other")
    damage(cluster)
    restart(cluster)
    copied, away = begin_anew(cluster, changed)
    assert "is damaged" in copied and "is damaged" in away
    assert "was put away, and is lost" in away and kept(cluster, "away") == []
    moved, waiting = begin_anew(cluster, foreign)
    assert moved.startswith("its checkpoint is refused: criu 9.9 made it, and here is ")
    for words in ("of kernel 9.1.2-other", "processor of AnotherMaker", "processor lacks: avx9"):
        assert words in moved
    assert "is refused: it has state of kernel 9.1.2-other" in waiting
    assert len(kept(cluster, "waiting")) == 1


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


@contextmanager
def mounted(cluster: LocalCluster, *words: str) -> Iterator[None]:
    """For what begins on the node from now on."""
    inside = ("nsenter", "--mount", "--pid", "--target", str(cluster.holder(NODE)))
    subprocess.run((*inside, "mount", *words), check=True)
    try:
        yield
    finally:
        subprocess.run((*inside, "umount", "--lazy", words[-1]), check=True)


def make_old_criu(directory: Path) -> Path:
    """As if `scripts/setup` had unpacked it, by the loader that runs it."""
    loader = directory / "usr/lib/old/ld-linux-old.so.2"
    loader.parent.mkdir(parents=True)
    loader.write_text("#!/bin/sh\necho Version: 3.17.1\n")
    loader.chmod(0o755)
    return directory


def test_without_a_criu_or_a_disk_that_can_apps_run_and_people_are_told(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    before = begin_two(cluster, "early", "patient")
    old = make_old_criu(open_to_all(tmp_path) / "criu")
    with mounted(cluster, "--bind", str(old), str(OWN)):
        restart(cluster)
        assert "CRIU 3.17.1 is too old" in cluster.tabane("doctor", "-v").out
        early, patient = begin_anew(cluster, before)
        assert "its checkpoint is refused: driver crun cannot restore here" in early
        assert "is refused: driver crun cannot restore here" in patient
        assert len(kept(cluster, "patient")) == len(kept(cluster, "early")) == 1
    place = str(HERE / "checkpoints")
    with mounted(cluster, "-t", "tmpfs", "-o", "size=64m,mode=0700", "full", place):
        ballast = Path(f"/proc/{cluster.holder(NODE)}/root{place}/ballast")
        ballast.write_bytes(bytes(63 << 20))
        restart(cluster)
        deploy(cluster, "heavy", checkpoint=True, checkpoint_after="1s")
        first = ask(cluster, "heavy")
        for words in ("no checkpoint of it could be made", "it could not be put away"):
            wait_for(lambda: is_said(cluster, "heavy", f"{words}: the disk below"), words)  # noqa: B023
        assert ask(cluster, "heavy") == first | {"count": 2}
        ballast.unlink()
        wait_for(lambda: not cluster.instances("heavy"), "heavy put away")
        assert ask(cluster, "heavy") == first | {"count": 3}
    restart(cluster)
    assert ask(cluster, "early")["me"] == before["early"]["me"]
