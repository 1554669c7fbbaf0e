"""Which nodes are alive, as this node's hub sees it, and which of them is an app's home."""

from __future__ import annotations

from collections.abc import Mapping

from tabane.model import AppName, NodeName
from tabane.node.config import NodeConfig
from tabane.scheduler.placement import home_of


class Membership:
    """`hubs` says of each other hub whether the link to it is open; it changes as they do."""

    def __init__(self, config: NodeConfig, hubs: Mapping[str, bool]) -> None:
        self._config = config
        self._hubs = hubs
        self._near = config.node.datacenter + "/"

    def live_nodes(self) -> list[NodeName]:
        """This node and those whose hub has an open link to ours."""
        own = self._config.key
        nodes = (peer.key for peer in self._config.cluster.nodes)
        return [node for node in nodes if node == own or self._hubs.get(node)]

    def neighbours(self) -> list[NodeName]:
        """The live nodes of this data center."""
        return [node for node in self.live_nodes() if self.is_near(node)]

    def is_near(self, node: str) -> bool:
        """Whether a node, or a member on one, is in this data center."""
        return node.startswith(self._near)

    def home_of(self, app: AppName) -> NodeName:
        """The app's home in this data center, as all that see the same nodes compute it."""
        return home_of(app, self.neighbours()) or self._config.key

    def is_home(self, app: AppName) -> bool:
        return self.home_of(app) == self._config.key
