"""One check of an instance, as its app's `[health]` says: made by its node, in its node's network.

It is no session: no gateway, no home and no limit knows of it.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from tabane.errors import TabaneError
from tabane.node.entering import run_inside

if TYPE_CHECKING:
    from tabane.node.running import Running

AGAIN_S = 0.05
"""From one check to the next of an instance that becomes ready by it."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d\d\d)[ \r]")
_STATUS_BYTES = len(b"HTTP/1.1 200 ")


async def wait_well(running: Running) -> None:
    """Return when a check has passed; never by itself otherwise."""
    while problem := await find_problem(running):
        running.unwell = problem
        await asyncio.sleep(AGAIN_S)


async def find_problem(running: Running) -> str:
    """What is wrong with it, as a sentence without its end; empty: nothing."""
    health = running.record.app.health
    try:
        async with asyncio.timeout(health.timeout_s):
            return await _check(running)
    except TimeoutError:
        return f"{health.asks} is not answered within {health.timeout_s:g} s"
    except (OSError, EOFError, TabaneError) as error:
        return f"{health.asks} fails: {_explain(error)}"


def _explain(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it is closed without an answer"
    return (isinstance(error, OSError) and error.strerror) or str(error)


async def _check(running: Running) -> str:
    app, address = running.record.app, running.instance.address
    if app.health.command:
        await run_inside(running, app.health.command)
        return ""
    if app.health.http:
        assert app.port is not None
        return await _ask(address, app.port, app.health.http)
    for port in app.listens:
        _, writer = await asyncio.open_connection(address, port)
        writer.close()
    return ""


async def _ask(address: str, port: int, path: str) -> str:
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(request.encode())
        status = _STATUS.match(await reader.readexactly(_STATUS_BYTES))
    finally:
        writer.close()
    if status is None:
        return f"GET {path} is answered by no HTTP"
    answered = status[1].decode()
    return "" if answered[0] in "23" else f"GET {path} is answered {answered}"
