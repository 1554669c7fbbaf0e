"""What a user may have on a node at once: plain functions of what there is."""

from __future__ import annotations

from collections.abc import Mapping

from tabane.model import App, Value
from tabane.units import show_size

ROOT = 0


class Quota(Value, frozen=True, omit_defaults=True):
    """The most of each; None: as many as there is room for."""

    instances: int | None = None
    """In whatever state, those that wait for their start included."""
    memory_bytes: int | None = None
    """What their limits allow them together."""
    starts: int | None = None
    """That wait for their turn."""


class Usage(Value, frozen=True, omit_defaults=True):
    instances: int = 0
    memory_bytes: int = 0
    starts: int = 0


class Quotas(Value, frozen=True):
    """Of all users of a node. `default` is everyone's but root's who is not in `users`, by uid."""

    default: Quota = Quota()
    users: Mapping[int, Quota] = {}

    def of(self, user: int) -> Quota:
        return self.users.get(user, Quota() if user == ROOT else self.default)


class Account(Value, frozen=True):
    """What a user may have on a node, and has."""

    quota: Quota
    usage: Usage


def exceeded(app: App, account: Account) -> str:
    """What keeps its owner from one more instance of it, as the end of a sentence that begins with
    the node's name; empty: nothing does."""
    quota, usage, who = account.quota, account.usage, f"user {app.owner}"
    if quota.instances is not None and usage.instances >= quota.instances:
        return f"{who} has {usage.instances} instances on it, and may have {quota.instances}"
    wanted = app.resources.memory_bytes
    if quota.memory_bytes is not None and usage.memory_bytes + wanted > quota.memory_bytes:
        left = show_size(max(0, quota.memory_bytes - usage.memory_bytes))
        return f"{who} has {left} of memory left on it, {show_size(wanted)} are needed"
    if quota.starts is not None and usage.starts >= quota.starts:
        return f"{who} has {usage.starts} starts waiting on it, and may have {quota.starts}"
    return ""
