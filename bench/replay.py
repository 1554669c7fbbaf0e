"""Plays a recorded day against a cluster of one node, in a minute or two, and watches its memory.

Each session is one request on a connection of its own, which its server answers slowly, so that it
lasts for about a second. It begins at its moment, whatever became of those before: who is slow
is not spared. Beside that, twice a second, what all instances hold is read from their cgroups.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import uvloop

from day import DAY_S, Session
from tabane.errors import TabaneError
from tabane.node.config import NodePaths, load_node, node_directory
from tabane.runtimes.cgroups import Cgroup, find_hierarchies
from tabane.tools.client import Cluster

SAMPLE_S = 0.5
TIMEOUT_S = 30.0
OK = 200
REQUEST = "GET /GPL-3 HTTP/1.1\r\nHost: a{app}.test\r\nConnection: close\r\n\r\n"
NODE = "tokyo/tokyo-1"


class Outcome(NamedTuple):
    """Of a session. `began` and `ended`: seconds since the replay began; `first_byte_s`: how long
    that took, None without one. `status`: of HTTP, 0 when there was no whole answer. `why` it was
    not served, in the gateway's words, or those of an error."""

    app: int
    began: float
    ended: float
    first_byte_s: float | None
    status: int
    why: str = ""


class Sample(NamedTuple):
    """`at` as in `Outcome`. `held`: bytes, by each instance's id."""

    at: float
    sessions: int
    held: dict[str, int]

    @property
    def instance_bytes(self) -> int:
        return sum(self.held.values())


class Replay(NamedTuple):
    outcomes: list[Outcome]
    samples: list[Sample]
    apps: dict[str, int]
    """Which app an instance was of."""


class Player:
    """Plays to the gateway at `address`, in a loop of its own; `active` sessions just now."""

    def __init__(self, address: str, sessions: Sequence[Session], seconds: float) -> None:
        self._address, self._sessions = address, sessions
        self._scale = seconds / DAY_S
        self.active = 0
        self.began = 0.0

    def play(self) -> list[Outcome]:
        return uvloop.run(self._play())

    async def _play(self) -> list[Outcome]:
        self.began = time.monotonic()
        running: list[asyncio.Task[Outcome]] = []
        for session in self._sessions:
            wait_s = session.at * self._scale - (time.monotonic() - self.began)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            running.append(asyncio.ensure_future(self._ask(session.app)))
        return list(await asyncio.gather(*running))

    async def _ask(self, app: int) -> Outcome:
        began, seen = time.monotonic(), _Answer()
        self.active += 1
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await seen.read(self._address, REQUEST.format(app=app).encode())
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            seen.why = f"{type(error).__name__} {error}"
        self.active -= 1
        first = None if seen.first_at is None else seen.first_at - began
        times = began - self.began, time.monotonic() - self.began
        return Outcome(app, *times, first, seen.status if seen.whole else 0, seen.why)


class _Answer:
    """What came of a request."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.status = 0
        self.whole = False
        self.why = ""

    async def read(self, address: str, request: bytes) -> None:
        reader, writer = await asyncio.open_connection(address, 80)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            self.first_at, self.status = time.monotonic(), int(head.split(b" ", 2)[1])
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
            body = await reader.readexactly(int(fields[b"content-length"]))
            self.whole = True
            if self.status != OK:
                self.why = body.decode(errors="replace").strip()
        finally:
            writer.close()


class Watcher:
    """Takes samples in a thread of its own."""

    def __init__(self, cluster: Cluster, root: Path, player: Player) -> None:
        paths = NodePaths(node_directory(root, NODE))
        self._cgroup = load_node(paths.config).cgroup
        memory = find_hierarchies().get("memory") or find_hierarchies()[""]
        self._directory = memory / self._cgroup.lstrip("/")
        self._cluster, self._player = cluster, player
        self._end = threading.Event()
        self.samples: list[Sample] = []
        self.apps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            if self._player.began:
                self.samples.append(self._sample())
                self._learn_apps()

    def _sample(self) -> Sample:
        at = time.monotonic() - self._player.began
        held = {
            path.name: Cgroup(f"{self._cgroup}/{path.name}").memory_use().held_bytes
            for path in self._directory.iterdir()
            if path.is_dir()
        }
        return Sample(at, self._player.active, held)

    def _learn_apps(self) -> None:
        if self.samples[-1].held.keys() <= self.apps.keys():
            return
        try:
            found = self._cluster.get("/api/v1/instances")["instances"]
        except TabaneError:
            return  # it is too busy: the next look may tell
        for instance in found:
            self.apps[instance["id"]] = int(instance["app"].removeprefix("default/a"))


def replay(cluster: Cluster, root: Path, sessions: Sequence[Session], seconds: float) -> Replay:
    """Play them, and watch until all have ended."""
    player = Player(cluster.config["nodes"][0]["address"], sessions, seconds)
    with Watcher(cluster, root, player) as watcher:
        outcomes = player.play()
    return Replay(outcomes, watcher.samples, watcher.apps)


def count_wakes(cluster: Cluster) -> Counter[str]:
    """The sessions that had to wait so far, by what they waited for."""
    found: Counter[str] = Counter()
    for line in cluster.get_bytes("/metrics").decode().splitlines():
        if line.startswith("tabane_wake_seconds_count{"):
            option = line.partition('option="')[2].partition('"')[0]
            found[option] += int(float(line.rpartition(" ")[2]))
    return found


def own_bytes(root: Path) -> int:
    """What the cluster's own processes hold: PSS, which counts what several share once in all."""
    return sum(_pss(path) for path in Path("/proc").glob("[0-9]*") if _is_own(path, root))


def _is_own(path: Path, root: Path) -> bool:
    try:
        argv = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    is_ours = any(word.startswith("tabane.node.") for word in argv)
    return is_ours and any(word.startswith(f"{root}/") for word in argv)


def _pss(path: Path) -> int:
    with suppress(OSError):
        for line in (path / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
