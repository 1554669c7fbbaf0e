"""Which nodes are alive, as this node's hub sees it, and which of them is an app's home."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tabane.clock import Clock
from tabane.model import AppName, NodeName
from tabane.node.config import NodeConfig
from tabane.scheduler.placement import home_of
from tabane.supervise import Later

CUT_OFF_S = 3.0
"""A gateway that cannot reach an app's home for so long gives up what that granted it. A hub that
was killed is back much sooner."""
SEEN_LATER_S = 4.0
"""By how much one end of a link may see later than the other that it is broken: a hub's heartbeat,
and what a busy machine adds."""
GATEWAY_GRACE_S = CUT_OFF_S + SEEN_LATER_S
"""A gateway that its home did not see for so long holds nothing any more: its process is gone, or
it has given up. Only then are its slots given to others."""


class Membership:
    """`hubs` says of each other hub whether the link to it is open; it changes as they do."""

    def __init__(self, config: NodeConfig, hubs: Mapping[str, bool]) -> None:
        self._config = config
        self._hubs = hubs
        self._near = config.node.datacenter + "/"

    def live_nodes(self) -> list[NodeName]:
        """This node and those whose hub has an open link to ours."""
        own = self._config.key
        nodes = self._config.cluster.keys
        return [node for node in nodes if node == own or self._hubs.get(node)]

    def neighbours(self) -> list[NodeName]:
        """The live nodes of this data center."""
        return [node for node in self.live_nodes() if self.is_near(node)]

    def gateways(self) -> set[str]:
        """The gateways that there should be in this data center."""
        nodes = filter(self.is_near, self._config.cluster.keys)
        return {f"{node}/gateway-{n}" for node in nodes for n in range(self._config.gateways)}

    def is_near(self, node: str) -> bool:
        """Whether a node, or a member on one, is in this data center."""
        return node.startswith(self._near)

    def home_of(self, app: AppName) -> NodeName:
        """The app's home in this data center, as all that see the same nodes compute it."""
        return home_of(app, self.neighbours()) or self._config.key

    def is_home(self, app: AppName) -> bool:
        return self.home_of(app) == self._config.key


class Terms:
    """Nodes that cannot be seen. What one runs is unknown at first; when it was silent for
    `term_s` without a break, `on_over` is called with its name."""

    def __init__(
        self, clock: Clock, later: Later, on_over: Callable[[str], None], term_s: float
    ) -> None:
        self._clock = clock
        self._later = later
        self._on_over = on_over
        self._term_s = term_s
        self._ends: dict[str, float] = {}

    def on_hub(self, hub: str, is_open: bool) -> None:
        """The link to a node's hub opened or broke."""
        if is_open:
            self._ends.pop(hub, None)
        else:
            self._ends[hub] = self._clock.now() + self._term_s
            self._plan(hub)

    def _plan(self, hub: str) -> None:
        rest_s = max(0.0, self._ends[hub] - self._clock.now())
        self._later.call(f"term of {hub}", rest_s, lambda: self._on_due(hub))

    def _on_due(self, hub: str) -> None:
        if hub not in self._ends:
            return
        if self._ends[hub] > self._clock.now():
            self._plan(hub)
        else:
            del self._ends[hub]
            self._on_over(hub)
