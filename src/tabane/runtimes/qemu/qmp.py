"""QEMU's own control socket: commands, and their answers.

QEMU, which a guest may have taken over, is not trusted: an answer has a deadline and a largest
size.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from tabane.errors import Closed, EngineError, TimedOut
from tabane.unix import connect_unix

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 1 << 20


class Session:
    """A connection to QEMU, one at a time; a context. `where`: its socket's path, or a connection
    to it, which is closed in the end; `purpose`: a word for when it fails. What is executed raises
    `EngineError` when QEMU refuses, `TimedOut`, and `Closed` when no QEMU is there."""

    def __init__(self, where: Path | socket.socket, purpose: str = "migrate") -> None:
        self._where = where
        self._purpose = purpose
        self._socket: socket.socket | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Session:
        try:
            await self._bounded(self._purpose, self._open())
        except BaseException:
            self._close()
            raise
        return self

    async def _open(self) -> None:
        where = self._where
        self._socket = connect_unix(where) if isinstance(where, Path) else where
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._socket, limit=MAX_ANSWER_BYTES
        )
        await self._answer()
        await self._ask("qmp_capabilities", {}, None)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        elif self._socket is not None:
            self._socket.close()

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, file: int | None = None
    ) -> Any:
        """What QEMU returns. `file`: a descriptor that goes with the command."""
        return await self._bounded(command, self._ask(command, arguments or {}, file))

    async def _bounded(self, command: str, work: Any) -> Any:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await work
        except TimeoutError:
            raise TimedOut(f"QEMU did not answer {command} within {TIMEOUT_S:g} s") from None
        except (OSError, EOFError) as error:
            raise Closed(f"there is no QEMU any more to {command}: {error}") from None

    async def _ask(self, command: str, arguments: dict[str, Any], file: int | None) -> Any:
        assert self._socket is not None and self._writer is not None
        asked = msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n"
        if file is None:
            self._writer.write(asked)
        else:  # nothing is waiting to be written: each command waits for its answer
            socket.send_fds(self._socket, [asked], [file])
        while True:
            answer = await self._answer()
            if "error" in answer:
                words = str(answer["error"].get("desc", answer["error"]))
                raise EngineError(f"QEMU refuses to {command}: {words}", output=words)
            if "return" in answer:  # and no event
                return answer["return"]

    async def _answer(self) -> dict[str, Any]:
        try:
            line = await self._reader.readuntil(b"\n")
            return msgspec.json.decode(line, type=dict[str, Any])
        except (asyncio.LimitOverrunError, msgspec.DecodeError) as error:
            raise EngineError(f"QEMU answers what is no JSON: {error}") from None


async def execute(path: Path, command: str, **arguments: Any) -> Any:
    """One command on a connection of its own. As `Session.execute`."""
    async with Session(path, command) as session:
        return await session.execute(command, arguments)
