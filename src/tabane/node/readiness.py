"""Is the program ready: seen from outside, without connecting to it.

`listen` asks for the listening socket in the instance's own network namespace (through the parked
process, so it works before the engine has even returned). The kernel tells nobody when a socket
starts to listen, so it is asked again and again, at first every half millisecond.
"""

from __future__ import annotations

import asyncio
import re

from tabane.model import App
from tabane.network.sockets import SocketTable
from tabane.runtimes.api import Link

FIRST_POLL_S = 0.0005
LAST_POLL_S = 0.05
GROWTH = 1.02
"""The pause is 2 % of the time waited, once that is more than 25 ms."""
HTTP_POLL_S = 0.02
HTTP_ANSWER_S = 5.0
"""A try that takes longer is given up for a new one."""
GOOD_ANSWER = re.compile(rb"HTTP/1\.[01] [23]\d\d")


async def wait_listening(link: Link, port: int) -> None:
    """Return when a connection to `port` at the link's address would be taken; never by itself.

    Raises `OSError` when the link's namespaces are gone.
    """
    pause_s = FIRST_POLL_S
    with SocketTable(link.parked_pid) as sockets:
        while not sockets.listens(link.address, port):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * GROWTH, LAST_POLL_S)


async def wait_healthy(address: str, port: int, path: str) -> None:
    """Return when `GET path` answers 2xx or 3xx; never by itself."""
    while not await _healthy(address, port, path):  # noqa: ASYNC110 (the kernel has no event)
        await asyncio.sleep(HTTP_POLL_S)


async def _healthy(address: str, port: int, path: str) -> bool:
    """One try. Garbage, a close and silence are no answer."""
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(HTTP_ANSWER_S):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(request.encode())
                answer = await reader.readexactly(len(b"HTTP/1.1 200"))
            finally:
                writer.close()
    except (OSError, EOFError):
        return False
    return GOOD_ANSWER.fullmatch(answer) is not None


async def wait_ready(app: App, address: str, link: Link | None) -> None:
    """Wait as the app's `ready` says. The caller sets the deadline and watches for an exit."""
    ready = app.reactive.ready
    if ready == "started" or app.port is None:
        return
    if ready.startswith("http:"):
        await wait_healthy(address, app.port, ready.removeprefix("http:"))
    elif link is not None:
        await wait_listening(link, app.port)
