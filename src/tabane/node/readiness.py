"""Is the program ready: seen from outside, without connecting to it.

`listen` asks for the listening socket in the instance's own network namespace (through the parked
process, so it works before the engine has even returned). The kernel tells nobody when a socket
starts to listen, so it is asked again and again, at first every half millisecond.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

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
LAST_TRY_S = 1.0
LISTEN = "0A"
"""In /proc/net/tcp (TCP_LISTEN of tcp_states.h)."""
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
    return GOOD_ANSWER.fullmatch(await _ask(address, port, path, HTTP_ANSWER_S)) is not None


async def _ask(address: str, port: int, path: str, timeout_s: float) -> bytes:
    """How an answer begins; empty for a close, silence, and when nothing listens."""
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(request.encode())
                return await reader.readexactly(len(b"HTTP/1.1 200"))
            finally:
                writer.close()
    except (OSError, EOFError):
        return b""


async def wait_ready(
    app: App, address: str, link: Link | None, look: Callable[[int], Awaitable[None]] | None = None
) -> None:
    """Wait as the app's `ready` says. The caller sets the deadline and watches for an exit. `look`
    waits until a port is listened to, where the link's socket table does not show that."""
    ready = app.reactive.ready
    if ready == "started":
        return
    if ready.startswith("http:") and app.port is not None:
        await wait_healthy(address, app.port, ready.removeprefix("http:"))
    for port in app.listens if ready == "listen" else ():
        if look is not None:
            await look(port)
        elif link is not None:
            await wait_listening(link, port)


async def describe_unready(app: App, address: str, link: Link | None) -> str:
    """What can be seen of a program that is not ready in time, for its author."""
    if not app.takes_sessions or link is None:
        return ""
    try:
        with SocketTable(link.parked_pid) as sockets:
            reached = all(sockets.listens(address, port) for port in app.listens)
        listening = listening_sockets(link.parked_pid)
    except OSError:
        return ""
    if not reached:
        others = ", ".join(listening)
        return f"it listens on {others} only" if others else "it listens on no port"
    if not app.reactive.ready.startswith("http:") or app.port is None:
        return ""
    path = app.reactive.ready.removeprefix("http:")
    answer = await _ask(address, app.port, path, LAST_TRY_S)
    if answer.startswith(b"HTTP/1."):
        return f"GET {path} is answered {answer[9:].decode(errors='replace')}"
    return f"GET {path} is answered by no HTTP" if answer else f"GET {path} is not answered"


def listening_sockets(pid: int) -> list[str]:
    """`ADDRESS:PORT` of each TCP socket that listens in a process's network namespace."""
    found = []
    for family, name in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        path = Path(f"/proc/{pid}/net/{name}")
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        fields = (line.split() for line in lines)
        found += [_show_socket(family, f[1]) for f in fields if f[3] == LISTEN]
    return sorted(set(found))


def _show_socket(family: socket.AddressFamily, text: str) -> str:
    """As /proc writes it: hexadecimal, each four bytes in the machine's order (little-endian)."""
    address, _, port = text.partition(":")
    words = [bytes.fromhex(address[n : n + 8])[::-1] for n in range(0, len(address), 8)]
    shown = socket.inet_ntop(family, b"".join(words))
    return f"{f'[{shown}]' if ':' in shown else shown}:{int(port, 16)}"
