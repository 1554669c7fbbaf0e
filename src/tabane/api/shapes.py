"""What requests and answers of the control API have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from tabane.security.identity import Principal

if TYPE_CHECKING:
    from fastapi import Request


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


B = TypeVar("B", bound=Body)


class Json(Response):
    """A body that msgspec has encoded, or is to encode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


def parse_body(kind: type[B], data: bytes) -> B:
    """JSON that stands elsewhere than in a body of its own. Raises as the framework does."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def who_asks(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal
