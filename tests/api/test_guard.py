"""What the guard lets through for whom."""

import json
import os
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.api.guard import Guard, read_headers
from tabane.errors import Denied
from tabane.security.identity import Principal, check_origin, encode_principal

USER = Principal("peer", 54321, 54321, 42)
ROOT = Principal("peer", os.geteuid(), os.getegid(), 42)


async def ask(path: str, who: Principal | None, **headers: str) -> tuple[int, Any]:
    """The status, and who the app behind was told asks."""
    admitted: list[Principal] = []
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        admitted.append(scope["state"]["principal"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        heard.append(message)

    named = {"host": "tabane", **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "state": {} if who is None else {"peer": who},
    }
    guard: Any = Guard(app, "secret", frozenset())  # type: ignore[arg-type]
    await guard(scope, None, send)
    status = heard[0]["status"]
    return status, admitted[0] if admitted else json.loads(heard[1]["body"])["error"]


@pytest.mark.parametrize("path", ["/v2/processes", "/v2/processes/signal", "/v2/instances/a/pause"])
async def test_every_user_may_ask_k2i(path: str) -> None:
    assert await ask(path, USER) == (200, USER)
    assert await ask(path, ROOT) == (200, ROOT)


@pytest.mark.parametrize("path", ["/api/v1/apps", "/v1/proc", "/v2", "/v20/x", "/", "//v2/x"])
async def test_all_else_is_for_root(path: str) -> None:
    assert await ask(path, USER) == (403, "denied")
    assert await ask(path, ROOT) == (200, ROOT)


@pytest.mark.parametrize(("method", "verb"), [("GET", "see"), ("POST", "change")])
async def test_who_may_not_is_told_what_for_whom(method: str, verb: str) -> None:
    heard: list[Any] = []

    async def send(message: Any) -> None:
        heard.append(message)

    headers = [(b"host", b"tabane")]
    scope = {"type": "http", "method": method, "path": "/api/v1/apps", "headers": headers}
    guard: Any = Guard(None, "secret", frozenset())  # type: ignore[arg-type]
    await guard(scope | {"state": {"peer": USER}}, None, send)
    message = json.loads(heard[1]["body"])["message"]
    assert message.startswith(f"uid 54321 may not {verb} this, which is for root: use sudo")


async def test_nobody_asks_without_a_name() -> None:
    for path in ("/v2/processes", "/v1/proc"):  # the latter is for all at a k2i of its own
        assert await ask(path, None) == (401, "unauthenticated")
    token = "Bearer secret"
    assert await ask("/v2/processes", None, authorization=token) == (200, Principal("token"))
    foreign = {"host": "evil.example"}
    assert await ask("/v2/processes", USER, **foreign) == (403, "denied")
    assert await ask("/v2/processes", USER, origin="http://evil.example") == (403, "denied")


async def test_what_a_node_passes_on_is_asked_by_who_asked_there() -> None:
    passed_on = {"authorization": "Bearer secret", "tabane-via": "tokyo/tokyo-1"}
    path = "/api/v1/instances/a/exec"
    for who in (USER, ROOT, Principal("token")):
        words = {**passed_on, "tabane-for": encode_principal(who)}
        assert await ask(path, None, **words) == (200, replace(who, via="tokyo/tokyo-1"))
    for said in ("", "root", "peer 0 0", "peer 0 0 1 x", "anybody 0 0 1"):
        assert await ask(path, None, **passed_on, **{"tabane-for": said}) == (403, "denied")


async def test_only_who_has_the_token_speaks_for_others() -> None:
    words = {"tabane-via": "tokyo/tokyo-1", "tabane-for": "peer 0 0 1"}
    assert await ask("/v2/x", None, **words) == (401, "unauthenticated")
    assert await ask("/v2/x", USER, **words) == (200, USER)


@pytest.mark.parametrize(
    "hosts",
    [
        (b"evil.example", b"tabane"),
        (b"tabane", b"evil.example"),
        (b"tabane:80", b"evil.example"),
        (b"[::1]", b"evil.example"),
        (b"[::1]evil.example",),
        (b"tabane:80:80",),
    ],
)
def test_no_host_hides_behind_another(hosts: tuple[bytes, ...]) -> None:
    headers = read_headers({"headers": [(b"host", host) for host in hosts]})
    with pytest.raises(Denied):
        check_origin(headers, frozenset({"tabane", "::1"}))


@pytest.mark.parametrize("host", ["tabane", "TABANE:7070", "[::1]", "[::1]:80", "tabane:"])
def test_hosts_with_and_without_ports(host: str) -> None:
    check_origin({"host": host, "origin": f"http://{host}"}, frozenset({"tabane", "::1"}))
