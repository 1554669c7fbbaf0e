"""Commands of the node's own in an instance: its app's collectors and checks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tabane.errors import NotFound
from tabane.k2i.collectors.command import judge, last_words, take
from tabane.runtimes.api import Execution, Handle

if TYPE_CHECKING:
    from tabane.node.running import Running


async def run_inside(running: Running, argv: tuple[str, ...]) -> bytes:
    """A command's stdout. Raises `EngineError`, `ProtocolError` when it writes too much. The caller
    sets the deadline; it is ended when this is cancelled."""
    talk = await running.driver.exec(handle_of(running), Execution(argv))
    try:
        words = last_words(talk.stderr.read) if talk.stderr is not None else _nothing()
        output, said = await asyncio.gather(take(talk.stdout.read), words)
        return judge(argv, await talk.wait(), output, said)
    finally:
        await talk.aclose()


async def _nothing() -> str:
    return ""


def handle_of(running: Running) -> Handle:
    handle = running.record.handle
    if handle is None or not handle.data.get("pid"):
        raise NotFound(f"{running.instance.id} is only being started")
    return handle
