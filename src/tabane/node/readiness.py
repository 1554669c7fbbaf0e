"""Is the program ready: seen from outside, without connecting to it.

`listen` reads the socket table of the instance's own network namespace (through the parked
process, so it works before the engine has even returned). The kernel tells nobody when a socket
starts to listen, so the table is read again and again, at first every half millisecond.
"""

from __future__ import annotations

import asyncio

from tabane.model import App
from tabane.network.sockets import ListeningSockets
from tabane.runtimes.api import Link

FIRST_POLL_S = 0.0005
LAST_POLL_S = 0.05
GROWTH = 1.02
"""The pause is 2 % of the time waited, once that is more than 25 ms."""
HTTP_POLL_S = 0.02


async def wait_listening(link: Link, port: int) -> None:
    """Return when something listens on `port` in the link's network namespace, not on loopback
    only; never by itself."""
    pause_s = FIRST_POLL_S
    with ListeningSockets(link.parked_pid) as sockets:
        while not any(s.port == port and not s.is_loopback for s in sockets.read()):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * GROWTH, LAST_POLL_S)


async def wait_healthy(address: str, port: int, path: str) -> None:
    """Return when `GET path` answers 2xx or 3xx; never by itself."""
    while not await _healthy(address, port, path):  # noqa: ASYNC110 (the kernel has no event)
        await asyncio.sleep(HTTP_POLL_S)


async def _healthy(address: str, port: int, path: str) -> bool:
    try:
        reader, writer = await asyncio.open_connection(address, port)
    except OSError:
        return False
    try:
        request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        writer.write(request.encode())
        status = (await reader.readline()).split(b" ", 2)
        return len(status) > 1 and status[1][:1] in (b"2", b"3")
    except OSError:
        return False
    finally:
        writer.close()


async def wait_ready(app: App, address: str, link: Link | None) -> None:
    """Wait as the app's `ready` says. The caller sets the deadline and watches for an exit."""
    ready = app.reactive.ready
    if ready == "started" or app.port is None:
        return
    if ready.startswith("http:"):
        await wait_healthy(address, app.port, ready.removeprefix("http:"))
    elif link is not None:
        await wait_listening(link, app.port)
