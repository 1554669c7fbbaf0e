"""Keeps a view fresh while someone looks at it, and asks nobody while none does.

A reader wants what is at most `FRESH_S` old. If the view is older, it is fetched anew, on a thread,
and readers wait for that: for `PATIENCE_S` as long as there is something younger than `AGE_LIMIT_S`
to show, so that a node that answers nothing makes nobody wait for its whole deadline.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from tabane.clock import SYSTEM, Clock
from tabane.errors import TabaneError
from tabane.tools.procfs.local import host_uptime_s
from tabane.tools.procfs.source import ProcSource
from tabane.tools.procfs.view import AGE_LIMIT_S, Change, View

log = logging.getLogger(__name__)

FRESH_S = 1.0
PATIENCE_S = 0.5
LONGEST_S = 15.0
"""More than any source's own deadline."""
_NS = 1_000_000_000


class Freshness:
    """When a reader may go on: plain arithmetic on moments."""

    def __init__(self) -> None:
        self._tried = float("-inf")
        """When the last fetch came back, successful or not."""
        self._good = float("-inf")
        """When the last successful one was begun."""
        self._wanted: float | None = None

    def is_fresh(self, now: float) -> bool:
        return now - self._tried < FRESH_S

    def wait_s(self, now: float) -> float:
        """How long a reader must wait at most; 0 when it may go on."""
        if self.is_fresh(now):
            return 0.0
        if self._wanted is None:
            self._wanted = now
        limit = PATIENCE_S if now - self._good < AGE_LIMIT_S else LONGEST_S
        return max(0.0, self._wanted + limit - now)

    @property
    def is_wanted(self) -> bool:
        return self._wanted is not None

    def on_fetched(self, began: float, now: float, good: bool) -> None:
        self._tried, self._wanted = now, None
        if good:
            self._good = began

    def expire(self) -> None:
        """Something was changed: what is there is not fresh, however young."""
        self._tried = float("-inf")


class Feed:
    """Fetches on a thread of its own. For any thread."""

    def __init__(self, source: ProcSource, view: View, *, clock: Clock = SYSTEM) -> None:
        self.view = view
        self._source = source
        self._clock = clock
        self._freshness = Freshness()
        self._turn = threading.Condition()
        self.on_changes: Callable[[list[Change]], None] = lambda changes: None
        """Told of changes before any reader sees them, on the feed's thread."""
        self._closed = False
        self._fetches = 0
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def fetch(self) -> None:
        """Fetch now, on this thread. Raises `TabaneError` or `OSError` when nobody answers."""
        began = self._clock.now()
        good = False
        try:
            answer = self._source.fetch()
            now = self._clock.now()
            now_ns = int(self._clock.wall() * _NS)
            self.on_changes(self.view.update(answer, now, now_ns, host_uptime_s()))
            good = True
        finally:
            self.view.expire(self._clock.now())
            self._note(began, good)

    def wait_s(self) -> float:
        """How long a reader must wait at most; 0 when it may go on. Has the view fetched if need
        be."""
        if self._freshness.is_fresh(self._clock.now()):
            return 0.0
        with self._turn:
            wait_s = self._freshness.wait_s(self._clock.now())
            if wait_s:
                self._turn.notify_all()
        if not wait_s:
            self.view.expire(self._clock.now())
        return wait_s

    def wait(self) -> None:
        """Block until a reader may go on."""
        while wait_s := self.wait_s():
            with self._turn:
                seen = self._fetches
                self._turn.wait_for(lambda seen=seen: self._fetches != seen, wait_s)  # type: ignore[misc]

    def expire(self) -> None:
        """Something was changed on a node: nobody is to be shown how it was before."""
        with self._turn:
            self._freshness.expire()

    def close(self) -> None:
        """Idempotent. A fetch that is under way ends by itself."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _note(self, began: float, good: bool) -> None:
        with self._turn:
            self._freshness.on_fetched(began, self._clock.now(), good)
            self._fetches += 1
            self._turn.notify_all()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closed or self._freshness.is_wanted)
                if self._closed:
                    return
            try:
                self.fetch()
            except (TabaneError, OSError) as error:
                log.warning("the cluster cannot be read: %s", error)
            except Exception as error:
                log.error("the cluster's answer cannot be shown", exc_info=error)
