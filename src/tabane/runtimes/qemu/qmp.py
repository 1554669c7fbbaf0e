"""QEMU's own control socket: one command on a connection of its own, and its answer.

QEMU, which a guest may have taken over, is not trusted: an answer has a deadline and a largest
size.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Closed, EngineError, TimedOut
from tabane.unix import connect_unix

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 1 << 20


async def execute(path: Path, command: str, **arguments: Any) -> Any:
    """What QEMU returns. Raises `EngineError` when it refuses, `TimedOut`, and `Closed` when no
    QEMU is there."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            sock = connect_unix(path)
            sock.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_ANSWER_BYTES)
            try:
                await _answer(reader)
                await _ask(reader, writer, "qmp_capabilities", {})
                return await _ask(reader, writer, command, arguments)
            finally:
                writer.close()
    except TimeoutError:
        raise TimedOut(f"QEMU did not answer {command} within {TIMEOUT_S:g} s") from None
    except (OSError, EOFError) as error:
        raise Closed(f"there is no QEMU any more to {command}: {error}") from None


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    command: str,
    arguments: dict[str, Any],
) -> Any:
    writer.write(msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n")
    while True:
        answer = await _answer(reader)
        if "error" in answer:
            words = str(answer["error"].get("desc", answer["error"]))
            raise EngineError(f"QEMU refuses to {command}: {words}", output=words)
        if "return" in answer:  # and no event
            return answer["return"]


async def _answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    try:
        line = await reader.readuntil(b"\n")
        return msgspec.json.decode(line, type=dict[str, Any])
    except (asyncio.LimitOverrunError, msgspec.DecodeError) as error:
        raise EngineError(f"QEMU answers what is no JSON: {error}") from None
