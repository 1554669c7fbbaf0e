"""Programs that do not work: said with the reason, backed off from, and nobody else's trouble."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.real.conftest import HTTPD, Answer, LocalCluster, wait_for

pytestmark = pytest.mark.real

GARBAGE = "while :; do echo not HTTP at all | busybox nc -l -p 8000; done"
EATER = "x=y; while :; do x=$x$x; done"
TRUNCATED = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "9" if self.path == "/broken" else "0")
        self.end_headers()
        self.close_connection = True
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
"""It closes the connection before an answer's body, if that is asked for."""
HUNGRY = f"{' '.join(HTTPD)} & until test -e /tmp/eat; do sleep 0.05; done; {EATER}"
BACK_OFF_S = 3.0
MOST_STARTS = 8
"""In `BACK_OFF_S`: with no back-off there would be tens."""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def assert_refused(cluster: LocalCluster, name: str, answer: Answer, reason: str) -> None:
    """The reason is in the 503, which says when to come again, and in `tabane show`."""
    assert answer.status == 503, answer
    assert reason in answer.body
    assert "\r\nRetry-After: " in answer.head
    shown = cluster.tabane("show", name)
    assert shown.code == 0
    assert reason in shown.out


@pytest.mark.parametrize(
    ("name", "command", "reason"),
    [
        (
            "exits",
            ["sh", "-c", "echo no config >&2; exit 3"],
            "the program exited with code 3 before it listened on port 8000;"
            " its last line: no config",
        ),
        (
            "silent",
            ["sleep", "60"],
            "did not become ready (listen on port 8000) within 1 s: it listens on no port",
        ),
        (
            "elsewhere",
            ["busybox", "httpd", "-f", "-p", "127.0.0.1:8001"],
            "within 1 s: it listens on 127.0.0.1:8001 only",
        ),
        ("nothing", ["no-such-program"], "no program 'no-such-program'"),
        ("greedy", ["sh", "-c", EATER], "out of memory"),
    ],
)
def test_what_does_not_start(
    cluster: LocalCluster, name: str, command: list[str], reason: str
) -> None:
    limits = {"memory": "16MiB", "disk": "1MiB"}
    timeout = "1s" if "within 1 s" in reason else "1m"
    cluster.deploy(name, command, reactive={"start_timeout": timeout}, resources=limits)
    assert_refused(cluster, name, cluster.get(name), reason)
    wait_for(lambda: not cluster.instances(name), "the end of what failed")
    (record,) = wait_for(lambda: cluster.records("wakes", name), "its record")
    assert (record["option"], record["instance"]) == ("failed", "")
    assert reason in record["outcome"]
    assert reason in cluster.tabane("wakes", name).out


def test_starts_that_fail_are_backed_off_from_and_others_unharmed(cluster: LocalCluster) -> None:
    cluster.deploy("flapping", ["sh", "-c", "exit 1"])
    cluster.deploy("bystander")
    with cluster.requests("bystander") as seen:
        deadline = time.monotonic() + BACK_OFF_S
        while time.monotonic() < deadline:
            assert cluster.get("flapping").status == 503
    assert seen.failures() == []
    assert 1 <= cluster.starts("flapping") <= MOST_STARTS
    assert cluster.starts("bystander") == 1


def test_what_listens_late_is_waited_for(cluster: LocalCluster) -> None:
    cluster.deploy("late", ["sh", "-c", f"sleep 1; exec {' '.join(HTTPD)}"])
    assert cluster.get("late", path="/GPL-3").status == 200


def test_what_listens_later_than_allowed_is_refused(cluster: LocalCluster) -> None:
    late = ["sh", "-c", f"sleep 30; exec {' '.join(HTTPD)}"]
    cluster.deploy("too-late", late, reactive={"start_timeout": "1s"})
    assert_refused(cluster, "too-late", cluster.get("too-late"), "within 1 s")


def test_garbage_is_not_passed_on(cluster: LocalCluster) -> None:
    cluster.deploy("garbage", ["sh", "-c", GARBAGE])
    answer = cluster.get("garbage")
    assert answer.status == 502
    assert "the app's answer is not HTTP/1.1" in answer.body
    wait_for(lambda: "is not HTTP/1.1" in cluster.tabane("show", "garbage").out, "the reason")


def test_answers_that_break_off_start_no_other_instance(cluster: LocalCluster) -> None:
    cluster.deploy("truncated", ["/usr/bin/python3", "-c", TRUNCATED], reactive={"max": 9})
    assert cluster.get("truncated").status == 200
    for _ in range(20):
        with pytest.raises(ConnectionResetError):
            cluster.get("truncated", path="/broken")
    assert cluster.get("truncated").status == 200
    assert "closed the connection" in cluster.tabane("show", "truncated").out
    assert cluster.starts("truncated") == 1


def test_one_that_fills_its_memory_is_ended_and_woken_again(cluster: LocalCluster) -> None:
    cluster.deploy("hungry", ["sh", "-c", HUNGRY], resources={"memory": "16MiB", "disk": "1MiB"})
    before = cluster.wake("hungry")
    assert cluster.inside("hungry", "touch", "/tmp/eat") == (0, "")
    wait_for(lambda: before not in cluster.instances("hungry"), "its end")
    reasons = [event.get("reason", "") for event in cluster.records("events", "hungry")]
    assert any("out of memory" in reason for reason in reasons), reasons
    assert cluster.wake("hungry")["id"] != before["id"]


def test_an_image_that_is_missing_is_said_at_deploy(cluster: LocalCluster) -> None:
    file = cluster.root / "missing.toml"
    file.write_text('name = "missing"\nimage = "rootfs:./not-there"\ncommand = ["true"]\n')
    ended = cluster.tabane("deploy", str(file))
    assert ended.code == 2
    assert "not-there" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_one_that_dies_later_is_started_again_by_a_request(cluster: LocalCluster) -> None:
    cluster.deploy("mortal")
    before = cluster.wake("mortal")
    cluster.inside("mortal", "sh", "-c", "kill -9 $(busybox pidof busybox httpd)")
    wait_for(lambda: before not in cluster.instances("mortal"), "its end")
    assert cluster.wake("mortal")["id"] != before["id"]


def wait_until_gone(cluster: LocalCluster, name: str, instance: dict[str, Any]) -> None:
    def is_gone() -> bool:
        return instance["id"] not in {one["id"] for one in cluster.instances(name)}

    wait_for(is_gone, "its end")


def test_one_that_somebody_kills_again_and_again_is_woken_each_time(cluster: LocalCluster) -> None:
    cluster.deploy("victim")
    for _ in range(6):
        before = cluster.wake("victim")
        killed = cluster.tabane("pkill", "-TERM", "-e", "--app", "victim", "busybox")
        assert killed.code == 0, killed
        wait_until_gone(cluster, "victim", before)
    assert cluster.wake("victim")["id"] != before["id"]
    assert " problem " not in cluster.tabane("show", "victim").out
    assert "failed" not in {wake["option"] for wake in cluster.records("wakes", "victim")}
    reasons = {event.get("reason", "") for event in cluster.records("events", "victim")}
    assert "the program was killed by SIGTERM, after a signal by order" in reasons


def test_one_that_dies_right_after_its_start_is_waited_for(cluster: LocalCluster) -> None:
    cluster.deploy("frail")
    for _ in range(3):
        before = cluster.wake("frail")
        cluster.inside("frail", "sh", "-c", "kill -9 $(busybox pidof busybox httpd)")
        wait_until_gone(cluster, "frail", before)
    shown = cluster.tabane("show", "frail").out
    assert "ended right after its start 3 times: the program was killed by SIGKILL" in shown
    cluster.wake("frail")
    assert "failed" not in {wake["option"] for wake in cluster.records("wakes", "frail")}
