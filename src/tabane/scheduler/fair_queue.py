"""Whose start is next on a node: fair between users, then between a user's apps. Without a clock.

The next turn goes to the user who has the fewest turns just now; among equals to who had none for
the longest. In the same way to one of that user's apps, and there to who came first. So hundreds
of starts of one app are one voice among the others: who has no turn is passed over at most once by
each other user (and app of the same user) that has none. Nothing waits while a turn is free.

The idea is that of fair queueing: J. Nagle, "On packet switches with infinite storage", 1987.
Turns are counted while they last, so that starts that take long weigh more than short ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from tabane.model import AppName, InstanceId


class Start(NamedTuple):
    """`app`: its cohort. `user`: whose it is, a uid."""

    instance: InstanceId
    app: AppName
    user: int


@dataclass(slots=True)
class _Share:
    latest: int
    """The number of its latest turn, or of when it came to have something that waits."""
    turns: int = 0
    """That it has now."""


@dataclass(slots=True)
class _AppShare(_Share):
    waiting: deque[Start] = field(default_factory=deque)


@dataclass(slots=True)
class _UserShare(_Share):
    apps: dict[AppName, _AppShare] = field(default_factory=dict)
    waiting: int = 0

    def has_next(self, held: Container[AppName]) -> bool:
        if not self.waiting:
            return False
        return not held or any(app.waiting and name not in held for name, app in self.apps.items())


Share = TypeVar("Share", bound=_Share)


class FairQueue:
    """The starts of one node that wait, and the shares of those that have their turn."""

    def __init__(self) -> None:
        self._users: dict[int, _UserShare] = {}
        self._waiting: dict[InstanceId, Start] = {}
        self._turns: dict[InstanceId, Start] = {}
        self._number = 0

    def __len__(self) -> int:
        """Those that wait."""
        return len(self._waiting)

    @property
    def turns(self) -> int:
        return len(self._turns)

    def waiting_of(self, user: int) -> int:
        share = self._users.get(user)
        return share.waiting if share is not None else 0

    def add(self, start: Start) -> None:
        user = self._users.get(start.user)
        if user is None:
            user = self._users[start.user] = _UserShare(self._next_number())
        app = user.apps.get(start.app)
        if app is None:
            app = user.apps[start.app] = _AppShare(self._next_number())
        app.waiting.append(start)
        user.waiting += 1
        self._waiting[start.instance] = start

    def take(self, held: Container[AppName] = ()) -> Start | None:
        """The next one, which has its turn until `end`; of no app that is `held` back. None when
        there is none."""
        users = (share for share in self._users.values() if share.has_next(held))
        if (user := _next(users)) is None:
            return None
        app = _next(
            share for name, share in user.apps.items() if share.waiting and name not in held
        )
        assert app is not None
        start = app.waiting.popleft()
        user.waiting -= 1
        del self._waiting[start.instance]
        self._turns[start.instance] = start
        for share in (user, app):
            share.turns += 1
            share.latest = self._next_number()
        return start

    def end(self, instance: InstanceId) -> None:
        """Its turn is over."""
        start = self._turns.pop(instance)
        user = self._users[start.user]
        user.turns -= 1
        user.apps[start.app].turns -= 1
        self._forget(start)

    def remove(self, instance: InstanceId) -> bool:
        """It waits no more; False when it did not."""
        start = self._waiting.pop(instance, None)
        if start is None:
            return False
        user = self._users[start.user]
        user.apps[start.app].waiting.remove(start)
        user.waiting -= 1
        self._forget(start)
        return True

    def ahead_of(self, instance: InstanceId) -> int | None:
        """As `ahead`, of one that waits; None when it does not."""
        start = self._waiting.get(instance)
        return self.ahead(start) if start is not None else None

    def ahead(self, start: Start) -> int:
        """How many turns would be given before its own if it came now, or waits, and nothing else
        came."""
        user = self._users.get(start.user)
        before = self._before_in_app(start)
        others = user.apps.items() if user is not None else ()
        rounds = before + sum(
            min(len(share.waiting), before + 1) for app, share in others if app != start.app
        )
        return rounds + sum(
            min(share.waiting, rounds + 1)
            for user_id, share in self._users.items()
            if user_id != start.user
        )

    def _before_in_app(self, start: Start) -> int:
        user = self._users.get(start.user)
        app = user.apps.get(start.app) if user is not None else None
        if app is None:
            return 0
        return app.waiting.index(start) if start.instance in self._waiting else len(app.waiting)

    def _forget(self, start: Start) -> None:
        user = self._users[start.user]
        app = user.apps[start.app]
        if not (app.waiting or app.turns):
            del user.apps[start.app]
        if not user.apps:
            del self._users[start.user]

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _next(shares: Iterable[Share]) -> Share | None:
    return min(shares, key=lambda share: (share.turns, share.latest), default=None)
