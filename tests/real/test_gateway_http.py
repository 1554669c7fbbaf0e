"""The HTTP gateway on uvloop, in a process of its own, between real programs: curl, wrk, nginx,
Python's http.server (HTTP/1.0, one request a connection)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.real.gateways import Place, free_port, gateway_before, running

pytestmark = pytest.mark.real

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
        apps = {host: (port, "http") for host, port in ports.items()}
        yield start(gateway_before(tmp_path, apps))


def test_curl_reaches_both_servers_in_every_way(place: Place) -> None:
    (place.directory / "www" / "page").write_bytes(b"x" * 100_000)
    assert place.curl("nginx.test", "/hello") == "hello\n"
    for host in ("nginx.test", "python.test"):
        for option in ("--http1.0", "--http1.1", "--http2", "--http2-prior-knowledge"):
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
    place.curl("nginx.test", "/up3", "-T", str(source), "--http2-prior-knowledge")
    for name, option in (
        ("up", "--http1.1"),
        ("up2", "--http1.1"),
        ("up3", "--http2-prior-knowledge"),
    ):
        place.curl("nginx.test", f"/{name}", option, "-o", str(place.directory / "back"))
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
