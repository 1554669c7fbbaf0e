"""The HTTP gateway on uvloop, in a process of its own, between real programs: curl, wrk, nginx,
Python's http.server (HTTP/1.0, one request a connection)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

PATIENCE_S = 15.0
GATEWAY = """
import asyncio, json, signal, socket, sys
import uvloop
from tabane.gateway.http import HttpGateway
from tabane.supervise import Supervisor
from tabane.testing.gateway import FakeApp, FakeRouter

async def main(listener, apps):
    router = FakeRouter()
    for host, port in apps.items():
        router.add(host, FakeApp("default/" + host, [("127.0.0.1", port)]))
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with Supervisor("gateway") as tasks:
        gateway = HttpGateway(router, tasks)
        await gateway.serve(socket.socket(fileno=listener))
        await asked.wait()
        await gateway.drain(5.0)
    print(json.dumps({
        "held": router.held,
        "released_once": all(slot.releases == 1 for slot in router.slots),
        "aborted": gateway.counters.aborted,
        "responses": gateway.counters.responses,
    }))

uvloop.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))
"""
NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {dir}/body; client_max_body_size 0;
  proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s; keepalive_requests 1000000;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root {dir}/www; dav_methods PUT; create_full_put_path on; }}
    location = /hello {{ return 200 "hello\\n"; }}
  }}
}}
"""


class Place:
    """Where a test's programs are: the gateway's address, process, and last words."""

    def __init__(self, directory: Path, port: int, gateway: subprocess.Popen[str]) -> None:
        self.directory = directory
        self.port = port
        self.gateway = gateway

    def curl(self, host: str, path: str, *options: str, check: bool = True) -> str:
        argv = ["curl", "-sS", "-H", f"Host: {host}", "--max-time", "60", *options]
        done = subprocess.run(
            [*argv, f"http://127.0.0.1:{self.port}{path}"], capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def peak_bytes(self) -> int:
        """The most memory that the gateway had resident so far."""
        status = Path(f"/proc/{self.gateway.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def finish(self) -> dict[str, object]:
        self.gateway.send_signal(signal.SIGTERM)
        output, _ = self.gateway.communicate(timeout=PATIENCE_S)
        found: dict[str, object] = json.loads(output)
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def running(*argv: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    tmp_path.chmod(0o755)
    (tmp_path / "www").mkdir(mode=0o777)
    (tmp_path / "www").chmod(0o777)
    ports = {"nginx.test": free_port(), "python.test": free_port()}
    (tmp_path / "nginx.conf").write_text(NGINX.format(dir=tmp_path, port=ports["nginx.test"]))
    serve = (sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(tmp_path / "www"))
    with ExitStack() as stack:
        start = stack.enter_context
        start(running("nginx", "-c", f"{tmp_path}/nginx.conf", stderr=subprocess.DEVNULL))
        start(running(*serve, str(ports["python.test"]), stderr=subprocess.DEVNULL))
        for port in ports.values():
            wait_for(port)
        listener = start(socket.create_server(("127.0.0.1", 0), backlog=1024))
        fileno = listener.fileno()
        argv = (sys.executable, "-c", GATEWAY, str(fileno), json.dumps(ports))
        gateway = start(running(*argv, pass_fds=[fileno], stdout=subprocess.PIPE))
        yield Place(tmp_path, listener.getsockname()[1], gateway)


def test_curl_reaches_both_servers_in_every_way(place: Place) -> None:
    (place.directory / "www" / "page").write_bytes(b"x" * 100_000)
    assert place.curl("nginx.test", "/hello") == "hello\n"
    for host in ("nginx.test", "python.test"):
        for option in ("--http1.0", "--http1.1", "--http2"):
            assert place.curl(host, "/page", option) == "x" * 100_000
        assert "Content-Length: 100000" in place.curl(host, "/page", "-I")
    assert place.curl("nginx.test", "/page", "-r", "5-9") == "xxxxx"
    assert '"reason":"no app has the host name' in place.curl("other.test", "/")
    kept = place.curl("nginx.test", "/hello", *(f"http://127.0.0.1:{place.port}/hello",) * 9)
    assert kept == "hello\n" * 10
    assert place.finish()["released_once"]


def test_large_bodies_pass_both_ways_in_little_memory(place: Place) -> None:
    size = 256 << 20
    source = place.directory / "source"
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    place.curl("nginx.test", "/hello")
    before = place.peak_bytes()
    place.curl("nginx.test", "/up", "-T", str(source))
    place.curl("nginx.test", "/up2", "-T", str(source), "-H", "Transfer-Encoding: chunked")
    for name in ("up", "up2"):
        place.curl("nginx.test", f"/{name}", "-o", str(place.directory / "back"))
        assert digest(place.directory / "back") == digest(source)
    place.curl("python.test", "/up", "-o", str(place.directory / "back"))
    assert digest(place.directory / "back") == digest(source)
    assert place.peak_bytes() - before < 16 << 20
    assert place.finish()["aborted"] == 0


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_wrk_meets_no_error(place: Place) -> None:
    for host in ("nginx.test", "python.test"):
        done = subprocess.run(
            [
                "wrk",
                "-t1",
                "-c32",
                "-d1",
                "-H",
                f"Host: {host}",
                f"http://127.0.0.1:{place.port}/hello",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "requests in" in done.stdout
        assert "Socket errors" not in done.stdout
        assert ("Non-2xx" in done.stdout) is (host == "python.test")  # it has no such page
    found = place.finish()
    assert found["held"] == 0
    assert found["released_once"]
