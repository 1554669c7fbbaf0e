"""Tells a program what its node did to it, as the app's `[hooks]` say, and waits for its answer."""

from __future__ import annotations

import asyncio
import os
import re
import signal

from tabane.errors import EngineError, Unsupported
from tabane.node.running import Running

_STATUS = re.compile(rb"HTTP/1\.[01] (\d\d\d)[ \r]")
_STATUS_BYTES = len(b"HTTP/1.1 200 ")


async def tell_restored(running: Running) -> None:
    """Have it know that it is a copy; returns when it has said that it does, at once without a
    hook. Raises `EngineError` for any other answer or none in time, `Unsupported` for a signal to
    what is no process of the node's."""
    hooks = running.record.app.hooks
    kind, _, what = hooks.restored.partition(":")
    if kind == "signal":
        _signal(running, what)
    elif kind == "http":
        try:
            async with asyncio.timeout(hooks.deadline_s):
                status = await _post(running, what)
        except TimeoutError:
            status = f"not answered within {hooks.deadline_s:g} s"
        except (OSError, EOFError) as error:
            status = f"not answered: {error}"
        if not status.startswith("answered 2"):
            raise EngineError(f"its hook `restored`, POST {what}, is {status}")


def _signal(running: Running, name: str) -> None:
    """To its first process: through a descriptor, so that nothing else can get it."""
    if running.driver.capabilities.own_stack:
        raise Unsupported("a signal does not reach its program: use a hook that is asked by HTTP")
    descriptor = os.pidfd_open(running.instance.pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.Signals[f"SIG{name}"])
    finally:
        os.close(descriptor)


async def _post(running: Running, path: str) -> str:
    """What came of it, as a sentence's end."""
    address = running.instance.address
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(address, running.record.app.port)
    try:
        writer.write(request.encode())
        status = _STATUS.match(await reader.readexactly(_STATUS_BYTES))
    finally:
        writer.close()
    return f"answered {status[1].decode()}" if status else "answered by no HTTP"
