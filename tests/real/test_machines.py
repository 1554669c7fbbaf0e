"""An app in a machine of its own, from its deploy to its end: the same tools, another kernel."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Ended, Factory, LocalCluster, to_toml, wait_for

from tabane.node.local import HERE
from tabane.testing.containers import make_tree

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"
PAGE = "served by a machine"
NOW = "#!/bin/sh\necho; busybox date +%s; cat /proc/sys/kernel/hostname /run/tabane/epoch\n"


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    made = make_cluster(["tokyo"])
    wait_for(lambda: "qemu" in drivers(made), "the machines' trial")
    return made


def drivers(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """Those that work, as `tabane doctor` has them."""
    found = json.loads(cluster.tabane("doctor", "--json").out)["drivers"]
    return {driver["driver"]: driver for driver in found if driver["works"]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("image")
    tree = make_tree(place).tree
    (tree / "srv/index.html").write_text(PAGE)
    (tree / "srv/cgi-bin").mkdir()
    (tree / "srv/cgi-bin/now").write_text(NOW)
    (tree / "srv/cgi-bin/now").chmod(0o755)
    source = Path(__file__).with_name("unix_talk.c")
    argv = ("gcc", "-static", "-Os", "-Wall", "-Werror", "-o", tree / "bin/talk", source)
    subprocess.run(argv, check=True)
    return tree


def deploy(
    cluster: LocalCluster,
    tree: Path,
    name: str,
    *,
    more: str = "",
    stop_timeout: str = "5s",
    reactive: dict[str, Any] | None = None,
    **fields: Any,
) -> Ended:
    top = {
        "name": name,
        "image": f"rootfs:{tree}",
        "command": ["busybox", "httpd", "-f", "-v", "-p", "8000", "-h", "/srv"],
        "port": 8000,
        "hosts": [f"{name}.test"],
        **fields,
    }
    file = tree.parent / f"{name}.toml"
    sections = {
        "resources": {"memory": "48MiB", "disk": "4MiB"},
        "reactive": {"stop_after": "1h", "stop_timeout": stop_timeout, "start_timeout": "100s"}
        | (reactive or {}),
    }
    file.write_text(to_toml(top, sections) + more)
    return cluster.tabane("deploy", str(file))


def test_emulation_is_allowed_or_refused(cluster: LocalCluster, tree: Path) -> None:
    """Where a processor can only be emulated, an app that does not allow that gets none."""
    probed = drivers(cluster)["qemu-microvm"]
    assert probed["class"] == "microvm" and "QEMU emulator version" in probed["reason"]
    assert deploy(cluster, tree, "unasked", **{"class": "microvm"}).code == 0
    answer = cluster.get("unasked")
    if probed["emulated"]:
        assert "emulated, as " in probed["detail"]
        assert answer.status == 503 and cluster.starts("unasked") == 0
    else:
        assert probed["detail"] == "with KVM" and answer.body == PAGE


def test_this_hosts_programs_are_refused(cluster: LocalCluster, tree: Path) -> None:
    ended = deploy(
        cluster, tree, "hosts", image="host", allow_emulation=True, **{"class": "microvm"}
    )
    assert ended.code != 0
    assert "is a host image, and class microvm runs linux images" in ended.err


def test_the_life_of_an_app_in_a_machine(cluster: LocalCluster, tree: Path, tmp_path: Path) -> None:
    """Asked for, it wakes; it outlives the agent; it is entered, watched, copied from; stopped."""
    ended = deploy(cluster, tree, "guest", allow_emulation=True, **{"class": "microvm"})
    assert ended.code == 0, ended.err
    instance = cluster.wake("guest", path="/")
    assert cluster.get("guest").body == PAGE
    assert (instance["isolation"], instance["driver"]) == ("microvm", "qemu-microvm")
    (wake,) = cluster.records("wakes", "guest")
    assert wake["option"] == "cold" and wake["phases_us"]["filesystem"] > 0

    cluster.kill("agent", NODE)
    wait_for(lambda: cluster.answers(NODE), "the next agent")
    assert cluster.wake("guest", path="/")["id"] == instance["id"]
    code, kernel = cluster.inside("guest", "busybox", "uname", "-r")
    assert code == 0 and "cloud-amd64" in kernel
    (tmp_path / "words").write_text("copied")
    assert cluster.tabane("cp", str(tmp_path / "words"), "guest:/tmp/words").code == 0
    assert cluster.inside("guest", "cat", "/tmp/words") == (0, "copied")
    assert "response:200" in cluster.tabane("logs", "guest").err

    def seen() -> list[dict[str, Any]]:
        found = json.loads(cluster.tabane("ps", "--json", "--app", "guest").out)["processes"]
        return [row for row in found if row.get("inside") and row["name"] == "busybox"]

    row, *_ = wait_for(seen, "the program in the table")
    assert (row["class"], row["inside"], row["instance"]) == ("microvm", "guest", instance["id"])

    assert cluster.tabane("stop", instance["id"]).code == 0
    wait_for(lambda: not cluster.instances("guest"), "its end")
    wait_for(lambda: not left_of(cluster, instance["id"]), "the end of its machine")


def left_of(cluster: LocalCluster, instance: str) -> list[str]:
    """Processes of the machine that have to do with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if instance.encode() in words and b"_confine" in words:
            found.append(str(path))
    return found


def test_a_machine_goes_down_the_ladder_and_comes_back(cluster: LocalCluster, tree: Path) -> None:
    """It boots once. Frozen, a session thaws it; gone, the next ones begin from its checkpoint."""
    ladder = {"checkpoint": True, "freeze_after": "1s", "stop_after": "15s", "max": 1}
    fields = {"class": "microvm", "allow_emulation": True}
    assert deploy(cluster, tree, "resting", reactive=ladder, **fields).code == 0
    first, _ = ask_when(cluster, late_s=60)  # it was told before it was started
    wait_for(lambda: "resting" in cluster.tabane("checkpoint", "ls").out, "its checkpoint")
    wait_for(lambda: cluster.instances("resting", "frozen"), "its freezing")
    assert ask_when(cluster) == (first, "")
    for _ in range(2):
        (instance,) = cluster.instances("resting")
        cluster.tabane("stop", instance["id"])
        wait_for(lambda: not cluster.instances("resting"), "its end")
        again, epoch = ask_when(cluster)
        assert again != first and len(epoch) == 36
        refused = cluster.tabane("checkpoint", "rm", "resting")
        assert refused.code != 0 and "is open, for 1" in refused.out + refused.err

    def told() -> list[dict[str, Any]]:
        records = cluster.records("wakes", "resting")
        return records if [r["option"] for r in records].count("restore") == 2 else []

    wakes = wait_for(told, "the records of its wakes")
    options = [wake["option"] for wake in wakes]
    assert options[0] == "cold" and "thaw" in options and options.count("cold") == 1
    assert wakes[-1]["phases_us"]["engine"] > 0
    assert "restore" in cluster.tabane("why", "resting").out
    assert cluster.tabane("rm", "resting").code == 0


def ask_when(cluster: LocalCluster, late_s: float = 2.0) -> tuple[str, str]:
    """Its name and epoch; its clock must be right."""
    began = int(time.time())
    answer = cluster.get("resting", path="/cgi-bin/now", timeout_s=100)
    words = r"^(\d{10}|resting-\S+|\S{36})\s*$"
    seconds, host, *epoch = re.findall(words, answer.body, re.MULTILINE)
    assert began - late_s <= int(seconds) <= time.time() + 2
    return host, "".join(epoch)


VOLUME = """
[[volumes]]
name = "data"
path = "/srv/data"
size = "16MiB"
"""
DEAF = "trap '' TERM; exec busybox httpd -f -p 8000 -h /srv"


def test_a_volume_is_the_same_in_every_class(cluster: LocalCluster, tree: Path) -> None:
    """Its program is deaf to TERM, and syncs nothing: what was written is there all the same."""

    def become(isolation: str) -> None:
        fields = {"class": isolation, "command": ["sh", "-c", DEAF], "allow_emulation": True}
        ended = deploy(cluster, tree, "keeper", more=VOLUME, stop_timeout="1s", **fields)
        assert ended.code == 0, ended.err

        def serves() -> bool:
            answer = cluster.get("keeper", timeout_s=100)
            now = [i.get("isolation") for i in cluster.instances("keeper", "ready")]
            return answer.body == PAGE and now == [None if isolation == "container" else isolation]

        wait_for(serves, f"the revision of class {isolation}")

    def run(script: str) -> str:
        return cluster.inside("keeper", "sh", "-c", script)[1]

    files = Path(f"/proc/{cluster.holder(NODE)}/root{HERE}/volumes/default/keeper")
    owner = "stat -c '%u:%g' /srv/data/lines"
    become("container")
    run("echo container > /srv/data/lines; busybox chown 33:34 /srv/data/lines")
    become("microvm")
    assert run(f"cat /srv/data/lines; {owner}") == "container\n33:34\n"
    assert "No space" in run("dd if=/dev/zero of=/srv/data/big bs=1M count=16 2>&1")
    run("rm /srv/data/big; echo machine >> /srv/data/lines; cat /bin/busybox > /srv/data/copy")
    assert (files / "data.lent").exists()
    become("container")
    assert run(f"cat /srv/data/lines; {owner}") == "container\nmachine\n33:34\n"
    assert run("busybox cmp /bin/busybox /srv/data/copy && echo same") == "same\n"
    assert [path.name for path in files.iterdir()] == ["data.ext4"]
    assert cluster.tabane("rm", "keeper").code == 0


BESIDE = """
[services]
middlecon = ["deploys"]
k2i = true
[[containers]]
name = "clerk"
command = ["sh", "-c", "echo clerk; exec sleep 1000"]
"""
_WORDS = b"\x82\xa4name\xa6worker\xa8instance\xa1i"
HELLO = b"\xffmc1" + struct.pack(">IBBHIII", 16 + len(_WORDS), 1, 0, 0, 0, 0, 0) + _WORDS
GET = b"GET /v2/processes HTTP/1.1\r\nHost: k2i\r\nConnection: close\r\n\r\n"


def test_several_containers_and_their_node_s_sockets(cluster: LocalCluster, tree: Path) -> None:
    """In one machine: each is reached by name; as their instance, they reach hub and k2i, also when
    the node has another agent; the end of one is the instance's."""
    ended = deploy(cluster, tree, "pod", more=BESIDE, allow_emulation=True, **{"class": "microvm"})
    assert ended.code == 0, ended.err
    instance = cluster.wake("pod", path="/")
    name = f"default/pod-{instance['id']}"
    assert cluster.tabane("logs", "-c", "clerk", "pod").out == "clerk\n"
    done = cluster.tabane("exec", "-c", "clerk", "pod", "cat", "/etc/hostname")
    assert done.out == f"pod-{instance['id']}\n"

    def rows() -> dict[str, str]:
        found = json.loads(cluster.tabane("ps", "--json", "--app", "pod").out)["processes"]
        return {row["command"]: row.get("container", "") for row in found if row.get("inside")}

    wait_for(lambda: rows().get("sleep 1000") == "clerk", "the clerk's process")
    assert rows()["busybox httpd -f -v -p 8000 -h /srv"] == "main"

    for again in range(2):
        for container in ("main", "clerk"):
            answer = talk(cluster, container, "k2i", GET, "-")
            assert answer.startswith("HTTP/1.1 200") and "sleep 1000" in answer, answer
            assert name in talk(cluster, container, "hub", HELLO)
        if not again:
            cluster.kill("agent", NODE)
            wait_for(lambda: cluster.answers(NODE), "the next agent")

    cluster.tabane("exec", "-c", "clerk", "pod", "busybox", "killall", "sleep")

    def gone() -> list[dict[str, Any]]:
        return [event for event in cluster.records("events", "pod") if event["state"] == "absent"]

    (end,) = wait_for(gone, "its end")
    assert end["reason"] == "container clerk was killed by SIGTERM; its last line: clerk"
    assert cluster.tabane("rm", "pod").code == 0


def talk(cluster: LocalCluster, container: str, name: str, said: bytes, how: str = "") -> str:
    """What of the answer of an instance's socket is text."""
    words = "".join(f"\\{byte:03o}" for byte in said)
    script = f"printf '{words}' | talk /run/tabane/{name}.sock {how} | busybox tr -cd ' -~\\n'"
    done = cluster.tabane("exec", "-c", container, "pod", "sh", "-c", script)
    assert done.code == 0, done.err
    return done.out


def test_a_program_that_fails_leaves_its_last_words(cluster: LocalCluster, tree: Path) -> None:
    """In a PC, for a change."""
    command = ["sh", "-c", "echo cannot open the database; exit 5"]
    fields = {"class": "vm", "command": command, "allow_emulation": True}
    ended = deploy(cluster, tree, "broken", **fields)
    assert ended.code == 0, ended.err
    assert cluster.get("broken", timeout_s=100).status == 503
    failures = [e for e in cluster.records("events", "broken") if e["state"] == "failed"]
    assert "code 5" in failures[-1]["reason"]
    assert "cannot open the database" in failures[-1]["reason"]
    wait_for(lambda: not cluster.instances("broken", "starting"), "its end")
