"""Errors as REST answers: the one place where blame becomes a status."""

from __future__ import annotations

import math
from typing import Any

from tabane import errors

STATUSES: tuple[tuple[type[errors.TabaneError], int], ...] = (
    (errors.Unauthenticated, 401),
    (errors.Denied, 403),
    (errors.NotFound, 404),
    (errors.Stale, 410),
    (errors.Conflict, 409),
    (errors.UsageError, 400),
    (errors.Unsupported, 422),
    (errors.Busy, 429),
    (errors.TimedOut, 504),
    (errors.Unavailable, 503),
    (errors.PeerError, 502),
    (errors.TabaneError, 500),
)


def status_of(error: errors.TabaneError) -> int:
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def to_body(error: errors.TabaneError) -> dict[str, Any]:
    """`{"error": stable word, "message": one sentence}`, and what the error carries."""
    body: dict[str, Any] = {"error": error.code, "message": error.message}
    if isinstance(error, errors.SpecError):
        body |= {"file": error.file, "line": error.line, "field": error.field}
    return body


def headers_of(error: errors.TabaneError) -> dict[str, str]:
    if isinstance(error, errors.Unavailable):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, errors.Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def parse_body(status: int, body: dict[str, Any]) -> errors.TabaneError:
    """The error that an answer stands for, on the client's side."""
    named = (kind for kind in _all_kinds(errors.TabaneError) if "code" in vars(kind))
    kinds = {kind.code: kind for kind in named}
    kind = kinds.get(str(body.get("error")), errors.Refused)
    message = str(body.get("message") or f"the node answered {status}")
    if issubclass(kind, errors.SpecError):
        plain = errors.UsageError(message)
        plain.code = "spec"
        return plain
    return kind(message)


def _all_kinds(root: type[errors.TabaneError]) -> list[type[errors.TabaneError]]:
    return [root] + [kind for child in root.__subclasses__() for kind in _all_kinds(child)]
