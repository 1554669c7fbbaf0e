"""What a client waits for: its own messages, until the hub tells their fate."""

from __future__ import annotations

import asyncio
from typing import Any

from tabane.errors import (
    Asleep,
    Busy,
    Closed,
    Denied,
    NotFound,
    Refused,
    TabaneError,
    TimedOut,
    Unreachable,
)
from tabane.middlecon.agree import Agreed, parse_agreed
from tabane.middlecon.frames import MAX_U32, MORE, Frame, Kind
from tabane.middlecon.receipts import Cause, Reason, Sum, parse_receipt
from tabane.middlecon.tallies import parse_reason

HUB_GRACE_S = 2.0
"""The hub keeps the deadline; only if it says nothing for so much longer, the client gives up."""
SWEEP_S = 0.25

_ERRORS: dict[Cause, type[TabaneError]] = {
    Cause.CLOSED: Closed,
    Cause.TIMED_OUT: TimedOut,
    Cause.OVERLOADED: Busy,
    Cause.UNREACHABLE: Unreachable,
    Cause.NOT_FOUND: NotFound,
    Cause.DENIED: Denied,
    Cause.ASLEEP: Asleep,
}


def error_for(reason: Reason) -> TabaneError:
    """The error that a single message failed with."""
    if reason.cause is Cause.REFUSED:
        return Refused(reason.text, reason=reason.code)
    return _ERRORS[reason.cause](reason.text)


class Request:
    """One message on its way. `result` is what the hub says of it, by the kind of message."""

    __slots__ = ("agreed", "answers", "deadline", "kind", "result", "total")

    def __init__(self, kind: Kind, result: asyncio.Future[Any], deadline: float) -> None:
        self.kind = kind
        self.result = result
        self.deadline = deadline
        self.answers: dict[str, bytes] = {}
        self.total: Sum | None = None
        self.agreed: Agreed | None = None


class Requests:
    """The requests of one session, by the ids their frames carry."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[int, Request] = {}
        self._last_id = 0
        self._sweep: asyncio.TimerHandle | None = None

    def add(self, kind: Kind, timeout_s: float) -> tuple[int, asyncio.Future[Any]]:
        """A new id, and what will be its result."""
        id = self._last_id = self._last_id % MAX_U32 + 1
        result: asyncio.Future[Any] = self._loop.create_future()
        deadline = self._loop.time() + timeout_s + HUB_GRACE_S
        self._pending[id] = Request(kind, result, deadline)
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._on_sweep)
        return id, result

    def on_ack(self, frame: Frame) -> None:
        request = self._pending.pop(frame.id, None)
        if request is not None and not request.result.done():
            request.result.set_result(frame.data)

    def on_nack(self, frame: Frame) -> None:
        request = self._pending.pop(frame.id, None)
        if request is not None and not request.result.done():
            request.result.set_exception(error_for(parse_reason(frame)))

    def on_answer(self, frame: Frame) -> None:
        if (request := self._pending.get(frame.id)) is not None:
            request.answers[frame.name] = frame.data

    def on_receipt(self, frame: Frame) -> None:
        """A part of a receipt. Raises `ProtocolError`."""
        request = self._pending.get(frame.id)
        if request is None:
            return
        part = parse_receipt(frame)
        if request.total is None:
            request.total = part
        else:
            request.total.add(part)
        if frame.flags & MORE:
            return
        del self._pending[frame.id]
        if request.result.done():
            return
        if request.kind == Kind.ASK:
            for name in request.total.failed:
                request.answers.pop(name, None)
            request.result.set_result(request.total.replies(request.answers))
        else:
            request.result.set_result(request.total.receipt())

    def on_agreed(self, frame: Frame) -> None:
        """A part of what became of an agreement. Raises `ProtocolError`."""
        request = self._pending.get(frame.id)
        if request is None:
            return
        part = parse_agreed(frame)
        if request.agreed is None:
            request.agreed = part
        else:
            request.agreed.add(part)
        if not frame.flags & MORE:
            del self._pending[frame.id]
            if not request.result.done():
                request.result.set_result(request.agreed)

    def fail_all(self, reason: str) -> None:
        """The session is over: nobody will tell any more."""
        pending, self._pending = self._pending, {}
        for request in pending.values():
            if not request.result.done():
                request.result.set_exception(Closed(reason))
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _on_sweep(self) -> None:
        now = self._loop.time()
        for id, request in list(self._pending.items()):
            if request.result.done():
                del self._pending[id]
            elif request.deadline <= now:
                del self._pending[id]
                request.result.set_exception(TimedOut("the hub did not answer in time"))
        again = bool(self._pending)
        self._sweep = self._loop.call_later(SWEEP_S, self._on_sweep) if again else None
