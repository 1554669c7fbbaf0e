"""Messages on the way to a handler, and its answers on the way back.

A handler gets one sender's messages in order: the next begins when the one before is done, unless
it was registered as concurrent; then they *begin* in order and may overlap. Messages of different
senders overlap always. A handler that is a plain function runs at once, without a task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from tabane.errors import Busy, Closed, Refused, TabaneError, UsageError
from tabane.middlecon.frames import RAISED, Frame, Kind, encode_ack, encode_frame
from tabane.middlecon.wire import Wire
from tabane.supervise import Supervisor, log_failure

WAITING_MESSAGES = 10_000
"""Of one handler. More are refused as overloaded, or dropped and counted if nobody waits."""
WAITING_BYTES = 64 << 20
"""The same in bytes: a slow handler does not keep its program from reading, so all waits here."""

_QUIET = frozenset(map(int, (Kind.CAST, Kind.POST)))
_ANSWERED = frozenset(map(int, (Kind.ASK, Kind.CALL)))


class Message:
    """What a handler gets. `room` is None for a message to this member alone.

    `wants_reply`: what the handler returns goes to the sender. `timeout_s`: how long the sender
    waits, counted from when it sent it; 0 when it does not wait.
    """

    __slots__ = ("_id", "_timeout_ms", "_wire", "data", "room", "sender", "wants_reply")

    def __init__(self, wire: Wire, frame: Frame, room: str | None) -> None:
        self.sender = frame.name
        self.data = frame.data
        self.room = room
        self.wants_reply = frame.kind in _ANSWERED
        self._timeout_ms = frame.value
        self._wire = wire
        self._id = 0 if frame.kind in _QUIET else frame.id

    @property
    def timeout_s(self) -> float:
        return self._timeout_ms / 1000

    @property
    def wants_ack(self) -> bool:
        """Whether the sender is told that the handler returned."""
        return self._id != 0

    def acknowledge(self, answer: bytes) -> None:
        if self._id and self._wire.open:
            if len(answer) > self._wire.session.limit_bytes and self.wants_reply:
                limit = self._wire.session.limit_bytes
                problem = f"the answer has {len(answer)} bytes, over the {limit} allowed"
                self.refuse(UsageError(problem), raised=True)
            elif answer and self.wants_reply:
                self._wire.port.send(encode_frame(Kind.ACK, id=self._id, data=answer))
            else:
                self._wire.port.send(encode_ack(self._id))

    def refuse(self, error: TabaneError, *, raised: bool) -> None:
        """Tell the sender why not. `raised` by the handler, or else decided before it."""
        if self._id and self._wire.open:
            self._wire.port.send(
                encode_frame(
                    Kind.NACK,
                    id=self._id,
                    flags=RAISED if raised else 0,
                    name=error.code,
                    data=error.message.encode(),
                )
            )


Handler = Callable[[Message], Awaitable[bytes | None] | bytes | None]


class Inbox:
    """One handler and what waits for it. `dropped` counts messages nobody was told about."""

    def __init__(self, name: str, tasks: Supervisor) -> None:
        self.dropped = 0
        self._name = name
        self._tasks = tasks
        self._handler: Handler | None = None
        self._concurrent = False
        self._busy: dict[str, deque[Message]] = {}
        """For each sender whose message is being handled, those that wait."""
        self._unfinished = 0
        self._unfinished_bytes = 0

    def handle_with(self, handler: Handler, *, concurrent: bool) -> None:
        """From now on `handler` gets the messages."""
        self._handler = handler
        self._concurrent = concurrent

    def deliver(self, message: Message) -> None:
        if self._handler is None:
            self._drop(message, Refused(f"{self._name} takes no messages"))
        elif self._unfinished >= WAITING_MESSAGES or self._unfinished_bytes > WAITING_BYTES:
            much = f"{self._unfinished} messages of {self._unfinished_bytes} bytes in all"
            self._drop(message, Busy(f"{much} wait for {self._name}"))
        elif self._concurrent:
            self._begin(message)
        elif (waiting := self._busy.get(message.sender)) is not None:
            self._count(message, 1)
            waiting.append(message)
        else:
            self._begin(message)

    def _drop(self, message: Message, error: TabaneError) -> None:
        if message.wants_ack:
            message.refuse(error, raised=False)
        else:
            self.dropped += 1

    def _begin(self, message: Message) -> None:
        assert self._handler is not None
        try:
            result = self._handler(message)
        except Exception as error:
            self._on_raised(message, error)
            return
        if result is None or isinstance(result, bytes):
            message.acknowledge(result or b"")
            return
        if not isinstance(result, Awaitable):
            self._on_returned(message, result)
            return
        self._count(message, 1)
        if not self._concurrent:
            self._busy[message.sender] = deque()
        self._tasks.start(f"{self._name} from {message.sender}", self._finish(message, result))

    async def _finish(self, message: Message, work: Awaitable[bytes | None]) -> None:
        try:
            self._on_returned(message, await work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._on_raised(message, Closed("the handler was cancelled"))
        except Exception as error:
            self._on_raised(message, error)
        self._count(message, -1)
        self._next_of(message.sender)

    def _count(self, message: Message, by: int) -> None:
        self._unfinished += by
        self._unfinished_bytes += by * len(message.data)

    def _next_of(self, sender: str) -> None:
        """Begin what waited for the message just finished, up to the next that takes time."""
        waiting = self._busy.pop(sender, None)
        while waiting:
            message = waiting.popleft()
            self._count(message, -1)
            self._begin(message)
            if sender in self._busy:
                self._busy[sender] = waiting
                return

    def _on_returned(self, message: Message, answer: bytes | None) -> None:
        if answer is None or isinstance(answer, (bytes, bytearray, memoryview)):
            message.acknowledge(bytes(answer or b""))
        else:
            kind = type(answer).__name__
            self._on_raised(message, TypeError(f"a handler returns bytes or None, not {kind}"))

    def _on_raised(self, message: Message, error: Exception) -> None:
        if isinstance(error, TabaneError):
            message.refuse(error, raised=True)
        else:
            log_failure(f"{self._name} from {message.sender}", error)
            text = f"{type(error).__name__}: {error}"
            message.refuse(TabaneError(text), raised=True)


def register(inbox: Inbox, handler: Handler | None, concurrent: bool) -> Any:
    """Both forms of the decorator: `@on_message` and `@on_message(concurrent=True)`."""

    def register(handler: Handler) -> Handler:
        inbox.handle_with(handler, concurrent=concurrent)
        return handler

    return register if handler is None else register(handler)
