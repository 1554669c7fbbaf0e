"""Who takes part: a server of each, and the processes of its members and senders."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from peers import native, ours
from peers.processes import PATH, PYTHON, Process, Processes

FLOOR = "floor: C hub, C members"
OURS = "middlecon"
OURS_UNIX = "middlecon, unix socket"
OURS_HUBS = "middlecon, 3 hubs"
C_PURE = "middlecon, C members"
C_UNIX = "middlecon, C members, unix socket"
C_NATIVE = "middlecon with its C module, C members"

PEERS = {
    "nats": "NATS",
    "redis": "Redis",
    "mqtt": "mosquitto, QoS 1",
    "mqtt0": "mosquitto, QoS 0",
    "zeromq": "ZeroMQ",
    "grpc": "gRPC",
    "rabbitmq": "RabbitMQ",
}
"""Module of this package -> name of the contender with members in Python."""
C_PEERS = {
    "nats": ("NATS, C members", "nats_members", 0),
    "redis": ("Redis, C members", "redis_members", 0),
    "mqtt": ("mosquitto, QoS 1, C members", "mqtt_members", 1),
    "mqtt0": ("mosquitto, QoS 0, C members", "mqtt_members", 0),
}
"""Module -> name of the contender with members in C, their program, and the QoS it is told."""


@dataclass(eq=False)
class Contender:
    """`programs(url, count)` are what drives its server; the last of them takes the orders."""

    name: str
    serve: Callable[[Processes], str]
    programs: Callable[[str, int], list[tuple[str, ...]]]
    together: bool = False
    """They wait for each other to be ready; else each begins when the one before it is."""
    url: str = ""
    processes: list[Processes] = field(default_factory=list)
    """Those that run now: its servers', and its drivers'."""

    @contextmanager
    def serving(self, scratch: Path) -> Iterator[str]:
        """Where its servers are."""
        with self._group(scratch) as processes:
            self.url = self.serve(processes)
            self.freeze()
            yield self.url

    @contextmanager
    def driven(
        self, scratch: Path, count: int, programs: list[tuple[str, ...]] | None = None
    ) -> Iterator[Process]:
        """Its drivers, which are ready; the one that takes orders."""
        self.thaw()
        with self._group(scratch) as processes:
            drivers: list[Process] = []
            for argv in programs or self.programs(self.url, count):
                drivers.append(processes.start(*argv))
                if not self.together:
                    drivers[-1].wait_until_ready()
            if self.together:
                for one in drivers:
                    one.wait_until_ready()
            self.freeze()
            yield drivers[-1]

    @contextmanager
    def _group(self, scratch: Path) -> Iterator[Processes]:
        with Processes(Path(tempfile.mkdtemp(dir=scratch))) as processes:
            self.processes.append(processes)
            try:
                yield processes
            finally:
                self.thaw()
                self.processes.remove(processes)

    def freeze(self) -> None:
        for processes in self.processes:
            processes.freeze()

    def thaw(self) -> None:
        for processes in self.processes:
            processes.thaw()

    def order(self, driver: Process, order: str) -> list[int]:
        """Run while the other contenders are frozen. Nanoseconds of each that was done."""
        self.thaw()
        driver.write_line(order)
        found = [int(word) for word in driver.read_line().split()]
        self.freeze()
        return found


def driver(peer: str, role: str, url: str, count: int, forks: int = 0) -> tuple[str, ...]:
    return (*PYTHON, "peers.driver", peer, role, url, str(count), str(forks))


def _in_one_process(peer: str, url: str, count: int) -> list[tuple[str, ...]]:
    return [driver(peer, "room", url, count)]


def sender_apart(peer: str, url: str, count: int, forks: int = 0) -> list[tuple[str, ...]]:
    return [driver(peer, "members", url, count, forks), driver(peer, "sender", url, count)]


def in_python(peer: str) -> Contender:
    module = importlib.import_module(f"peers.{peer}")
    apart = module.Clients.sender_is_server
    programs = partial(sender_apart if apart else _in_one_process, peer)
    return Contender(PEERS[peer], module.serve, programs, together=apart)


def in_c(peer: str, programs: Path) -> Contender:
    name, program, qos = C_PEERS[peer]
    serve = importlib.import_module(f"peers.{peer}").serve
    return Contender(name, serve, _c_programs(programs / program, qos))


def _c_programs(program: Path, qos: int = 0) -> Callable[[str, int], list[tuple[str, ...]]]:
    return lambda url, count: [(str(program), native.place(url), str(count), str(qos))]


def ours_all(programs: Path) -> list[Contender]:
    """The floor, and middlecon in all its forms."""
    in_c = _c_programs(programs / "middlecon_members")
    pure, our_own = partial(ours.serve, pure=True), partial(_in_one_process, "ours")
    return [
        Contender(
            FLOOR, partial(native.serve_floor, programs), _c_programs(programs / "floor_members")
        ),
        Contender(OURS, ours.serve, our_own),
        Contender(OURS_UNIX, ours.serve_unix, our_own),
        Contender(OURS_HUBS, ours.serve_three, our_own),
        Contender(C_PURE, pure, in_c),
        Contender(C_UNIX, ours.serve_unix, in_c),
        *([Contender(C_NATIVE, ours.serve, in_c)] if has_native() else []),
    ]


def has_native() -> bool:
    """Whether the hub's optional module in C can be imported."""
    return importlib.util.find_spec("tabane.middlecon._native") is not None


def missing(peer: str) -> str | None:
    """Why a peer cannot take part, in one sentence."""
    try:
        module = importlib.import_module(f"peers.{peer}")
    except ImportError as error:
        return f"{PEERS[peer]} takes no part: {error}."
    if module.SERVER and not shutil.which(module.SERVER, path=PATH):
        return f"{PEERS[peer]} takes no part: {module.SERVER} is not installed."
    return None
