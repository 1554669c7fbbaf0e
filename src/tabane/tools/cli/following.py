"""Following logs: of one instance to its end, or of all that an app has, and will have.

The cluster's events tell which instances there are. They are heard before anyone asks what runs, so
that no start falls in between, and it is asked again whenever some may not have been heard: when a
node is back, or the events broke off. Each instance's log is read by a thread of its own. What they
all meet goes through one queue to the thread that decides and shows.

A log that breaks off is read on from the moment of the last line that came, without the lines of
that moment that have come already: those of one block of output have one stamp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any

from tabane.errors import ProtocolError, TabaneError, Unreachable
from tabane.tools.cli.common import complain
from tabane.tools.client import Cluster

MOST_WAITING = 1000
"""Lines of all instances together; who reads slowly holds the nodes up, not the memory."""
RETRY_S = 5.0
"""For what no event tells: a node that is there and did not answer."""
ATTEMPTS = 3
"""In a row, to hear any node's events."""
EVENTS = "/api/v1/events?follow=true&around=true"
RECORDS = "/api/v1/events?limit=2000"

Line = tuple[str, bytes]
"""An instance's id, and a line of its log."""


def is_deployed(cluster: Cluster, app: str) -> bool:
    apps = cluster.get("/api/v1/apps")["apps"]
    return any(app == f"{known['namespace']}/{known['name']}" for known in apps)


class Place:
    """How far a log was read. `tail`, `since` and `container` (quoted for a URL) say what is wanted
    of it."""

    def __init__(self, tail: int, since: str, container: str = "") -> None:
        self._tail = tail
        self._since = since
        self._end = f"&container={container}" if container else ""
        self._stamp = b""
        self._count = 0
        self._again = 0

    def query(self) -> str:
        """For what comes from here on."""
        if self._stamp:
            self._again = self._count
            return f"tail=0&follow=true&since={self._stamp.decode()}{self._end}"
        since = f"&since={self._since}" if self._since else ""
        return f"tail={self._tail}&follow=true{since}{self._end}"

    def take(self, line: bytes) -> bool:
        """Whether a line is one that has not come yet."""
        stamp = line.partition(b" ")[0]
        if stamp == self._stamp and self._again:
            self._again -= 1
            return False
        if stamp > self._stamp:
            self._stamp, self._count, self._again = stamp, 1, 0
        elif stamp == self._stamp:
            self._count += 1
        return True

    def misses(self, line: bytes) -> bool:
        """Whether what was to come again before this line is not there any more."""
        return self._again > 0 and line.partition(b" ")[0] > self._stamp


class Returns:
    """Wakes those who wait for a node to be back."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = Condition()

    def tell(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, seen: int) -> None:
        """Until one is back after the first `seen`; not much longer than `RETRY_S`."""
        with self._changed:
            self._changed.wait_for(lambda: self.count != seen, RETRY_S)


class Following:
    """One run of `tabane logs -f`. `app`: all of its instances, without end; else those that are
    given to `read`."""

    def __init__(
        self,
        cluster: Cluster,
        show: Callable[[Line], None],
        app: str,
        tail: int,
        since: str,
        container: str = "",
    ) -> None:
        self._cluster = cluster
        self._show = show
        self._app = app
        self._is_named = bool(app)
        self._tail = tail
        self._since = since
        self._container = container
        self._calls: Queue[Callable[[], None]] = Queue(MOST_WAITING)
        self._returns = Returns()
        self._followed: set[str] = set()
        self._reading: set[str] = set()
        self._ended_before: set[str] = set()
        self._unheard: set[str] | None = None
        """Nodes that have not told yet what they have; None: all."""
        self._silent: set[str] = set()
        self._late: set[str] = set()
        """Nodes that did not answer, though they are not silent."""
        self._missed: set[str] = set()
        self._code = 0

    def run(self) -> int:
        """Follow; returns the exit code. Raises what keeps all of it from going on."""
        Thread(target=self._hear, daemon=True).start()
        while self._app or self._reading:
            try:
                call = self._calls.get(timeout=RETRY_S if self._late else None)
            except Empty:
                call = self._look
            call()
        return self._code

    def read(self, instance: str, node: str, *, tail: int = 0) -> None:
        """Follow an instance's log, once; of what there is, the last `tail` lines (0: all)."""
        if instance in self._followed:
            return
        self._followed.add(instance)
        self._reading.add(instance)
        place = Place(tail, self._since, self._container)
        Thread(target=self._read, args=(instance, node, place), daemon=True).start()

    # Threads: what comes is put into the queue

    def _hear(self) -> None:
        problem: TabaneError = ProtocolError(
            "a node's events end at once: is it of another version?"
        )
        attempts = 0
        while attempts < ATTEMPTS:
            attempts += 1
            try:
                with self._cluster.stream(EVENTS) as lines:
                    for line in lines:
                        if "error" in (event := json.loads(line)):
                            break  # it fell behind
                        attempts = 0
                        self._calls.put(partial(self._on_event, event))
            except TabaneError as error:
                problem = error
        self._calls.put(partial(self._fail, problem))

    def _read(self, instance: str, node: str, place: Place) -> None:
        while True:
            seen, opened = self._returns.count, False
            path = f"/api/v1/instances/{instance}/log?{place.query()}"
            try:
                with self._cluster.stream(path, node=node, or_any=True) as lines:
                    opened = True
                    self._calls.put(partial(self._on_opened, node))
                    for line in lines:
                        self._take(instance, place, line)
                self._calls.put(partial(self._on_end, instance))
                return
            except Unreachable as error:
                self._calls.put(partial(self._miss, node, error.message))
            except TabaneError as error:
                self._calls.put(partial(self._on_failure, instance, error))
                return
            if not opened:
                self._returns.wait(seen)

    def _take(self, instance: str, place: Place, line: bytes) -> None:
        if place.misses(line):
            lost = f"lines of {instance} are missing here: they were rotated away unread"
            self._calls.put(partial(complain, lost))
        if place.take(line):
            self._calls.put(partial(self._show, (instance, line)))

    # What to do about it

    def _fail(self, error: TabaneError) -> None:
        raise error

    def _on_event(self, event: dict[str, Any]) -> None:
        if "silent" in event:
            self._silent = set(event["silent"])
            self._look()
        elif "linked" in event:
            self._on_node(event["node"], event["linked"])
        elif event["app"] == self._app and "removed" in event:
            self._app = ""
        elif event["app"] == self._app:
            self._on_transition(event["instance"], event["node"], event["state"])

    def _on_node(self, node: str, linked: bool) -> None:
        if linked:
            self._silent.discard(node)
            self._look()
        else:
            self._silent.add(node)
            self._miss(node, f"nothing is heard of {node}")

    def _on_transition(self, instance: str, node: str, state: str) -> None:
        """Its log can be asked for from its second state on."""
        if state != "preparing" and (state == "starting" or instance not in self._ended_before):
            self.read(instance, node)

    def _look(self) -> None:
        """Ask what there is. Of a node that tells it for the first time, what has ended has ended
        before; of others it may have come and gone unheard."""
        self._returns.tell()
        if self._app and not is_deployed(self._cluster, self._app):
            self._app = ""
        if not self._app:
            return
        runs, told = self._cluster.get("/api/v1/instances"), self._cluster.get(RECORDS)
        for instance in runs["instances"]:
            if instance["app"] == self._app and instance["state"] != "preparing":
                is_new = not self._is_unheard(instance["node"])
                self.read(instance["id"], instance["node"], tail=0 if is_new else self._tail)
        for event in told["records"]:
            if event["app"] == self._app and event["instance"] not in self._followed:
                if self._is_unheard(event["node"]):
                    self._ended_before.add(event["instance"])
                self._on_transition(event["instance"], event["node"], "")
        self._on_silent({*runs["silent"], *told["silent"]})

    def _is_unheard(self, node: str) -> bool:
        return self._unheard is None or node in self._unheard

    def _on_silent(self, nodes: set[str]) -> None:
        self._unheard = nodes if self._unheard is None else self._unheard & nodes
        self._late = nodes - self._silent
        for node in sorted(nodes):
            self._miss(node, f"no answer from {node}")
        for node in sorted(self._missed - nodes - self._silent):
            self._on_opened(node)

    def _miss(self, node: str, problem: str) -> None:
        if node not in self._missed:
            self._missed.add(node)
            complain(f"{problem}: what is written there follows when it is back")

    def _on_opened(self, node: str) -> None:
        if node in self._missed:
            self._missed.discard(node)
            complain(f"{node} is back")

    def _on_end(self, instance: str) -> None:
        self._reading.discard(instance)

    def _on_failure(self, instance: str, error: TabaneError) -> None:
        if not self._is_named:
            raise error
        self._on_end(instance)
        complain(error.message)
        self._code = 1
