"""`tabane demo`: three data centers on this machine, and a program that a request wakes."""

from __future__ import annotations

import http.client
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabane.clock import SYSTEM
from tabane.errors import TabaneError, TimedOut
from tabane.tools.cli import INTERRUPTED, interrupt, run
from tabane.tools.cli.common import Parser
from tabane.tools.client import Cluster

DATACENTERS = ["tokyo", "osaka", "ishikari"]
HOST = "hello.test"
WARM_REQUESTS = 200
IDLE_TIMEOUT_S = 20.0
POLL_S = 0.1
PHASE_TEXTS = {
    "queue": "the session waits at the gateway",
    "decide": "the app's home picks a node",
    "network": "a prepared network is claimed",
    "filesystem": "image and writable layer are mounted",
    "engine": "the engine makes the container",
    "boot": "the program starts to listen",
    "ready": "the gateway is granted a slot",
    "first_byte": "the request is forwarded and answered",
}
APP = """\
name = "hello"
image = "host"
command = ["sh", "-c", "echo hello from Tabane >/tmp/index.html; busybox httpd -f -p 8000 -h /tmp"]
port = 8000
hosts = ["hello.test"]

[resources]
memory = "64MiB"
pids = 64

[reactive]
stop_after = "2s"
"""


def demo(argv: list[str]) -> int:
    parser = Parser("demo", "Bring up three data centers and wake a program by a request.")
    parser.add_argument("--nodes", type=int, default=1, help="in each data center (default: 1)")
    args = parser.parse_args(argv)
    from tabane.node.cluster import check_names
    from tabane.node.local import missing

    check_names(DATACENTERS, args.nodes)
    if lacks := missing():
        return _demo_without_root(lacks)
    with tempfile.TemporaryDirectory(prefix="tabane-demo-") as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        return _demo(args.root or root, args.nodes)


def _demo(root: Path, nodes: int) -> int:
    from tabane.tools.cli.cluster import running_cluster

    began = SYSTEM.now()
    signal.signal(signal.SIGTERM, interrupt)
    _title(f"Three data centers, {nodes} node{'s' if nodes > 1 else ''} each")
    with running_cluster(root, DATACENTERS, nodes):
        print(f"up in {SYSTEM.now() - began:.1f} s; state below {root}", flush=True)
        _show_reactive(Cluster(root), root)
    print("\nAll of it is gone again: no process, namespace, mount or cgroup is left.")
    return 0


def _show_reactive(cluster: Cluster, root: Path) -> None:
    gateways = {node["datacenter"]: node["address"] for node in reversed(cluster.config["nodes"])}
    _title("Deploy: the app is stored, nothing runs")
    app = root / "hello.toml"
    app.write_text(APP)
    _run_tabane(root, "deploy", str(app))
    _title("The first request starts it, in tokyo")
    cold_ms, body = _request(gateways["tokyo"])
    print(f"$ curl -H 'Host: {HOST}' http://{gateways['tokyo']}/    -> {body!r}")
    _show_phases(_latest_wake(cluster), cold_ms)
    _title(f"The next {WARM_REQUESTS} find it awake")
    times = sorted(_request(gateways["tokyo"])[0] for _ in range(WARM_REQUESTS))
    p99 = times[int(len(times) * 0.99)]
    print(f"median {statistics.median(times):.2f} ms, p99 {p99:.2f} ms, each on a new connection")
    _title("It is a process of the data centers' one process table")
    _run_tabane(root, "ps", "--app", "hello")
    _title("Two seconds after the last session it is stopped")
    print(f"it ended: {_wait_stopped(cluster)}")
    _title("A request to osaka wakes it there")
    cold_ms, body = _request(gateways["osaka"])
    _show_phases(_latest_wake(cluster), cold_ms)
    _run_tabane(root, "ps", "--app", "hello")


def _request(address: str) -> tuple[float, str]:
    """Milliseconds from connecting to the whole answer, and its body."""
    began = SYSTEM.now()
    connection = http.client.HTTPConnection(address, 80, timeout=30)
    connection.request("GET", "/", headers={"Host": HOST})
    response = connection.getresponse()
    body = response.read().decode().strip()
    connection.close()
    if response.status != 200:
        raise TabaneError(f"the request was answered {response.status}: {body}")
    return (SYSTEM.now() - began) * 1000, body


def _latest_wake(cluster: Cluster) -> dict[str, Any]:
    """The newest record; it is written just after the answer's first byte."""

    def newest() -> dict[str, Any] | None:
        records = cluster.get("/api/v1/wakes?limit=100")["records"]
        unseen = [wake for wake in records if wake["instance"] not in _seen]
        return unseen[-1] if unseen else None

    wake: dict[str, Any] = _wait(newest, "the wake record")
    _seen.add(wake["instance"])
    return wake


_seen: set[str] = set()


def _wait_stopped(cluster: Cluster) -> str:
    def ended() -> str | None:
        if cluster.get("/api/v1/instances")["instances"]:
            return None
        events = cluster.get("/api/v1/events?limit=50")["records"]
        return str(events[-1].get("reason") or events[-1]["state"])

    reason: str = _wait(ended, "the idle stop")
    return reason


def _wait(look: Callable[[], Any], what: str) -> Any:
    deadline = SYSTEM.now() + IDLE_TIMEOUT_S
    while SYSTEM.now() < deadline:
        if (found := look()) is not None:
            return found
        signal.sigtimedwait([], POLL_S)
    raise TimedOut(f"{what} did not come within {IDLE_TIMEOUT_S:g} s")


def _show_phases(wake: dict[str, Any], client_ms: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{wake['option']} wake of {wake['app']} on {wake['node']}")
    for heading, justify in (("phase", "left"), ("ms", "right"), ("", "left"), ("what", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    total_us = wake["total_us"]
    for phase, text in PHASE_TEXTS.items():
        us = wake["phases_us"].get(phase, 0)
        bar = "█" * round(24 * us / total_us)
        table.add_row(phase, f"{us / 1000:.2f}", bar, text)
    table.add_section()
    table.add_row("total", f"{total_us / 1000:.2f}", "", "session to first byte, at the gateway")
    table.add_row("", f"{client_ms:.2f}", "", "connect to whole answer, at the client")
    Console(width=None if sys.stdout.isatty() else 96).print(table)


def _run_tabane(root: Path, *command: str) -> None:
    print(f"$ tabane {' '.join(command)}", flush=True)
    if code := run(["--root", str(root), *command]):
        raise KeyboardInterrupt if code == INTERRUPTED else TabaneError("the demo ends here")


def _title(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)


def _demo_without_root(lacks: list[str]) -> int:
    """What runs without root: the same gateway and decisions, over an engine that pretends."""
    for sentence in lacks:
        print(f"missing: {sentence}", file=sys.stderr)
    from tabane import spec
    from tabane.testing.pretend import show

    shown = show(spec.parse_app(APP))
    print("\nWhat runs without these: gateway and activation, over an engine that only pretends.")
    print(f"answer: {shown['status']} {shown['answer'].strip()!r}")
    _show_phases(shown["wake"], shown["wake"]["total_us"] / 1000)
    return 0
