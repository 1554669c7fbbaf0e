"""Work that nobody may get ahead of: who is cancelled waits for its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar, TypeVarTuple

Result = TypeVar("Result")
Given = TypeVarTuple("Given")


async def to_thread(work: Callable[[*Given], Result], *given: *Given) -> Result:
    """As `asyncio.to_thread`; when it ends, the thread's work has ended, too."""
    running = asyncio.get_running_loop().run_in_executor(None, partial(work, *given))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def to_its_end(work: asyncio.Task[Result]) -> Result:
    """What it gives. To break it off may do harm: who is cancelled waits for it, too."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
