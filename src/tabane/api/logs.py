"""The logs of instances, as this node has them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from tabane.api.actions import container_of, log_path
from tabane.api.checks import check_container, check_instance
from tabane.errors import NotFound
from tabane.model import InstanceId
from tabane.node.logtail import follow_lines, parse_since, read_lines
from tabane.runtimes.pods import log_of
from tabane.spec_fields import MAIN

if TYPE_CHECKING:
    from tabane.node.agent import Agent


def read_log(
    agent: Agent,
    instance: str,
    *,
    tail: int,
    follow: bool,
    since: str = "",
    container: str = "",
) -> AsyncIterator[bytes]:
    """The log's lines; raises `NotFound` at once when this node never ran the instance, or that has
    no such container. `tail`: the last lines of it; 0: all."""
    identity = check_instance(instance)
    first = parse_since(since, agent.clock.wall()) if since else ""
    path = log_of(log_path(agent, identity), name := check_container(container))
    runs = agent.executor.runs(identity)
    ran = any(event.instance == instance for event in agent.events.recent())
    if not (runs or ran or path.exists()):
        raise NotFound(f"{agent.config.key} has no log of an instance {instance}")
    if runs:
        container_of(agent.executor.get(identity), name)
    elif name not in ("", MAIN) and not path.exists():
        raise NotFound(f"{agent.config.key} has no log of a container {name} of {instance}")
    if not follow:
        return read_lines(path, first, tail)
    return follow_lines(path, first, tail, _Life(agent, identity))


class _Life:
    """Whether an instance may still say something, for who follows its log."""

    def __init__(self, agent: Agent, instance: InstanceId) -> None:
        self._agent = agent
        self._instance = instance

    def goes_on(self) -> bool:
        return self._agent.executor.runs(self._instance)

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Be told when that may have changed. Returns how to end it."""
        return self._agent.happenings.follow(lambda transition: wake())
