"""Local clusters as people have them, and what to do to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from tabane.clock import SYSTEM
from tabane.errors import TabaneError
from tabane.node.cluster import forget
from tabane.runtimes.api import Image
from tabane.testing.container_bench import ContainerBench, open_bench
from tabane.testing.containers import make_tree, open_directory, without_unified
from tabane.testing.machine_bench import MachineBench, make_bench
from tabane.testing.spawner import PlainSpawner
from tabane.testing.wasm_bench import Images, make_images
from tabane.tools.cli.cluster import start_cluster, stop_cluster, wait_until_up
from tabane.tools.client import Cluster

Found = TypeVar("Found")

STARTS_NODES = {"LocalCluster", "Factory", "start_cluster", "start_node"}
"""Who has one of these names starts nodes."""

DATACENTERS = ("tokyo", "osaka", "ishikari")
HTTPD = ("busybox", "httpd", "-f", "-p", "8000", "-h", "/usr/share/common-licenses")
POLL_S = 0.02
GIVE_UP_S = 180.0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in (item for item in items if isinstance(item, pytest.Function)):
        if item.path.parent == here and STARTS_NODES & vars(item.module).keys():
            item.add_marker("nodes")


def wait_for(look: Callable[[], Found | None], what: str = "what was waited for") -> Found:
    """The first true value of `look()`: for what other processes do without telling."""
    deadline = SYSTEM.now() + GIVE_UP_S
    while not (found := look()):
        assert SYSTEM.now() < deadline, f"{what} did not come"
        time.sleep(POLL_S)
    return found


def find_cgroups(prefix: str) -> list[Path]:
    """All cgroups whose names begin so, in any hierarchy, while others come and go (which
    `Path.rglob` does not bear)."""
    walk = os.walk("/sys/fs/cgroup")
    return [Path(at, name) for at, names, _ in walk for name in names if name.startswith(prefix)]


def saying(word: str) -> list[str]:
    """The command of a program that answers every request for / with a word."""
    serve = "exec busybox httpd -f -p 8000 -h /tmp"
    return ["sh", "-c", f"echo {word} >/tmp/index.html; {serve}"]


class Answer(NamedTuple):
    status: int
    head: str
    body: str


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Requests:
    """Requests that go on and on: what became of each."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.lost: list[str] = []

    def failures(self) -> list[str]:
        """Those without an answer, and those whose answer is not 200."""
        return self.lost + [str(answer) for answer in self.answers if answer.status != 200]


class LocalCluster:
    """A running cluster: its commands, API, gateways and processes."""

    def __init__(
        self,
        root: Path,
        datacenters: Sequence[str] = DATACENTERS,
        nodes: int = 1,
        gateways: int = 1,
    ) -> None:
        self.root = root
        start_cluster(root, list(datacenters), nodes, gateways, "")
        self.api = Cluster(root)
        self.addresses: dict[str, str] = {
            f"{node['datacenter']}/{node['name']}": node["address"]
            for node in self.api.config["nodes"]
        }

    def close(self) -> None:
        stop_cluster(self.root)
        forget(self.root)

    def wait_whole(self) -> None:
        wait_until_up(self.api)

    def clear(self) -> None:
        """Remove all apps; returns when their instances are gone."""
        for app in self.api.get("/api/v1/apps")["apps"]:
            self.api.delete(f"/api/v1/apps/{app['namespace']}/{app['name']}")
        wait_for(lambda: not self.api.get("/api/v1/instances")["instances"], "the end of all")

    # Commands and records

    def tabane(self, *argv: str, stdin: str | None = None) -> Ended:
        """One command, in a process of its own."""
        command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(self.root), *argv]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=GIVE_UP_S
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def deploy(
        self,
        name: str,
        command: Sequence[str] = HTTPD,
        *,
        port: int | None = 8000,
        node: str | None = None,
        image: str = "host",
        driver: str = "",
        isolation: str = "",
        protocol: str = "",
        **sections: dict[str, Any],
    ) -> dict[str, Any]:
        """Store an app; `sections` are those of its file, as `reactive={"max": 3}`."""
        sections = {"resources": {"memory": "64MiB"}, **sections}
        limits = {"start_timeout": "1m", "stop_after": "1h", "stop_timeout": "1s"}
        reactive = limits | sections.get("reactive", {})
        top = {"name": name, "image": image, "command": list(command)}
        if driver:
            top["driver"] = driver
        if isolation:
            top["class"] = isolation
        if protocol:
            top["protocol"] = protocol
        if port is not None:
            top |= {"port": port, "hosts": [f"{name}.test"]}
        text = to_toml(top, sections | {"reactive": reactive})
        body = {"text": text, "file": f"{name}.toml", "image": image}
        deployed: dict[str, Any] = self.api.post("/api/v1/apps", body, node=node)
        return deployed

    def instances(self, name: str, state: str = "") -> list[dict[str, Any]]:
        found = self.api.get("/api/v1/instances")["instances"]
        mine = [i for i in found if i["app"] == f"default/{name}"]
        return [i for i in mine if state in ("", i["state"])]

    def records(self, kind: str, name: str) -> list[dict[str, Any]]:
        """An app's `events` or `wakes`, oldest first."""
        found = self.api.get(f"/api/v1/{kind}?limit=2000")["records"]
        return [record for record in found if record["app"] == f"default/{name}"]

    def starts(self, name: str) -> int:
        return sum(event["state"] == "starting" for event in self.records("events", name))

    def inside(self, name: str, *argv: str) -> tuple[int, str]:
        """Run a command in the app's first instance: its exit code and stdout."""
        ended = self.tabane("exec", self.instances(name)[0]["id"], "--", *argv)
        return ended.code, ended.out

    # Requests

    def get(self, name: str, at: str = "tokyo", path: str = "/", timeout_s: float = 60) -> Answer:
        """One request on a connection of its own, at a data center's or a node's gateway."""
        address = next(self.addresses[n] for n in self.addresses if at in (n, n.split("/")[0]))
        with socket.create_connection((address, 80), timeout=timeout_s) as sock:
            head = f"GET {path} HTTP/1.1\r\nHost: {name}.test\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode(errors="replace")
        if not answer:
            raise ConnectionResetError("the connection ended without an answer")
        head, _, body = answer.partition("\r\n\r\n")
        return Answer(int(head.split(" ", 2)[1]), head, body)

    def wake(self, name: str, at: str = "tokyo", path: str = "/GPL-3") -> dict[str, Any]:
        """Have an instance of the app there; return it when its engine has told its pid, too."""
        answer = self.get(name, at, path)
        assert answer.status == 200, answer

        def near() -> list[dict[str, Any]]:
            found = self.instances(name, "ready")
            return [i for i in found if i["node"].startswith(at) and "pid" in i]

        return wait_for(near, f"{name} at {at}")[0]

    @contextmanager
    def requests(
        self, name: str, at: str = "tokyo", path: str = "/GPL-3", threads: int = 3
    ) -> Iterator[Requests]:
        """Requests one after the other in each of some threads, all the while."""
        seen, end = Requests(), threading.Event()

        def go_on() -> None:
            while not end.is_set():
                try:
                    seen.answers.append(self.get(name, at, path))
                except OSError as error:
                    seen.lost.append(repr(error))

        running = [threading.Thread(target=go_on) for _ in range(threads)]
        for thread in running:
            thread.start()
        try:
            before = len(seen.answers)
            wait_for(lambda: len(seen.answers) + len(seen.lost) > before + 10, "ten answers")
            yield seen
            after = len(seen.answers)
            wait_for(lambda: len(seen.answers) > after + 10, "ten more answers")
        finally:
            end.set()
            for thread in running:
                thread.join()

    # Processes

    def holder(self, node: str) -> int:
        """The pid of a node's first process, as this machine sees it."""
        process = json.loads((self.root / "nodes" / node / "process.json").read_bytes())
        return int(process["pid"])

    def part(self, part: str, node: str = "tokyo/tokyo-1") -> int:
        """The pid of one of Tabane's own processes of a node: `agentd`, `hubd`, `gatewayd`."""
        holder = self.holder(node)
        children = Path(f"/proc/{holder}/task/{holder}/children").read_text()
        for pid in map(int, children.split()):
            if f"tabane.node.{part}" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        raise AssertionError(f"{node} has no {part}")

    def has_part(self, part: str, node: str = "tokyo/tokyo-1") -> bool:
        try:
            return self.part(part, node) > 0
        except (AssertionError, FileNotFoundError):  # one ended while it was looked at
            return False

    def kill(self, part: str, node: str = "tokyo/tokyo-1") -> int:
        """kill -9; returns the pid, which is gone."""
        pid = self.part(part, node)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {part}")
        return pid

    def answers(self, node: str) -> bool:
        """Whether a node's agent answers its API."""
        try:
            self.api.get("/api/v1/node", node=node)
        except TabaneError:
            return False
        return True


def to_toml(top: dict[str, Any], sections: dict[str, dict[str, Any]]) -> str:
    """TOML of texts, numbers, truth values and lists, which it writes as JSON does."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for section, fields in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(lines)


def open_to_all(path: Path) -> Path:
    """Instances have users of their own, who must get through pytest's directories."""
    for directory in (path, *path.parents[:3]):
        directory.chmod(0o755)
    return path


Factory = Callable[..., LocalCluster]


@pytest.fixture(scope="module")
def make_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Factory]:
    """Makes clusters that end with the module."""
    made: list[LocalCluster] = []

    def make(
        datacenters: Sequence[str] = DATACENTERS, nodes: int = 1, gateways: int = 1
    ) -> LocalCluster:
        root = open_to_all(tmp_path_factory.mktemp("cluster"))
        made.append(LocalCluster(root, datacenters, nodes, gateways))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    """Three data centers of one node each, for all tests of a module."""
    return make_cluster()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Use `borrowed`."""
    cluster = LocalCluster(open_to_all(tmp_path_factory.mktemp("common")))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def borrowed(common: LocalCluster) -> Iterator[LocalCluster]:
    """Three data centers of one node each, which modules have one after the other, since a start
    takes seconds: for those that leave it whole, and in which nothing counts that was before."""
    common.wait_whole()
    yield common
    common.clear()


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    """A directory for containers without a node."""
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@pytest.fixture(scope="module")
def no_hybrid() -> Iterator[None]:
    """What crun needs on a hybrid machine, which a node sees to itself."""
    with without_unified():
        yield


@pytest.fixture(scope="module")
def images(ground: Path) -> Images:
    """WebAssembly modules."""
    return make_images(ground, Path(__file__).parent / "wasm")


@pytest.fixture(params=["crun", "runc"])
async def containers(
    request: pytest.FixtureRequest, ground: Path, image: Image
) -> AsyncIterator[ContainerBench]:
    async with open_bench(request.param, PlainSpawner(), ground, image) as bench:
        yield bench


@pytest.fixture
async def microvms(ground: Path, image: Image) -> AsyncIterator[MachineBench]:
    bench = make_bench("qemu-microvm", ground, image)
    yield bench
    await bench.aclose()


@pytest.fixture
async def sandboxes(ground: Path, image: Image) -> AsyncIterator[ContainerBench]:
    async with open_bench("runsc", PlainSpawner(), ground, image) as bench:
        yield bench


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory in which instances' users may be let."""
    return open_to_all(tmp_path)
