"""nginx, Redis and commands as they are on Debian: asked by a node, and by apps from inside."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.clock import SYSTEM
from tabane.k2i.collectors.file import load_jobs
from tabane.k2i.collectors.runner import Collection, FactRow
from tabane.k2i.procfs import start_ticks
from tabane.supervise import Supervisor

pytestmark = pytest.mark.real

TOKYO = "tokyo/tokyo-1"
NGINX = """
daemon off;
pid {place}/nginx.pid;
error_log stderr crit;
worker_processes 2;
events {{}}
http {{
    access_log off;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    server {{
        listen {port};
        location / {{ return 200 "hello\\n"; }}
        location = /status {{ stub_status; allow 127.0.0.1; deny all; }}
    }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def listens(where: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
    with socket.socket(family) as sock:
        return sock.connect_ex(where) == 0


@contextmanager
def program(argv: list[str], where: tuple[str, int] | str) -> Iterator[subprocess.Popen[bytes]]:
    """A server, until the end of the block."""
    running = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(where), argv[0])
        yield running
    finally:
        running.send_signal(signal.SIGCONT)
        running.terminate()
        running.wait()


@contextmanager
def nginx(place: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    config = place / "nginx.conf"
    config.write_text(NGINX.format(place=place, port=f"127.0.0.1:{port}"))
    argv = ["nginx", "-c", str(config), "-e", "stderr"]
    with program(argv, ("127.0.0.1", port)) as running:
        yield running, port


@contextmanager
def redis(place: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    port, path = free_port(), place / "redis.sock"
    argv = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", str(path)]
    argv += ["--dir", str(place), "--save", "", *options]
    with program(argv, str(path)) as running:
        yield running, port, path


async def run(*argv: str) -> None:
    program = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.DEVNULL)
    assert await program.wait() == 0


Collect = Callable[[str], Collection]


@pytest.fixture
async def collect(tmp_path: Path) -> AsyncIterator[Collect]:
    """What a file asks for, collected."""
    async with Supervisor("test") as tasks:

        def start(text: str) -> Collection:
            path = tmp_path / "collect.toml"
            path.write_text(text)
            found = Collection(TOKYO, clock=SYSTEM, tasks=tasks, ticks=start_ticks)
            found.want("", load_jobs(path))
            return found

        yield start


async def told(
    collection: Collection, collector: str, when: Callable[[FactRow], Any] = lambda row: row.facts
) -> FactRow:
    """A collector's row, once it is as it should be."""
    async with asyncio.timeout(60):
        while True:
            for row in collection.rows():
                if row.collector == collector and when(row):
                    return row
            await asyncio.sleep(0.02)


async def test_nginx(collect: Collect, scratch: Path) -> None:
    with nginx(scratch) as (running, port):
        collection = collect(
            f'[[collect]]\nkind = "nginx"\nurl = "http://127.0.0.1:{port}/status"\n'
            'interval = "1s"\ndeadline = "1s"\n'
        )
        row = await told(collection, "nginx")
        assert (row.of, row.pid) == ("process", running.pid)  # the master, not its workers
        assert row.start_ticks == start_ticks(running.pid)
        assert row.facts["connections.active"] == row.facts["connections.writing"] == 1
        before = row.facts["requests"]
        assert isinstance(before, int)
        after = await told(collection, "nginx", lambda row: row.facts["requests"] != before)
        assert after.facts["requests"] == before + 1


async def test_a_location_without_stub_status_is_said(collect: Collect, scratch: Path) -> None:
    with nginx(scratch) as (_, port):
        url = f"http://127.0.0.1:{port}/"
        row = await told(
            collect(f'[[collect]]\nkind = "nginx"\nurl = "{url}"\n'), "nginx", lambda r: r.error
        )
        assert row.error.startswith(f"{url} answers 'hello\\n', which is no stub_status")
        assert (row.of, row.facts) == ("node", {})


async def test_redis_over_tcp_and_its_unix_socket(collect: Collect, tmp_path: Path) -> None:
    with redis(tmp_path) as (running, port, path):
        await run("redis-cli", "-p", str(port), "set", "a", "b")
        collection = collect(
            f'[[collect]]\nkind = "redis"\nname = "tcp"\nurl = "redis://127.0.0.1:{port}"\n'
            f'[[collect]]\nkind = "redis"\nname = "unix"\nurl = "unix://{path}"\n'
        )
        for name in ("tcp", "unix"):
            row = await told(collection, name)
            assert (row.of, row.pid) == ("process", running.pid)
            assert row.facts["process_id"] == running.pid
            assert row.facts["tcp_port"] == port
            assert row.facts["db0.keys"] == 1
            assert row.facts["role"] == "master"


async def test_redis_with_a_password(collect: Collect, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    with redis(tmp_path, "--requirepass", "open sesame") as (_, port, _):
        url = f'kind = "redis"\nurl = "redis://127.0.0.1:{port}"\n'
        collection = collect(
            f'[[collect]]\nname = "without"\n{url}'
            f'[[collect]]\nname = "with"\npassword_file = "{secret}"\n{url}'
        )
        refused = await told(collection, "without", lambda row: row.error)
        assert "refuses: NOAUTH Authentication required" in refused.error
        assert (await told(collection, "with")).facts["role"] == "master"


async def test_a_server_that_hangs_delays_no_other(collect: Collect, tmp_path: Path) -> None:
    with redis(tmp_path) as (running, port, _):
        collection = collect(
            f'[[collect]]\nkind = "redis"\nurl = "redis://127.0.0.1:{port}"\n'
            'interval = "1s"\ndeadline = "500ms"\n'
            '[[collect]]\nkind = "command"\ncommand = ["echo", "n 1"]\n'
            'interval = "1s"\ndeadline = "500ms"\n'
        )
        await told(collection, "redis")
        running.send_signal(signal.SIGSTOP)
        hung = await told(collection, "redis", lambda row: row.error)
        assert hung.error == "no answer within 0.5 s"
        assert hung.facts["tcp_port"] == port  # of before, with its age
        assert hung.age_s is not None and hung.age_s > 0.5
        at = (await told(collection, "command")).at
        await told(collection, "command", lambda row: row.at != at and not row.error)
        running.send_signal(signal.SIGCONT)
        assert (await told(collection, "redis", lambda row: not row.error)).failures == 0
    ended = await told(collection, "redis", lambda row: "refused" in row.error)
    assert (ended.of, ended.facts) == ("node", {})  # the process is gone, and its facts with it


@pytest.fixture(scope="module")
def shops(make_cluster: Factory) -> LocalCluster:
    """An instance that runs nginx, one that runs Redis, one with nothing to tell."""
    cluster = make_cluster(["tokyo"])
    start = NGINX.format(place="/tmp", port="8000").replace('"hello\\n"', "hello")
    script = f"cat >/tmp/nginx.conf <<'END'\n{start}END\nexec nginx -c /tmp/nginx.conf -e stderr"
    asks: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "web": [
            ("nginx", {"url": "http://127.0.0.1:8000/status"}),
            ("command", {"command": ["sh", "-c", "echo host $(hostname); echo uid $(id -u)"]}),
        ],
        "cache": [("redis", {"url": "redis://localhost:6379"})],
    }
    deploy(cluster, "web", ["sh", "-c", script], 8000, asks["web"])
    redis_server = ["redis-server", "--save", "", "--dir", "/tmp", "--bind", "127.0.0.1"]
    deploy(cluster, "cache", redis_server, None, asks["cache"])
    return cluster


def deploy(
    cluster: LocalCluster,
    name: str,
    command: list[str],
    port: int | None,
    asks: list[tuple[str, dict[str, Any]]],
) -> None:
    """With collectors, which `LocalCluster.deploy` has no words for."""
    lines = [f'name = "{name}"', 'image = "host"', f"command = {json.dumps(command)}"]
    if port is not None:
        lines += [f"port = {port}", f'hosts = ["{name}.test"]']
    lines += ["[reactive]", "min = 1", 'stop_timeout = "1s"']
    for kind, fields in asks:
        lines += ["[[collect]]", f'kind = "{kind}"', 'interval = "1s"', 'deadline = "900ms"']
        lines += [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
    body = {"text": "\n".join(lines), "file": f"{name}.toml", "image": "host"}
    cluster.api.post("/api/v1/apps", body)
    wait_for(lambda: cluster.instances(name, "ready"), f"an instance of {name}")


def facts(cluster: LocalCluster, app: str, collector: str) -> dict[str, Any]:
    """A collector's row, once it has told something."""

    def look() -> dict[str, Any] | None:
        rows = cluster.api.get(f"/v2/facts?app={app}&collector={collector}", node=TOKYO)["facts"]
        return next((row for row in rows if row["facts"]), None)

    return wait_for(look, f"facts of {app} by {collector}")


def test_an_apps_collectors_tell_of_its_instance(shops: LocalCluster) -> None:
    for app, collector, fact in (
        ("web", "nginx", "connections.active"),
        ("web", "command", "host"),
        ("cache", "redis", "redis_version"),
    ):
        row = facts(shops, app, collector)
        (instance,) = shops.instances(app, "ready")
        assert (row["of"], row["instance"], row["app"]) == (
            "instance",
            instance["id"],
            f"default/{app}",
        )
        assert (row["pid"], row["error"]) == (0, "")
        assert fact in row["facts"]


def test_a_command_runs_inside_as_the_program(shops: LocalCluster) -> None:
    told = facts(shops, "web", "command")["facts"]
    assert told == {"host": f"web-{shops.instances('web')[0]['id']}", "uid": 0}


def test_facts_of_an_instance_stand_at_its_first_process(shops: LocalCluster) -> None:
    facts(shops, "cache", "redis")
    (instance,) = shops.instances("cache", "ready")
    path = "/v2/processes?app=cache&facts=yes&fields=pid,facts"
    rows = shops.api.get(path, node=TOKYO)["processes"]
    told = {row["pid"]: row["facts"] for row in rows}
    assert told.pop(instance["pid"])["redis"]["role"] == "master"
    assert not any(told.values())


def test_a_collector_reaches_nothing_outside_of_its_instance(shops: LocalCluster) -> None:
    """Redis listens at the loopback of another instance of the same node."""
    deploy(shops, "alone", ["sleep", "1000"], None, [("redis", {"url": "redis://127.0.0.1:6379"})])

    def error() -> str:
        rows = shops.api.get("/v2/facts?app=alone", node=TOKYO)["facts"]
        return str(rows[0]["error"]) if rows else ""

    assert wait_for(error, "its error") == "redis://127.0.0.1:6379: Connection refused"
    shops.tabane("rm", "alone")
    wait_for(lambda: not shops.api.get("/v2/facts?app=alone", node=TOKYO)["facts"], "its end")


def test_after_kill_9_of_the_agent_it_goes_on(shops: LocalCluster) -> None:
    shops.kill("agentd")
    wait_for(lambda: shops.answers(TOKYO), "the agent's return")
    assert facts(shops, "web", "nginx")["error"] == ""
    shops.wait_whole()


@pytest.fixture(scope="module")
def osaka(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["osaka"])


def test_a_node_collects_by_its_own_file(osaka: LocalCluster) -> None:
    cluster, node = osaka, "osaka/osaka-1"
    place = Path("/proc", str(cluster.holder(node)), "root", "mnt")
    (place / "collect.toml").write_text(
        '[[collect]]\nkind = "command"\ncommand = ["echo", "n 1"]\n'
    )
    cluster.kill("agentd", node)

    def rows() -> Any:
        return cluster.answers(node) and cluster.api.get("/v2/facts", node=node)["facts"]

    row = wait_for(lambda: [row for row in rows() or [] if row["facts"]], "its facts")[0]
    assert (row["of"], row["dc"], row["node"], row["facts"]) == (
        "node",
        "osaka",
        "osaka-1",
        {"n": 1},
    )
    (place / "collect.toml").write_text('[[collect]]\nkind = "nginx"\n')
    cluster.kill("agentd", node)
    row = wait_for(lambda: [row for row in rows() or [] if row["error"]], "its error")[0]
    assert "collect.toml:1: collect[1].url: is missing" in row["error"]
    cluster.wait_whole()


def test_a_k2i_of_its_own_collects_by_a_file(scratch: Path) -> None:
    path, file = scratch / "k2i.sock", scratch / "facts.toml"
    with redis(scratch) as (running, port, _):
        file.write_text(f'[[collect]]\nkind = "redis"\nurl = "redis://127.0.0.1:{port}"\n')
        argv = [str(Path(sys.executable).with_name("k2i")), "--unix", str(path)]
        with program([*argv, "--collect", str(file)], str(path)):
            ask = ["curl", "-s", "--unix-socket", str(path)]
            ask.append(f"http://localhost/v2/processes?pid={running.pid}&facts=yes")

            def look() -> Any:
                (row,) = json.loads(subprocess.run(ask, capture_output=True).stdout)["processes"]
                return row["facts"].get("redis")

            assert wait_for(look, "facts")["process_id"] == running.pid
    file.write_text('[[collect]]\nkind = "redis"\n')
    done = subprocess.run([*argv, "--collect", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"k2i: {file}:1: collect[1].url: is missing: redis is asked there\n"
    listed = subprocess.run([argv[0], "--list-collectors"], capture_output=True, text=True).stdout
    assert [line.split() for line in listed.splitlines()][:3] == [
        ["command", "tabane", "works"],
        ["nginx", "tabane", "works"],
        ["redis", "tabane", "works"],
    ]
