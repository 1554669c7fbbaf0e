"""Work that is for one client only ends when that client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from tabane.errors import Closed
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from fastapi import Request

T = TypeVar("T")
LEFT = "the client left before the end"


class BodyReader:
    """A request's body, which one reader has; `has_ended` once it was read to its end."""

    def __init__(self, request: Request) -> None:
        self.has_ended = asyncio.Event()
        self._blocks = request.stream()

    async def blocks(self) -> AsyncIterator[bytes]:
        """What is left of it. Raises `Closed` when the client leaves."""
        from starlette.requests import ClientDisconnect

        try:
            async for block in self._blocks:
                yield block
        except ClientDisconnect:
            raise Closed(LEFT) from None
        self.has_ended.set()


async def while_there(
    request: Request, work: Coroutine[Any, Any, T], body: BodyReader | None = None
) -> T:
    """What `work` returns; it is cancelled when the client leaves (`Closed`). `body`: its reader,
    if `work` reads it; the client is watched once that is done."""
    async with Supervisor("request", on_failure=lambda *_: None) as tasks:
        done = tasks.start("work", work)
        left = tasks.start("client", _wait_left(request, body))
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Closed(LEFT)
        result: T = done.result()
        return result


async def _wait_left(request: Request, body: BodyReader | None) -> None:
    if body is not None:
        await body.has_ended.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass
