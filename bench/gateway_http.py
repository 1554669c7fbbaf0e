"""The HTTP gateway beside HAProxy, each on one thread, and nginx itself, the app behind both.

One run takes them in turn, several times, since machines are noisy; the CPU time a request costs
says more than the rate where other programs share the cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from report import Report, percentile
from tabane.gateway.api import Route
from tabane.gateway.http import HttpGateway
from tabane.model import AppName
from tabane.supervise import Supervisor

ROUNDS = 3
SECONDS = 2
CONNECTIONS = (32, 256)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 100000000;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{ listen 127.0.0.1:{app} backlog=4096;
    location / {{ return 200 "hello, world\\n"; }} }} }}
"""
HAPROXY = """
global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option forwardfor
  http-reuse always
frontend all
  bind 127.0.0.1:{haproxy}
  default_backend app
backend app
  server one 127.0.0.1:{app}
"""


class OneSlot:
    """A router's slot with nothing behind it: what is measured is the gateway's HTTP."""

    host = "127.0.0.1"
    pool = "app"
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, port: int) -> None:
        self.port = port

    def first_byte(self) -> None: ...

    def failed(self, reason: str) -> None: ...

    def release(self) -> None: ...


class OneApp:
    """A router that leads everything to one address, at once."""

    def __init__(self, port: int) -> None:
        self._route = Route(AppName("default/app"), 1, 10.0, 60.0)
        self._port = port

    def route(self, host: str, path: str) -> Route:
        return self._route

    def acquire_nowait(self, route: Route) -> OneSlot:
        return OneSlot(self._port)

    async def acquire(self, route: Route) -> OneSlot:
        return OneSlot(self._port)

    def accept_forward(self, headers: dict[bytes, bytes]) -> OneSlot:
        return OneSlot(self._port)

    def pools_gone(self) -> frozenset[str]:
        return frozenset()


async def serve(port: int, app: int) -> None:
    """The gateway's process."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with Supervisor("gateway") as tasks:
        gateway = HttpGateway(OneApp(app), tasks)
        await gateway.serve(socket.create_server(("127.0.0.1", port), backlog=4096))
        await ended.wait()
        await gateway.aclose()


@contextmanager
def running(*argv: str) -> Iterator[int]:
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure(port: int, pid: int, connections: int) -> tuple[float, float, float]:
    """Requests a second, the server's CPU microseconds a request, p99 in milliseconds."""
    before = cpu_s(pid)
    url = f"http://127.0.0.1:{port}/"
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}", "--latency", url]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    used_s = cpu_s(pid) - before
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"wrk met errors at {url}:\n{said}")
    count, rate = (
        re.search(pattern, said) for pattern in (r"(\d+) requests in", r"sec: +([\d.]+)")
    )
    tail = re.search(r"99% +([\d.]+)(us|ms|s)", said)
    assert count and rate and tail
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}[tail[2]]
    return float(rate[1]), used_s / int(count[1]) * 1e6, float(tail[1]) * scale


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def main() -> int:
    report = Report("gateway_http", "Warm HTTP requests, one thread each")
    ports = {name: free_port() for name in ("app", "haproxy", "gateway")}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        Path(name, "nginx.conf").write_text(NGINX.format(dir=name, **ports))
        Path(name, "haproxy.cfg").write_text(HAPROXY.format(**ports))
        serve_argv = (sys.executable, __file__, json.dumps([ports["gateway"], ports["app"]]))
        pids = {
            "app": stack.enter_context(running("nginx", "-c", f"{name}/nginx.conf")),
            "haproxy": stack.enter_context(running("haproxy", "-f", f"{name}/haproxy.cfg")),
            "gateway": stack.enter_context(running(*serve_argv)),
        }
        for port in ports.values():
            wait_for(port)
        for connections in CONNECTIONS:
            taken: dict[str, list[tuple[float, float, float]]] = {server: [] for server in pids}
            for _ in range(ROUNDS):
                for server, pid in pids.items():
                    taken[server].append(measure(ports[server], pid, connections))
            rates = {server: middle(found, 0) for server, found in taken.items()}
            for server, found in taken.items():
                report.row(
                    server="nginx itself" if server == "app" else server,
                    connections=connections,
                    requests_per_s=rates[server],
                    of_haproxy=rates[server] / rates["haproxy"],
                    cpu_us=middle(found, 1),
                    p99_ms=middle(found, 2),
                )
    return report.finish(lambda axes: draw(report, axes))


def draw(report: Report, axes: Any) -> None:
    names = [f"{row['server']}, {row['connections']} connections" for row in report.rows]
    axes.barh(names, [row["requests_per_s"] for row in report.rows])
    axes.invert_yaxis()
    axes.set_xlabel("requests/s")


def middle(found: list[tuple[float, float, float]], column: int) -> float:
    return percentile([one[column] for one in found], 50)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(serve(*json.loads(sys.argv[1])))
    else:
        raise SystemExit(main())
