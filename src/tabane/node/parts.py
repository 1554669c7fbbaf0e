"""The parts of a node, seen from the holder: their sockets, and starting them again.

The standard library only, as in the holder.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabane.unix import shortened

IP_FREEBIND = 15
FIRST_SOCKET_FD = 100
"""Sockets are handed to parts from this number up; below it their own files fit."""
RESTART_FIRST_S = 0.05
RESTART_LAST_S = 5.0
SETTLED_S = 10.0
"""A part that lived so long is started again as quickly as at first."""


@dataclass
class Part:
    """One of Tabane's own processes: agent, hub or gateway."""

    name: str
    argv: list[str]
    sockets: list[str]
    pid: int = 0
    started: float = 0.0
    pause_s: float = RESTART_FIRST_S
    due: float = 0.0


class Parts:
    """All parts of the node, and the sockets that outlive them. `now` is monotonic seconds.
    `on_pause` is told of each that has ended: its name, how, and in how many seconds it is started
    again."""

    def __init__(
        self,
        sockets: list[dict[str, Any]],
        parts: list[dict[str, Any]],
        on_pause: Callable[[str, object, float], None] = lambda name, why, pause_s: None,
    ) -> None:
        self._parts = [Part(p["name"], p["argv"], p["sockets"]) for p in parts]
        each = {entry["name"]: entry for entry in sockets if entry.get("each")}
        shared = {s["name"]: bind_socket(s) for s in sockets if s["name"] not in each}
        self._sockets = {
            part.name: {
                name: bind_socket(each[name]) if name in each else shared[name]
                for name in part.sockets
            }
            for part in self._parts
        }
        self._on_pause = on_pause

    @property
    def running(self) -> dict[int, Part]:
        """By pid."""
        return {part.pid: part for part in self._parts if part.pid}

    def next_due(self) -> float | None:
        """When the next part is to be started; None when all run."""
        return min((part.due for part in self._parts if not part.pid), default=None)

    def start_due(self, now: float) -> None:
        """Start the parts whose pause is over."""
        for part in self._parts:
            if not part.pid and part.due <= now:
                self._start(part, now)

    def _start(self, part: Part, now: float) -> None:
        numbered = list(enumerate(part.sockets, FIRST_SOCKET_FD))
        names = ",".join(f"{name}={number}" for number, name in numbered)
        sockets = self._sockets[part.name]
        actions = [(os.POSIX_SPAWN_DUP2, sockets[name].fileno(), n) for n, name in numbered]
        environment = os.environ | {"TABANE_SOCKETS": names, "TABANE_PART": part.name}
        part.started = now
        try:
            part.pid = spawn(part.argv, environment, actions)
        except OSError as error:
            self._pause(part, explain(error), now)

    def on_end(self, pid: int, status: object, now: float) -> None:
        """The part with this pid has ended: start it again after a pause."""
        self._pause(self.running[pid], status, now)

    def _pause(self, part: Part, why: object, now: float) -> None:
        settled = now - part.started > SETTLED_S
        part.pause_s = RESTART_FIRST_S if settled else min(part.pause_s * 2, RESTART_LAST_S)
        part.pid, part.due = 0, now + part.pause_s
        say(f"{part.name} ended ({why}); pausing {part.pause_s:g} s")
        self._on_pause(part.name, why, part.pause_s)

    def signal(self, number: int) -> None:
        """Signal every part that runs."""
        for pid in self.running:
            os.kill(pid, number)


def spawn(argv: list[str], env: Any, actions: list[Any], *, setsid: bool = False) -> int:
    """Start a program with the signals that Python ignores as they were; return its pid."""
    return os.posix_spawnp(
        argv[0],
        argv,
        env,
        file_actions=actions,
        setsid=setsid,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
    )


def explain(error: Exception) -> str:
    """An error as a phrase: what is wrong, and with which file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}"


def say(text: str) -> None:
    """A line in the node's own log; the holder goes on when even that cannot be written."""
    with suppress(OSError):
        print(f"holder: {text}", file=sys.stderr, flush=True)


def listen_unix(path: str) -> socket.socket:
    """Bind a unix socket for root only."""
    target = Path(path)
    target.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        sock = socket.socket(socket.AF_UNIX)
        with shortened(target) as short:
            sock.bind(short)
    finally:
        os.umask(before)
    sock.listen(4096)
    return sock


def bind_socket(entry: dict[str, Any]) -> socket.socket:
    """Bind what the configuration names: `{"name", "kind": "unix"|"tcp"|"udp", "address"}`.

    With `"each": True` every part that is to have it has one of its own at the same address, and
    the kernel spreads connections over them (SO_REUSEPORT); in one that all share, most of what
    comes at once is taken by whoever wakes first.
    """
    if entry["kind"] == "unix":
        sock = listen_unix(entry["address"])
        if "mode" in entry:
            Path(entry["address"]).chmod(entry["mode"])
        return sock
    host, _, port = entry["address"].rpartition(":")
    kind = socket.SOCK_DGRAM if entry["kind"] == "udp" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if entry.get("each"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if entry.get("freebind"):
        sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
    try:
        sock.bind((host, int(port)))
        if kind == socket.SOCK_STREAM:
            sock.listen(4096)
    except OSError:
        sock.close()
        raise
    return sock
