"""What bodies of requests may be like, for routes that change something: JSON, whatever their
headers say, since `curl -d` calls everything a form (no browser comes that far: its Origin is
refused before).

Those of orders are small, too, and every name stands once in them. Parsers differ in which of two
they take, and the other may be a dry run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from tabane.units import shorten

if TYPE_CHECKING:
    from starlette.types import Scope

MAX_BODY_BYTES = 1 << 20
"""The largest order there can be has a third of that."""


class StrictRequest(Request):
    """See the module's text. The framework answers with these errors as with its own."""

    async def body(self) -> bytes:
        """Raises `HTTPException` (413) for one that is too large, as soon as it is."""
        if not hasattr(self, "_body"):
            data = bytearray()
            async for block in self.stream():
                data += block
                if len(data) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"its body has more than {MAX_BODY_BYTES} bytes")
            self._body = bytes(data)
        return self._body

    async def json(self) -> Any:
        """Raises `HTTPException` (400), and `json.JSONDecodeError` as the framework expects."""
        try:
            return json.loads(
                await self.body(), object_pairs_hook=_unique, parse_constant=_refuse_constant
            )
        except RecursionError:
            raise HTTPException(400, "its body is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HTTPException(400, f"{shorten(name)} stands twice in its body")
        found[name] = value
    return found


def _refuse_constant(word: str) -> None:
    raise HTTPException(400, f"{word} is no JSON")


def as_json(scope: Scope) -> Scope:
    """A request whose body is said to be JSON."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


class JsonRoute(APIRoute):
    """A route that takes its body for JSON."""

    kind_of_request: ClassVar[type[Request]] = Request

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(self.kind_of_request(as_json(request.scope), request.receive))

        return handle_json


class StrictRoute(JsonRoute):
    """And reads it as an order."""

    kind_of_request = StrictRequest
