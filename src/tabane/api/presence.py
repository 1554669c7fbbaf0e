"""A request's body, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tabane.errors import Closed

if TYPE_CHECKING:
    from fastapi import Request

LEFT = "the client left before the end"


class BodyReader:
    """A request's body, which one reader has; `has_ended` once it was read to its end."""

    def __init__(self, request: Request) -> None:
        self.has_ended = asyncio.Event()
        self._request = request
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

    async def wait_left(self) -> None:
        """Once the body has ended: wait until the client leaves, and raise `Closed`."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        raise Closed(LEFT)
