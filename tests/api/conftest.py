"""The API over an agent of straw, asked without a socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tabane.api.app import build_app
from tabane.clock import SYSTEM
from tabane.k2i import K2i, ProcessTable
from tabane.model import NodeName

TOKEN = "secret"
HEADERS = [(b"host", b"tabane"), (b"authorization", f"Bearer {TOKEN}".encode())]


class Answered(NamedTuple):
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """`agent` has what every route needs, and what a test gives it."""

    def __init__(self, table: ProcessTable, cluster_k2i: Any = None) -> None:
        self.agent: Any = SimpleNamespace(
            token=TOKEN,
            table=table,
            k2i=K2i(table, node="tokyo/tokyo-1", incarnation="first"),
            cluster_k2i=cluster_k2i,
            orders=None,
            config=SimpleNamespace(
                key=NodeName("tokyo/tokyo-1"),
                node=SimpleNamespace(address="10.0.0.1"),
                paths=SimpleNamespace(instance_logs=Path("/nowhere")),
            ),
            clock=SYSTEM,
            executor=SimpleNamespace(get=None, instances=lambda: [SimpleNamespace(id="abc")]),
        )
        self.app = build_app(self.agent)
        self._gone = asyncio.Event()

    def leave(self) -> None:
        """The client goes, once its request was read."""
        self._gone.set()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        raw: bytes = b"",
        *,
        more: bool = False,
        media_type: str = "application/json",
        accept: str = "*/*",
    ) -> Answered:
        """One request; `body` as JSON, or `raw` as it is, `more` of it to come. `path` is what
        stands on the line."""
        from urllib.parse import unquote

        data = json.dumps(body).encode() if body is not None else raw
        target, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(target),
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [
                *HEADERS,
                (b"content-type", media_type.encode()),
                (b"accept", accept.encode()),
            ],
            "state": {},
        }
        sent = [{"type": "http.request", "body": data, "more_body": more}]
        heard: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            heard.append(message)

        await self.app(scope, receive, send)  # type: ignore[arg-type]
        return Answered(heard[0]["status"], b"".join(m.get("body", b"") for m in heard[1:]))


@pytest.fixture
def api() -> Any:
    table = ProcessTable(NodeName("tokyo/tokyo-1"))
    api = Api(table)
    yield api
    api.agent.k2i.close()
    table.close()
