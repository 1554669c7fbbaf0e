"""What is learnt of the instances of this node beside their processes: what their apps' collectors
tell, what runs within those that have a kernel of their own, whether they are well (`health`), and
how much they are used (`resources`).

It begins when an instance is ready and ends when it is frozen or stopped: a frozen one could not
answer. An app's collector looks from inside: its connections are made in the instance's network
namespace, to loopback and nothing else, its commands run as `tabane exec` does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabane.errors import NotFound, SpecError, TabaneError
from tabane.k2i.collectors import registry
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Collector, Setting, Streams
from tabane.k2i.collectors.dial import target_of
from tabane.k2i.collectors.file import load_jobs
from tabane.k2i.collectors.runner import Collection, Job
from tabane.k2i.inside import Ask, Insides
from tabane.k2i.procfs import start_ticks
from tabane.model import Collect, GuestProcess, Instance, InstanceId, State
from tabane.network.netlink import run_in_network_of
from tabane.node.entering import handle_of, run_inside
from tabane.node.following_resources import FollowingResources
from tabane.node.health import Health
from tabane.node.running import Running

if TYPE_CHECKING:
    from tabane.node.agent import Agent

LOOPBACK = "127.0.0.1"
PARALLEL_COMMANDS = 2
"""Of all apps: each costs the node an engine's start. One that waits too long for its turn is given
up at its own deadline."""


class InstanceDial:
    """Connections from inside an instance to itself."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def connect(self, url: str) -> Streams:
        link = self._running.record.link
        if link is None:
            raise NotFound(f"{self._running.instance.id} has no network to ask it in")

        def open_socket() -> socket.socket:
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

        sock = run_in_network_of(link.parked_pid, open_socket)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (LOOPBACK, target_of(url)[1]))
            return await asyncio.open_connection(sock=sock, limit=MAX_ANSWER_BYTES)
        except BaseException:
            sock.close()
            raise

    async def owner(self, streams: Streams) -> int:
        """What an app's collectors tell is of the instance."""
        return 0


class Watching:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        config = agent.config
        self.collection = Collection(
            config.key, clock=agent.clock, tasks=agent.tasks, ticks=start_ticks
        )
        self.insides = Insides(
            config.key,
            config.incarnation,
            clock=agent.clock,
            tasks=agent.tasks,
            memory_kib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 10,
        )
        self.health, self.resources = Health(agent), FollowingResources(agent)
        self._commands = asyncio.Semaphore(PARALLEL_COMMANDS)
        self._asked: dict[InstanceId, tuple[Instance, Ask]] = {}

    def begin(self) -> None:
        """The node's own collectors, and what runs already."""
        self.collection.want("", read_jobs(self._agent.config.paths.collect))
        for instance in self._agent.executor.instances():
            self.follow(instance.id, instance.state)

    def follow(self, instance: InstanceId, state: State) -> None:
        """An instance is in that state now."""
        running = self._find(instance) if state is State.READY else None
        self.health.follow(instance, state, running)
        self.resources.follow(instance, state, running)
        jobs = [self._job(running, c) for c in running.record.app.collect] if running else []
        self.collection.want(instance, jobs)
        if running is not None and running.driver.capabilities.guest_processes:
            self._asked[instance] = (running.instance, lambda: ask_driver(running))
        elif self._asked.pop(instance, None) is None:
            return
        self.insides.want(self._asked.values())

    def _job(self, running: Running, collect: Collect) -> Job:
        async def run(argv: tuple[str, ...], timeout_s: float) -> bytes:
            async with self._commands:
                return await run_inside(running, argv)

        def make() -> Collector:
            return registry.make(Setting(collect, InstanceDial(running), run))

        return Job(collect, make, running.instance.id, running.instance.app)

    def _find(self, instance: InstanceId) -> Running | None:
        try:
            return self._agent.executor.get(instance)
        except NotFound:
            return None


def read_jobs(path: Path) -> list[Job]:
    """What a node's file asks for. A mistake in it is a job that fails with that."""
    if not path.exists():
        return []
    try:
        return load_jobs(path)
    except SpecError as error:
        return [failing_job(path.name, error)]


def failing_job(name: str, error: TabaneError) -> Job:
    """One that only says what is wrong."""

    def make() -> Collector:
        raise error

    return Job(Collect("file", name=name), make)


def ask_driver(running: Running) -> Awaitable[Sequence[GuestProcess]]:
    return running.driver.guest_processes(handle_of(running))
