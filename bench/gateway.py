"""The gateway beside HAProxy, with nginx as the app behind both; one thread each.

    make bench-gateway

A proxy has one core to itself, and the client and the app have the other: the rate at saturation
is what that core can do. Proxies take turns of two seconds, so that what else the machine does
meets both. The load of the latencies is half of the slower one's saturation in that round, and
each request is timed from when it was due (`native/steady.c`). Bars are the medians of the
rounds' ratios. [Why so](../docs/decisions/gateway-speed.md).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peers.native import compile_all
from peers.processes import PYTHON, Failed, Process, Processes, free_port, wait_for_port
from report import Report, percentile

ROUNDS = int(os.environ.get("ROUNDS", "7"))
HTTP2_ROUNDS = 3
SECONDS = 2
CONNECTIONS = (32, 256)
HTTP2_CONNECTIONS, HTTP2_STREAMS = 8, 16
PROXIES = ("haproxy", "gateway")
SERVERS = ("app", *PROXIES)
RATE_BAR, TAIL_BAR = 0.7, 1.5
BODY_BYTES = 1 << 30
MEMORY_MIB_BAR = 16
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log; user root;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; client_max_body_size 0;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{ listen 127.0.0.1:{app} backlog=4096;
    location = / {{ return 200 "hello, world\\n"; }}
    location /files/ {{ root {dir}; sendfile on; dav_methods PUT; create_full_put_path on; }} }} }}
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
  bind 127.0.0.1:{haproxy} backlog 4096
  bind 127.0.0.1:{haproxy_http2} proto h2
  default_backend app
backend app
  server one 127.0.0.1:{app}
"""


class Bench:
    """The servers, and what is asked of them."""

    def __init__(self, directory: Path, processes: Processes) -> None:
        self.directory = directory
        self.programs = compile_all(directory / "programs")
        self.ports = {name: free_port() for name in ("app", *PROXIES, "haproxy_http2")}
        for name, text in (("nginx.conf", NGINX), ("haproxy.cfg", HAPROXY)):
            (directory / name).write_text(text.format(dir=directory, **self.ports))
        cores = sorted(os.sched_getaffinity(0))
        proxy_core, others = cores[:1], cores[1:] or cores
        os.sched_setaffinity(0, others)  # and so of all that is started
        app = processes.start("nginx", "-c", f"{directory}/nginx.conf", quiet=True)
        gateway = (*PYTHON, "peers.gateway", str(self.ports["gateway"]), str(self.ports["app"]))
        self.servers: dict[str, Process] = {
            "app": app,
            "haproxy": processes.start("haproxy", "-f", f"{directory}/haproxy.cfg", quiet=True),
            "gateway": processes.start(*gateway, quiet=True),
        }
        for name in PROXIES:
            os.sched_setaffinity(self.servers[name].pid, proxy_core)
        for port in self.ports.values():
            wait_for_port(port)

    def url(self, server: str, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.ports[server]}{path}"

    def saturate(self, server: str, connections: int) -> dict[str, float]:
        """Requests a second, and the server's CPU time for each."""
        before_s = self.cpu_s(server)
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}", self.url(server)]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        used_s = self.cpu_s(server) - before_s
        if "Non-2xx" in said or "Socket errors" in said:
            raise Failed(f"wrk met errors at {server}:\n{said}")
        count, rate = (re.search(p, said) for p in (r"(\d+) requests in", r"sec: +([\d.]+)"))
        assert count and rate
        return {"requests_per_s": float(rate[1]), "cpu_us": used_s / int(count[1]) * 1e6}

    def saturate_http2(self, server: str) -> dict[str, float]:
        """Likewise, of streams of HTTP/2; the app behind speaks HTTP/1.1."""
        before_s = self.cpu_s(server)
        url = self.url("haproxy_http2" if server == "haproxy" else server)
        argv = ["h2load", f"-c{HTTP2_CONNECTIONS}", f"-m{HTTP2_STREAMS}", f"-D{SECONDS}", url]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        used_s = self.cpu_s(server) - before_s
        count = re.search(r"(\d+) succeeded, 0 failed, 0 errored, 0 timeout", said)
        if not count or not int(count[1]):
            raise Failed(f"h2load met errors at {server}:\n{said}")
        done = int(count[1])
        return {"requests_per_s": done / SECONDS, "cpu_us": used_s / done * 1e6}

    def load(self, server: str, connections: int, rate: float) -> dict[str, float]:
        """Milliseconds at a steady rate."""
        words = (self.ports[server], connections, round(rate), round(SECONDS * 1000))
        argv = [str(self.programs / "steady"), *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{server} under steady load: {done.stderr}")
        _, p50, p90, p99, *_ = (int(word) / 1e6 for word in done.stdout.split())
        return {"load_per_s": rate, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}

    def transfer(self, server: str, name: str) -> dict[str, float]:
        """GB a second of a large body up and down again, and the server's growth by it."""
        source, back = self.directory / "source", self.directory / "back"
        path = f"/files/{name}"
        self.curl(self.url(server))
        before = self.peak_kib(server)
        up_s = self.curl("-T", str(source), "-H", "Expect:", self.url(server, path))
        down_s = self.curl("-o", str(back), self.url(server, path))
        grown_kib = self.peak_kib(server) - before
        subprocess.run(["cmp", str(source), str(back)], check=True)
        (self.directory / "files" / name).unlink()
        back.unlink()
        gigabytes = BODY_BYTES / 1e9
        return {
            "up_gb_per_s": gigabytes / up_s,
            "down_gb_per_s": gigabytes / down_s,
            "grown_mib": grown_kib / 1024,
        }

    def curl(self, *words: str) -> float:
        """Seconds that it took."""
        argv = ["curl", "-sSf", "--max-time", "60", "-w", "%{stderr}%{time_total}", *words]
        done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Failed(f"curl {' '.join(words)}: {done.stderr}")
        return float(done.stderr)

    def cpu_s(self, server: str) -> float:
        stat = Path(f"/proc/{self.servers[server].pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def peak_kib(self, server: str) -> int:
        """The most memory that it had resident so far."""
        status = Path(f"/proc/{self.servers[server].pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])


Turn = dict[str, float]


def in_turns(
    measure: Callable[[str], Turn], servers: tuple[str, ...], number: int
) -> dict[str, Turn]:
    """What each server is measured to do in round `number`; who begins rotates."""
    first = number % len(servers)
    return {server: measure(server) for server in servers[first:] + servers[:first]}


def middle(values: Iterable[float]) -> float:
    return percentile(values, 50)


def medians(rounds: list[dict[str, Turn]], server: str) -> Turn:
    return {what: middle(one[server][what] for one in rounds) for what in rounds[0][server]}


def measure_speed(bench: Bench, report: Report, connections: int) -> None:
    rates, tails = [], []
    for number in range(ROUNDS):
        rates.append(in_turns(lambda name: bench.saturate(name, connections), SERVERS, number))
        load = min(rates[-1][name]["requests_per_s"] for name in PROXIES) / 2
        tails.append(
            in_turns(lambda name: bench.load(name, connections, load), PROXIES, number)  # noqa: B023
        )
    for name in SERVERS:
        columns = {"server": "nginx itself" if name == "app" else name, "connections": connections}
        columns |= medians(rates, name)
        report.row(**columns, **(medians(tails, name) if name in PROXIES else {}))
    for what, rounds, column, bar, better in (
        ("rate at saturation", rates, "requests_per_s", RATE_BAR, "higher"),
        ("p99 at the same load", tails, "p99_ms", TAIL_BAR, "lower"),
    ):
        ratio = middle(one["gateway"][column] / one["haproxy"][column] for one in rounds)
        name = f"{connections} connections: {what}, of HAProxy's"
        report.bar(name, ratio, bar, unit="times", better=better)


def measure_http2(bench: Bench, report: Report) -> None:
    rates = [in_turns(bench.saturate_http2, PROXIES, number) for number in range(HTTP2_ROUNDS)]
    for name in PROXIES:
        report.row(
            server=f"{name}, HTTP/2",
            connections=HTTP2_CONNECTIONS,
            streams=HTTP2_CONNECTIONS * HTTP2_STREAMS,
            **medians(rates, name),
        )


def measure_bodies(bench: Bench, report: Report) -> None:
    block = os.urandom(1 << 20)
    with (bench.directory / "source").open("wb") as file:
        for number in range(BODY_BYTES >> 20):
            file.write(number.to_bytes(8) + block[8:])
    for name in PROXIES:
        found = bench.transfer(name, name)
        report.row(server=name, **found)
        if name == "gateway":
            what = "a body of 1 GiB both ways: memory grows by"
            report.bar(what, found["grown_mib"], MEMORY_MIB_BAR, unit="MiB")


def main() -> int:
    report = Report("gateway", "Warm HTTP requests, one thread each")
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name, Processes(Path(name)) as processes:
        bench = Bench(Path(name), processes)
        for connections in CONNECTIONS:
            measure_speed(bench, report, connections)
        measure_http2(bench, report)
        measure_bodies(bench, report)
    os.sched_setaffinity(0, cores)
    return report.finish(lambda axes: draw(report, axes))


def draw(report: Report, axes: Any) -> None:
    rows = [row for row in report.rows if "requests_per_s" in row]
    names = [f"{row['server']}, {row['connections']} connections" for row in rows]
    axes.barh(names, [row["requests_per_s"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("requests/s at saturation")


if __name__ == "__main__":
    raise SystemExit(main())
