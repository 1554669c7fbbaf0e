"""The append-only audit log's line: who did what to what, and when."""

from __future__ import annotations

from tabane.model import Value


class Line(Value, frozen=True):
    at: float
    """Seconds since the epoch."""
    kind: str
    uid: int
    pid: int
    action: str
    target: str
