"""Calls to containerd over its unix socket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabane.errors import Closed, Conflict, EngineError, NotFound, TabaneError, TimedOut
from tabane.runtimes.containerd.messages import CALLS, classes, make

if TYPE_CHECKING:
    from grpclib.client import Channel
    from grpclib.exceptions import GRPCError

CALL_TIMEOUT_S = 30.0
"""For every call but `wait`: a shim that hangs shall not hold up its instance's end for ever."""


class Client:
    """Connects when it is first asked, and again when the connection was lost. Close it."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self._socket = socket
        self._metadata = {"containerd-namespace": namespace}
        self._channel: Channel | None = None

    async def call(
        self, name: str, /, *, timeout_s: float | None = CALL_TIMEOUT_S, **fields: Any
    ) -> Any:
        """One of `CALLS`, and its response.

        Raises `NotFound` and `Conflict` as containerd says so, `EngineError` for what else it
        refuses, with its words, `Closed` when it cannot be reached or went away meanwhile (then
        nobody knows whether it was done), `TimedOut`.
        """
        from grpclib.client import UnaryUnaryMethod
        from grpclib.exceptions import GRPCError, StreamTerminatedError

        path, request, response = CALLS[name]
        method: Any = UnaryUnaryMethod(
            self._open(), f"/{path}", classes()[request], classes()[response]
        )
        message = make(request, **fields)
        try:
            return await method(message, timeout=timeout_s, metadata=self._metadata)
        except GRPCError as error:
            raise _translate(name, error) from None
        except (OSError, StreamTerminatedError) as error:
            if isinstance(error, TimeoutError):
                raise TimedOut(f"containerd did not {name} within {timeout_s:.0f} s") from None
            raise Closed(f"containerd does not answer at {self._socket}: {error}") from error

    def _open(self) -> Channel:
        from grpclib.client import Channel

        if self._channel is None:
            self._channel = Channel(path=str(self._socket))
        return self._channel

    def close(self) -> None:
        """Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _translate(call: str, error: GRPCError) -> TabaneError:
    from grpclib.const import Status

    words = error.message or error.status.name.lower().replace("_", " ")
    problem = f"containerd could not {call.replace('_', ' ')}: {words}"
    match error.status:
        case Status.NOT_FOUND:
            return NotFound(problem)
        case Status.ALREADY_EXISTS | Status.FAILED_PRECONDITION:
            return Conflict(problem)
        case Status.UNAVAILABLE:
            return Closed(problem)
        case Status.DEADLINE_EXCEEDED:
            return TimedOut(problem)
    status = int(error.status.value)
    return EngineError(problem, argv=("containerd", call), status=status, output=words)
