"""What an app's file says of checks and triggers: values, as those of `tabane.model`."""

from __future__ import annotations

import msgspec


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """How it is found out whether an instance still works: one of `http`, `tcp`, `command`, or
    none. Made by the node that runs it, and no session."""

    http: str = ""
    """A path: `GET` of it answers 2xx or 3xx."""
    tcp: bool = False
    """A connection to its port is taken."""
    command: tuple[str, ...] = ()
    """Run inside, ends with code 0."""
    interval_s: float = 10.0
    """From the end of one check to the next."""
    timeout_s: float = 2.0
    failures: int = 3
    """So many in a row, and the instance is stopped."""
    startup_s: float = 0.0
    """After it became ready, until a check has passed, failures do not count for so long."""

    @property
    def is_set(self) -> bool:
        return bool(self.http or self.tcp or self.command)

    @property
    def asks(self) -> str:
        """What a check is, for people."""
        if self.http:
            return f"GET {self.http}"
        return f"`{' '.join(self.command)}`" if self.command else "a connection"

    @property
    def verdict_s(self) -> float:
        """How long it may take at the most until one that never worked is known for that."""
        if not self.is_set:
            return 0.0
        return self.startup_s + (self.failures + 1) * (self.interval_s + self.timeout_s)


HOOK_SIGNALS = ("HUP", "USR1", "USR2", "WINCH")


class Hooks(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a program hears of what its node does to it."""

    restored: str = ""
    """It goes on as a copy: `http:/path`, to which a POST is answered 2xx, or `signal:NAME`."""
    deadline_s: float = 5.0
    """How long such an answer may take."""


class Trigger(msgspec.Struct, frozen=True, omit_defaults=True):
    """What brings an app a session beside its callers: a moment (`cron`), or a message in a `room`.
    It becomes an HTTP request to the app, which wakes it as any does."""

    name: str = ""
    """Of several of one app; its kind unless told."""
    cron: str = ""
    """A line of crontab(5), or a nickname as `@hourly`."""
    timezone: str = "UTC"
    missed: str = "skip"
    """Moments that came while the control node was away: `skip`, or `once` for all of them."""
    overlap: str = "skip"
    """A moment that comes before the request of the last one is answered: `skip` or `allow`."""
    room: str = ""
    path: str = "/"
    method: str = "POST"
    body: str = ""
    """Of a moment's request; a message's is the message."""

    @property
    def kind(self) -> str:
        return "room" if self.room else "cron"

    @property
    def key(self) -> str:
        return self.name or self.kind
