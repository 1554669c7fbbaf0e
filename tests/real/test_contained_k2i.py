"""Apps that ask for k2i: their instances read what runs of them, and nothing else of the node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real

TOKYO = "tokyo/tokyo-1"
ASK = """
import http.client, json, os, socket, sys

class Here(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(os.environ["TABANE_K2I"].removeprefix("unix://"))

here = Here("k2i")
here.request(sys.argv[1], sys.argv[2])
answer = here.getresponse()
print(json.dumps([answer.status, json.loads(answer.read() or "null")]))
"""
MANY = """
import os, socket, time
path = os.environ["TABANE_K2I"].removeprefix("unix://")
socks = []
for n in range(40):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(path)
    socks.append(sock)
for sock in socks:
    try:
        sock.sendall(b"GET /v2/processes?fields=pid HTTP/1.1\\r\\nHost: k2i\\r\\n\\r\\n")
    except OSError:
        pass
print([sock.recv(12).decode() for sock in socks])
"""
SLEEP = ("sh", "-c", "sleep 86400; true")


@pytest.fixture(scope="module")
def readers(make_cluster: Factory) -> LocalCluster:
    """Two instances of an app that asks for k2i, one by each engine, and one of another app."""
    cluster = make_cluster(["tokyo"])
    for name, driver, instances, asks in (
        ("reader", "runc", 2, {"k2i": True}),
        ("both", "crun", 1, {"k2i": True, "middlecon": ["deploys"]}),
        ("other", "", 1, {}),
    ):
        cluster.deploy(
            name,
            SLEEP,
            port=None,
            driver=driver,
            reactive={"min": instances, "ready": "started"},
            services=asks,
        )
        wait_for(lambda: len(cluster.instances(name, "ready")) == instances, name)  # noqa: B023
    return cluster


def ask(
    cluster: LocalCluster, path: str, app: str = "reader", method: str = "GET"
) -> tuple[int, Any]:
    """What an instance is answered."""
    code, out = cluster.inside(app, "/usr/bin/python3", "-c", ASK, method, path)
    assert code == 0, out
    status, body = json.loads(out)
    return status, body


def names(rows: Sequence[dict[str, Any]], field: str) -> set[str]:
    return {row[field] for row in rows}


def test_it_sees_all_instances_of_its_app_with_their_arguments(readers: LocalCluster) -> None:
    status, answer = ask(readers, "/v2/processes")
    assert status == 200
    rows = answer["processes"]
    assert names(rows, "app") == {"default/reader"}
    assert names(rows, "instance") == names(readers.instances("reader"), "id")
    assert "sleep 86400" in names(rows, "command")


def test_without_an_app_of_its_own_it_still_sees_no_other(readers: LocalCluster) -> None:
    every = readers.api.get("/v2/processes", node=TOKYO)["processes"]
    assert {"default/both", "default/other", ""} <= names(every, "app")
    for kind in ("processes", "threads", "tree", "facts"):
        status, answer = ask(readers, f"/v2/{kind}")
        assert status == 200
        assert names(answer[kind], "app") <= {"default/reader"}


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v2/processes?app=other", 403, "sees its own app only, default/reader"),
        ("GET", "/v2/processes?app=reader,other", 403, "sees its own app only"),
        ("GET", "/v2/processes?scope=cluster", 403, "sees its own node only"),
        ("GET", "/v2/host", 404, "an instance can ask for /v2/processes, /v2/threads"),
        ("GET", "/v2/files", 404, "not for '/v2/files'"),
        ("GET", "/v2/raw", 404, "not for"),
        ("GET", "/v1/proc", 404, "not for"),
        ("GET", "/api/v1/apps", 404, "not for"),
        ("GET", "/v2/processes/../host", 404, "not for"),
        ("GET", "/v2/processes?colour=red", 400, "no parameter 'colour'"),
        ("GET", "/v2/processes?name=%ff", 400, "cannot be read"),
        ("POST", "/v2/processes", 403, "can only be read"),
        ("POST", "/v2/processes/1/signal", 403, "can only be read"),
        ("DELETE", "/v2/processes", 403, "can only be read"),
    ],
)
def test_what_it_may_not(
    readers: LocalCluster, method: str, path: str, status: int, said: str
) -> None:
    answer = ask(readers, path, method=method)
    assert answer[0] == status
    assert said in answer[1]["message"]


def test_its_own_name_for_the_app_and_other_parameters_work(readers: LocalCluster) -> None:
    status, answer = ask(readers, "/v2/processes?app=reader&name=sleep&fields=name,instance")
    assert status == 200
    assert len(answer["processes"]) == 2
    assert names(answer["processes"], "name") == {"sleep"}


def test_only_what_is_asked_for_is_there(readers: LocalCluster) -> None:
    assert readers.inside("reader", "ls", "/run/tabane") == (0, "k2i.sock\n")
    assert readers.inside("both", "ls", "/run/tabane") == (0, "hub.sock\nk2i.sock\n")
    script = "ls /run; echo ${TABANE_K2I-none}"
    assert readers.inside("other", "sh", "-c", script) == (0, "none\n")
    assert readers.inside("reader", "sh", "-c", "rm /run/tabane/k2i.sock")[0] == 1
    assert "k2i: what of it runs on its node" in readers.tabane("show", "reader").out


def test_every_user_in_there_may_ask(readers: LocalCluster) -> None:
    program = "import os, sys; os.setgid(1000); os.setuid(1000)\n" + ASK
    code, out = readers.inside("both", "/usr/bin/python3", "-c", program, "GET", "/v2/processes")
    assert code == 0
    assert json.loads(out)[0] == 200


def test_connections_are_few_and_one_too_many_is_told(readers: LocalCluster) -> None:
    code, out = readers.inside("reader", "/usr/bin/python3", "-c", MANY)
    assert code == 0
    said = eval(out)
    assert said.count("HTTP/1.1 200") == 16
    assert said.count("HTTP/1.1 503") == 24
    assert ask(readers, "/v2/processes")[0] == 200


def test_after_kill_9_of_the_agent_it_is_there_again(readers: LocalCluster) -> None:
    readers.kill("agentd")
    wait_for(lambda: readers.answers(TOKYO), "the agent's return")
    readers.wait_whole()
    status, answer = ask(readers, "/v2/processes")
    assert (status, names(answer["processes"], "app")) == (200, {"default/reader"})


def test_at_its_end_the_socket_goes(readers: LocalCluster) -> None:
    instance = readers.instances("both")[0]["id"]
    place = Path("/proc", str(readers.holder(TOKYO)), "root", "mnt", "run", instance)
    assert (place / "services" / "k2i.sock").is_socket()
    assert readers.tabane("rm", "both").code == 0
    wait_for(lambda: not place.exists(), "the end of its files")
