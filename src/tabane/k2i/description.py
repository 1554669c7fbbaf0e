"""What `/openapi.json` says of k2i's routes, made from what requests are read by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI

from tabane.k2i.kinds import KINDS, MORE, MSGPACK, Kind
from tabane.k2i.orders import InstanceOutcome, Outcome
from tabane.k2i.query import SCOPE, Parameter, Schema
from tabane.k2i.stream import Changes

REF = "#/components/schemas/{name}"
ERROR: Schema = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {
        "error": {"type": "string", "description": "A stable word."},
        "message": {"type": "string", "description": "One sentence."},
    },
}
STATUSES = {
    400: "The request is wrong; the sentence says what of it.",
    401: "Nobody said who is asking, or not well enough.",
    403: "Who asks may not.",
    429: "Too many ask at this time.",
    504: "The machine did not answer in time.",
}
ORDER_STATUSES = STATUSES | {
    404: "There is no such process, instance or node.",
    409: "It changed meanwhile, or the key was used for another order.",
    410: "The one that was meant is gone, and another has its name.",
    413: "The body has more than 1 MiB.",
    422: "This driver or this machine cannot do that.",
    503: "Its node cannot be reached; whether it was done is in the sentence.",
}


def describe_parameters(
    parameters: Mapping[str, Parameter], row: type[msgspec.Struct]
) -> list[dict[str, Any]]:
    """As OpenAPI has them; lists have commas between their values."""
    scope = "This node alone, or all nodes of its cluster."
    described = [{"name": "scope", "in": "query", "description": scope, "schema": SCOPE}]
    for name, parameter in parameters.items():
        schema = parameter.schema(row) if callable(parameter.schema) else parameter.schema
        entry: dict[str, Any] = {
            "name": name,
            "in": "query",
            "description": parameter.meaning,
            "required": parameter.required,
            "schema": schema,
        }
        if schema["type"] == "array":
            entry |= {"style": "form", "explode": False}
        described.append(entry)
    return described


def describe_responses(name: str, kind: Kind) -> dict[int | str, dict[str, Any]]:
    """By status, for `add_api_route`."""
    if kind.media == MSGPACK:
        whole: Schema = {"type": "string", "format": "binary"}
    else:
        key = name.partition("/")[0]
        rows = {"type": "array", "items": {"$ref": REF.format(name=kind.row.__name__)}}
        whole = _object({key: rows, **_REST})
    found = {"description": kind.meaning, "content": {kind.media: {"schema": whole}}}
    return {200: found, **ERRORS}


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT: Schema = {"type": "string"}
_NODE = _object({"node": _TEXT, "incarnation": _TEXT, "age_s": {"type": "number"}})
_REST: dict[str, Schema] = {
    "nodes": {
        "type": "array",
        "items": _NODE,
        "description": "Who answered, and how many seconds old it is at most.",
    },
    "silent": {"type": "array", "items": _TEXT, "description": "Nodes that did not answer."},
    "at": {"type": "number", "description": "Seconds since the epoch, by who answers; for people."},
}


def _errors(statuses: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in statuses.items()
    }


ERRORS = _errors(STATUSES)


def describe_order(answer: type[msgspec.Struct], key: str = "") -> dict[int | str, dict[str, Any]]:
    """By status, of a route that changes something and answers with that, or with a list of them
    at `key`."""
    schema: Schema = {"$ref": REF.format(name=answer.__name__)}
    if key:
        schema = _object({key: {"type": "array", "items": schema}})
    done = {
        "description": "What became of it.",
        "content": {"application/json": {"schema": schema}},
    }
    return {200: done, **_errors(ORDER_STATUSES)}


def add_schemas(app: FastAPI) -> None:
    """Have the app's description say what rows look like. Of those that can be cut to some fields,
    none is sure to be there."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(_row_schemas())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _row_schemas() -> dict[str, Schema]:
    rows = {kind.row for kind in KINDS.values() if kind.media != MSGPACK}
    rows.update(MORE.values())
    whole = {Changes, Outcome, InstanceOutcome}
    _, components = msgspec.json.schema_components(rows | whole, ref_template=REF)
    for row in rows:
        components[row.__name__].pop("required", None)
    return components
