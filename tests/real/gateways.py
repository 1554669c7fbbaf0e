"""A gateway in a process of its own, with a router that leads where the test says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

PATIENCE_S = 60.0
GATEWAY = """
import asyncio, json, signal, socket, sys
import uvloop
from tabane.gateway.http import HttpGateway
from tabane.supervise import Supervisor
from tabane.testing.gateway import FakeApp, FakeRouter

async def main(listener, apps):
    router = FakeRouter()
    for host, (port, protocol) in apps.items():
        app = FakeApp("default/" + host, [("127.0.0.1", port)], protocol=protocol)
        router.add(host, app)
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


@contextmanager
def gateway_before(directory: Path, apps: Mapping[str, tuple[int, str]]) -> Iterator[Place]:
    """A gateway before apps on ports of the loopback, by host name; each with its protocol."""
    with ExitStack() as stack:
        for port, _ in apps.values():
            wait_for(port)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        fileno = listener.fileno()
        argv = (sys.executable, "-c", GATEWAY, str(fileno), json.dumps(apps))
        options = {"pass_fds": [fileno], "stdout": subprocess.PIPE}
        gateway = stack.enter_context(running(*argv, **options))
        yield Place(directory, listener.getsockname()[1], gateway)
