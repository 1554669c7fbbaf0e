"""What an agent tells its own node's gateways: routes, and which instances are here.

A gateway says `Hello` to every new agent, gets all, and from then on every change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tabane.errors import Closed, NotFound
from tabane.gateway.routes import routed
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, Generation, Instance
from tabane.node import messages as say
from tabane.node.running import Running

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ROUTES_PER_MESSAGE = 500


class Gateways:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._greeted: set[str] = set()

    def greet(self, gateway: str) -> None:
        """Tell a gateway all it has to know; from then on it is told of changes."""
        self._agent.tell(gateway, self._all_instances())
        revision = self._agent.replica.revision
        apps = map(routed, self._agent.all_apps())
        while page := tuple(itertools.islice(apps, ROUTES_PER_MESSAGE)):
            self._agent.tell(gateway, say.Routes(page, revision=revision))
        self._agent.tell(gateway, say.Routes((), complete=True, revision=revision))
        self._agent.tell(gateway, say.TcpPorts(self._agent.tcp.open))
        self._greeted.add(gateway)

    def tell_routes(self, changed: Iterable[App], gone: Iterable[AppName]) -> None:
        revision = self._agent.replica.revision
        self._tell(say.Routes(tuple(map(routed, changed)), tuple(gone), revision=revision))

    def tell_ports(self, ports: tuple[int, ...]) -> None:
        self._tell(say.TcpPorts(ports))

    def tell_ready(self, instance: Instance) -> None:
        """To be called before anybody can be granted a slot of it."""
        self._tell(_local_instances([instance], complete=False))

    def tell_over(self, running: Running) -> None:
        """Before what it left is cleared away: requests in flight there wait."""
        if running.is_silent:
            self._tell(say.LocalInstances((), complete=False, dead=(running.instance.generation,)))

    def tell_instances(self) -> None:
        """Some have ended."""
        self._tell(self._all_instances())

    async def wait_told(self) -> None:
        """Return once those that run have taken in all they were told before. One that is not
        there takes no connection before it knows the routes. Raises `Closed` without a session."""
        for number in range(self._agent.config.gateways):
            gateway = f"{self._agent.config.key}/gateway-{number}"
            if gateway not in self._agent.room.members:
                continue
            if gateway not in self._greeted:
                self.greet(gateway)
            try:
                await self._agent.send(gateway, say.encode(say.Routes(())))
            except NotFound:
                continue
            except Closed:
                if not self._agent.session.is_open:
                    raise  # it runs on, and serves by what it was told

    def _all_instances(self) -> say.LocalInstances:
        executor = self._agent.executor
        standing = [one for one in executor.instances() if one.state in STANDING]
        return _local_instances(standing, complete=True, dead=executor.silent())

    def _tell(self, message: say.Message) -> None:
        for gateway in self._greeted:
            self._agent.tell(gateway, message)


def _local_instances(
    instances: Iterable[Instance], *, complete: bool, dead: Iterable[Generation] = ()
) -> say.LocalInstances:
    found = (say.LocalInstance(i.generation, i.app, i.address, i.trust) for i in instances)
    return say.LocalInstances(tuple(found), complete, tuple(dead))
