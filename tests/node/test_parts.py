"""Parts under a real holder: their sockets, their restarts, their end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tabane.node import parts as module
from tabane.node.parts import Parts
from tabane.node.spawner import HolderSpawner

INHERIT = "import json, os, socket, sys, time\nfrom tabane.node.part import inherited_sockets\n"
TELL = (
    INHERIT
    + """
told = {
    "numbers": os.environ["TABANE_SOCKETS"],
    "part": os.environ["TABANE_PART"],
    "environment": os.environ["TABANE_FROM_CONFIG"],
    "open": sorted(map(int, os.listdir("/proc/self/fd"))),
}
found = inherited_sockets()
told["sockets"] = {name: [s.family, s.type, s.getsockname()] for name, s in found.items()}
with open(sys.argv[1] + ".new", "w") as file:
    json.dump(told, file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""
)
ANSWER = (
    INHERIT
    + """
web = inherited_sockets()["web"]
while True:
    client, _ = web.accept()
    client.sendall(str(os.getpid()).encode())
    client.close()
"""
)
DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w")
time.sleep(1000)
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def part(name: str, program: str, *argv: str, sockets: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "name": name,
        "argv": [sys.executable, "-c", program, *argv],
        "sockets": list(sockets),
    }


def missing_part() -> dict[str, Any]:
    return {"name": "agent", "argv": ["/nowhere/agent"], "sockets": []}


def ask_pid(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port)) as client:
        return int(client.recv(100))


def test_a_part_gets_its_sockets_and_no_others(holder: Any, wait_until: Any) -> None:
    ports = [free_port(), free_port()]
    api, told = holder.directory / "api.sock", holder.directory / "told"
    sockets = [
        {"name": "api", "kind": "unix", "address": str(api), "mode": 0o666},
        {"name": "web", "kind": "tcp", "address": f"127.0.0.1:{ports[0]}"},
        {"name": "dns", "kind": "udp", "address": f"127.0.0.1:{ports[1]}"},
        {"name": "foreign", "kind": "tcp", "address": "198.51.100.1:80", "freebind": True},
    ]
    tell = part("agent", TELL, str(told), sockets=("web", "api", "dns"))
    holder.start(sockets=sockets, parts=[tell])
    wait_until(told.exists)
    found = json.loads(told.read_text())
    assert found["numbers"] == "web=100,api=101,dns=102"
    assert (found["part"], found["environment"]) == ("agent", "yes")
    assert [number for number in found["open"] if number > 3] == [100, 101, 102]
    stream, datagram = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
    inet, unix = int(socket.AF_INET), int(socket.AF_UNIX)
    assert found["sockets"]["web"] == [inet, stream, ["127.0.0.1", ports[0]]]
    assert found["sockets"]["dns"] == [inet, datagram, ["127.0.0.1", ports[1]]]
    assert found["sockets"]["api"][:2] == [unix, stream]
    assert api.stat().st_mode & 0o777 == 0o666
    assert holder.control.stat().st_mode & 0o777 == 0o600
    assert holder.terminate() == 0


def test_a_killed_part_comes_back_and_its_backlog_is_served(holder: Any, wait_until: Any) -> None:
    port = free_port()
    web = {"name": "web", "kind": "tcp", "address": f"127.0.0.1:{port}"}
    holder.start(sockets=[web], parts=[part("gateway-0", ANSWER, sockets=("web",))])
    pids = [ask_pid(port)]
    for _ in range(2):
        os.kill(pids[-1], signal.SIGKILL)
        wait_until(lambda: pids[-1] not in holder.children())
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        answers = {int(client.recv(100)) for client in waiting}
        for client in waiting:
            client.close()
        (pid,) = answers
        assert pid not in pids
        pids.append(pid)
    assert "gateway-0 ended ({'signal': 9}); pausing 0.1 s" in holder.log.read_text()
    assert holder.terminate() == 0
    assert not Path(f"/proc/{pids[-1]}").exists()


def test_one_that_ends_at_once_harms_nobody(holder: Any, wait_until: Any) -> None:
    port = free_port()
    web = {"name": "web", "kind": "tcp", "address": f"127.0.0.1:{port}"}
    brief = {"name": "hub", "argv": ["/bin/false"], "sockets": []}
    parts = [missing_part(), brief, part("gateway-0", ANSWER, sockets=("web",))]
    holder.start(sockets=[web], parts=parts)
    first = ask_pid(port)
    wait_until(lambda: "hub ended ({'code': 1}); pausing 0.2 s" in holder.log.read_text())
    ending = "agent ended (No such file or directory (/nowhere/agent)); pausing 0.2 s"
    wait_until(lambda: ending in holder.log.read_text())
    assert ask_pid(port) == first
    assert holder.terminate() == 0


def test_one_that_ignores_term_is_killed(holder: Any, wait_until: Any, is_gone: Any) -> None:
    ready = holder.directory / "ready"
    deaf = part("agent", DEAF, str(ready))
    program = "import tabane.node.holder as h\nh.STOP_TIMEOUT_S = 0.2\nh.main()"
    holder.start(parts=[deaf], program=program)
    wait_until(ready.exists)
    (pid,) = holder.children()
    assert holder.terminate() == 0
    wait_until(lambda: is_gone(pid))


def test_the_pause_doubles_up_to_a_limit() -> None:
    told: list[float] = []
    parts = Parts([], [missing_part()], lambda name, why, pause_s: told.append(pause_s))
    now, pauses = 1_000.0, []
    for _ in range(10):
        parts.start_due(now)
        due = parts.next_due()
        assert due is not None
        pauses.append(round(due - now, 6))
        parts.start_due(due - 0.001)
        assert parts.next_due() == due
        now = due
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]
    assert told == pauses
    assert not parts.running


async def test_every_agent_is_told_of_the_parts_that_have_ended(
    holder: Any, tmp_path: Path, wait_until: Any
) -> None:
    ready = tmp_path / "ready"
    holder.start(parts=[part("hub", DEAF, str(ready))])
    first: list[dict[str, Any]] = []
    ended = asyncio.Event()
    spawner = HolderSpawner(holder.control, lambda end: (first.append(end), ended.set()))
    await spawner.connect()
    wait_until(ready.exists)
    (pid,) = holder.children()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        await ended.wait()
    spawner.close()
    assert (first[0]["part"], first[0]["why"]) == ("hub", {"signal": signal.SIGKILL})
    later: list[dict[str, Any]] = []
    following = HolderSpawner(holder.control, later.append)
    await following.connect()
    following.close()
    assert later[0] == first[0]


@pytest.mark.parametrize(("lived_s", "pause_s"), [(9.0, 0.4), (11.0, 0.05)])
def test_one_that_lived_long_starts_again_quickly(lived_s: float, pause_s: float) -> None:
    parts = Parts([], [{"name": "hub", "argv": ["/bin/true"], "sockets": []}])
    now = 0.0
    for lasted_s in (0.0, 0.0, lived_s):
        parts.start_due(now)
        (pid,) = parts.running
        os.waitpid(pid, 0)
        parts.on_end(pid, {"code": 0}, now + lasted_s)
        due = parts.next_due()
        assert due is not None
        assert not parts.running
        pause, now = due - now - lasted_s, due
    assert pause == pytest.approx(pause_s)


def test_the_loud_signals_are_as_they_were(tmp_path: Path) -> None:
    """Python ignores SIGPIPE and SIGXFSZ; what it starts must not."""
    status = tmp_path / "status"
    pid = module.spawn(["sh", "-c", f"grep SigIgn /proc/self/status > {status}"], os.environ, [])
    os.waitpid(pid, 0)
    ignored = int(status.read_text().split()[1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_the_holder_loads_the_standard_library_only() -> None:
    """What it loads stays in memory for ever, and every fork of it costs."""
    source = str(Path(module.__file__).parents[2])
    program = (
        f"import sys\nsys.path.insert(0, {source!r})\nimport tabane.node.holder\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(names - sys.stdlib_module_names))"
    )
    argv = (sys.executable, "-ISc", program)
    done = subprocess.run(argv, capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["__main__", "tabane"]


NEVER_SERVES = """
import asyncio
from tabane.node import part
part.load_node = lambda path: path
async def serve(config, sockets, tasks):
    print("begun", flush=True)
    await asyncio.Event().wait()
part.run_part(serve)
"""


def test_a_part_that_does_not_serve_yet_ends_at_once() -> None:
    argv = [sys.executable, "-c", NEVER_SERVES, "config"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_each_part_may_have_a_socket_of_its_own_at_the_same_address(
    holder: Any, wait_until: Any
) -> None:
    port = free_port()
    web = {"name": "web", "kind": "tcp", "address": f"127.0.0.1:{port}", "each": True}
    names = [f"gateway-{number}" for number in range(3)]
    holder.start(sockets=[web], parts=[part(name, ANSWER, sockets=("web",)) for name in names])
    pids: set[int] = set()
    wait_until(lambda: pids.add(ask_pid(port)) or len(pids) == 3)
    killed = pids.pop()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{killed}").exists())  # it answers nobody any more
    answers = {ask_pid(port) for _ in range(60)}  # some of which wait until it is back
    assert killed not in answers
    assert pids < answers
    assert len(answers) == 3
    assert holder.terminate() == 0
