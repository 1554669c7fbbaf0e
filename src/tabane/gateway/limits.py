"""What a gateway allows its clients and apps, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabane.model import AppName, Value


class HttpLimits(Value, frozen=True):
    """Times are kept to within a sweep (see `tabane.gateway.http`), about a quarter second."""

    header_timeout_s: float = 10.0
    """From a request's first byte (or the connection's beginning) to the end of its head."""
    idle_timeout_s: float = 75.0
    """Between two requests of a connection."""
    body_idle_timeout_s: float = 60.0
    """In which a body must get on: the client sends some, or takes some, or the app takes some."""
    upload_grace_s: float = 120.0
    """So far a request's body may fall behind `upload_bytes_per_s` while the app waits for it."""
    upload_bytes_per_s: float = 500.0
    """A byte a minute would hold a slot for ever. Slower than any line that people upload over, and
    what Apache's mod_reqtimeout asks for (`body=20,MinRate=500`)."""
    stream_idle_timeout_s: float = 900.0
    """In which an app that began to answer, or a WebSocket, must send something."""
    continue_after_s: float = 1.0
    """An app that does not answer `Expect: 100-continue` for so long gets the body all the same."""
    linger_s: float = 2.0
    """How long a client that still sends is listened to after its last answer."""
    connect_timeout_s: float = 3.0
    upstream_idle_s: float = 30.0
    """How long an unused connection to an app is kept."""
    max_connections: int = 10_000
    max_idle_upstreams: int = 4_096
    max_tries: int = 3
    """Of one request, the first included."""
    backlog: int = 4_096

    def next_upload_due(self, due: float, now: float, came_bytes: int) -> float:
        """By when more of a body must have come, that was due at `due` (0: it only begins)."""
        latest = now + self.upload_grace_s
        return min(due + came_bytes / self.upload_bytes_per_s, latest) if due else latest


class TcpLimits(Value, frozen=True):
    """What a TCP gateway allows; times are kept to within a sweep, as those of HTTP."""

    connect_timeout_s: float = 3.0
    hop_timeout_s: float = 10.0
    """In which another gateway must say where its session is to go."""
    max_connections: int = 10_000
    max_tries: int = 3
    """To reach an instance, for one session."""
    backlog: int = 4_096


@dataclass(slots=True)
class TcpCounters:
    """Since the gateway began; `active` is of now."""

    sessions: int = 0
    active: int = 0
    """Connected to an instance."""
    refused: int = 0
    """That got no instance."""
    received_bytes: int = 0
    sent_bytes: int = 0
    """Both of sessions that have ended."""


@dataclass(slots=True)
class HttpCounters:
    """Since the gateway began; `active` is of now."""

    requests: int = 0
    responses: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(1, 6), 0))
    """By class: `responses[5]` were 5xx, the gateway's own included."""
    received_bytes: int = 0
    sent_bytes: int = 0
    active: int = 0
    retries: int = 0
    refused_connections: int = 0
    aborted: int = 0
    """Sessions that ended without a whole response."""


class AccessRecord(Value, frozen=True):
    """One request, for an access log. `status` is 0 when the client left before an answer."""

    app: AppName | None
    method: str
    host: str
    path: str
    status: int
    duration_s: float
    """To within a sweep."""
    peer: str
