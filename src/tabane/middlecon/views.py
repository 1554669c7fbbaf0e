"""What a client sees of the others: rooms with their members, their shared state, the hubs.

A view follows the hub's frames, and calls back on changes. After a reconnect the hub tells all
again; what differs from what was known before is a change like any other. A hub that was itself
started again knows nothing yet of those behind its links: they are unknown until it is linked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tabane.middlecon.frames import Change
from tabane.model import Value
from tabane.supervise import Supervisor, log_failure


class MemberInfo(Value, frozen=True):
    """A member of a room. `known` is False while the link to its hub is down."""

    name: str
    hub: str
    known: bool = True


class Presence(Value, frozen=True):
    """A change of a room's members."""

    member: str
    change: Change
    hub: str


class StateChange(Value, frozen=True):
    """A value that a member put, or deleted (`None`)."""

    member: str
    key: str
    value: bytes | None


class Callbacks:
    """Functions to be called on an event, plain or async; one that raises is reported, no more."""

    def __init__(self, name: str, tasks: Supervisor) -> None:
        self._name = name
        self._tasks = tasks
        self._callbacks: list[Callable[..., Any]] = []

    def add(self, callback: Callable[..., Any]) -> None:
        self._callbacks.append(callback)

    def fire(self, *arguments: object) -> None:
        for callback in self._callbacks:
            try:
                result = callback(*arguments)
            except Exception as error:
                log_failure(self._name, error)
            else:
                if inspect.iscoroutine(result):
                    self._tasks.start(self._name, result)


class StateTable:
    """The values of all members seen, by member and key."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, bytes]] = {}
        self._stale: set[tuple[str, str]] = set()

    def put(self, member: str, key: str, value: bytes | None) -> bool:
        """Apply what the hub says; whether it is news."""
        self._stale.discard((member, key))
        values = self.values.setdefault(member, {})
        if values.get(key) == value:
            return False
        if value is None:
            del values[key]
        else:
            values[key] = value
        return True

    def drop(self, member: str) -> None:
        self.values.pop(member, None)

    def begin_snapshot(self) -> None:
        self._stale = {(name, key) for name, values in self.values.items() for key in values}

    def end_snapshot(self, told: Callable[[str], bool]) -> list[tuple[str, str]]:
        """What was known before and was not told again, of the members that `told` names."""
        over = [(name, key) for name, key in self._stale if told(name)]
        self._stale.difference_update(over)
        return [(name, key) for name, key in over if key in self.values.get(name, {})]


class RoomState(Mapping[str, Mapping[str, bytes]]):
    """The shared state of a room's members: `state[member][key]`."""

    def __init__(self, members: Mapping[str, MemberInfo], table: StateTable) -> None:
        self._members = members
        self._table = table

    def __getitem__(self, member: str) -> Mapping[str, bytes]:
        if member not in self._members:
            raise KeyError(member)
        return self._table.values.get(member, {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


class MemberTable(dict[str, MemberInfo]):
    """The members of one room by name, oneself among them, kept by `apply`."""

    def __init__(self) -> None:
        super().__init__()
        self._stale: set[str] = set()
        self._kept: set[str] = set()
        """Members whose hub ours is not linked to yet, known from before."""

    def begin_snapshot(self) -> None:
        self._stale = set(self)
        self._kept.clear()

    def end_snapshot(self, linked: Callable[[str], bool]) -> list[Presence]:
        """Who was not named again has left, or is unknown if it is with a hub not linked yet."""
        changes = []
        for name in self._stale:
            before = self[name]
            if linked(before.hub):
                del self[name]
                changes.append(Presence(name, Change.LEFT, before.hub))
            else:
                self._kept.add(name)
                self[name] = MemberInfo(name, before.hub, known=False)
                if before.known:
                    changes.append(Presence(name, Change.UNKNOWN, before.hub))
        self._stale.clear()
        return changes

    def keeps(self, name: str) -> bool:
        return name in self._kept

    def settle(self, over: Callable[[str], bool]) -> list[Presence]:
        """Nothing more will be heard from these hubs of the members that were kept."""
        left = [self[name] for name in self._kept if over(self[name].hub)]
        for member in left:
            self._kept.discard(member.name)
            del self[member.name]
        return [Presence(member.name, Change.LEFT, member.hub) for member in left]

    def apply(self, name: str, change: Change, hub: str) -> Presence | None:
        """Follow one PRESENCE frame; the change it makes to what was known, if any."""
        self._stale.discard(name)
        self._kept.discard(name)
        before = self.get(name)
        if change is Change.LEFT:
            return Presence(name, change, hub) if self.pop(name, None) else None
        after = self[name] = MemberInfo(name, hub, change is not Change.UNKNOWN)
        if before == after:
            return None
        if before is None and after.known:
            return Presence(name, Change.JOINED, hub)
        return Presence(name, Change.BACK if after.known else Change.UNKNOWN, hub)
