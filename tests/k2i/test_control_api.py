"""The routes that change something: what they take, and what they say."""

import json
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from tabane.errors import Stale, TabaneError
from tabane.k2i import orders
from tabane.k2i.control_api import build_control_router
from tabane.k2i.orders import (
    MAX_PID,
    MAX_TARGETS,
    Action,
    Affinity,
    Confine,
    Gpid,
    InstanceOrder,
    InstanceOutcome,
    InstanceTarget,
    Limit,
    Limits,
    Nice,
    Order,
    Outcome,
    Signal,
)
from tabane.model import Generation, InstanceId, NodeName
from tabane.security.identity import Principal

ALICE = Principal("peer", 5001, 5001, 42)
LIFE = {"dc": "tokyo", "node": "tokyo-1", "incarnation": "i", "start_ticks": 100}
TARGET = Gpid("tokyo", "tokyo-1", "i", 7, 100)
INSTANCE = {"dc": "tokyo", "node": "tokyo-1", "incarnation": "i", "counter": 3}


class Obeyed:
    """Remembers orders; answers as told."""

    def __init__(self) -> None:
        self.orders: list[Order | InstanceOrder] = []
        self.who: list[Principal] = []
        self.outcomes: tuple[Outcome, ...] = (Outcome(TARGET, before=0, after=5),)

    async def obey(self, order: Order, who: Principal) -> tuple[Outcome, ...]:
        self.orders.append(order)
        self.who.append(who)
        return self.outcomes

    async def obey_instance(self, order: InstanceOrder, who: Principal) -> InstanceOutcome:
        self.orders.append(order)
        self.who.append(who)
        return InstanceOutcome(order.target, {"cpu": 1.0}, {"cpu": 0.5})


class Answered(NamedTuple):
    status: int
    body: Any


class Api:
    def __init__(self) -> None:
        self.obeyed = Obeyed()
        self.app = FastAPI()
        self.app.include_router(build_control_router(self.obeyed))
        self.app.add_exception_handler(TabaneError, _on_error)
        self.app.add_exception_handler(RequestValidationError, _on_invalid)

    async def post(self, path: str, body: Any) -> Answered:
        return await self.post_text(path, json.dumps(body))

    async def post_text(
        self, path: str, text: str, media_type: str = "application/json"
    ) -> Answered:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"tabane"), (b"content-type", media_type.encode())],
            "state": {"principal": ALICE},
        }
        heard: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": text.encode()}

        async def send(message: Any) -> None:
            heard.append(message)

        await self.app(scope, receive, send)
        data = b"".join(message.get("body", b"") for message in heard[1:])
        return Answered(heard[0]["status"], json.loads(data))


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TabaneError)
    return JSONResponse({"error": error.code, "message": error.message}, 410)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse([str(part) for part in error.errors()[0]["loc"]], 400)


@pytest.fixture
def api() -> Api:
    return Api()


VERBS: list[tuple[str, dict[str, Any], Action]] = [
    ("signal", {"signal": 15}, Signal(15)),
    ("signal", {"signal": "TERM"}, Signal(15)),
    ("signal", {"signal": "SIGRTMIN+1"}, Signal(35)),
    ("nice", {"nice": 5}, Nice(5)),
    ("nice", {"nice": -5, "relative": True}, Nice(-5, relative=True)),
    ("affinity", {"cpus": [0, 1]}, Affinity((0, 1))),
    ("limits", {"limits": {"core": {"soft": 0}}}, Limits({"core": Limit(0)})),
    ("limits", {"limits": {"core": {"hard": -1}}}, Limits({"core": Limit(None, -1)})),
    ("pause", {}, orders.Pause()),
    ("resume", {}, orders.Resume()),
]


@pytest.mark.parametrize(("verb", "args", "action"), VERBS)
async def test_orders_to_one(api: Api, verb: str, args: dict[str, Any], action: Action) -> None:
    answered = await api.post(f"/v2/processes/7/{verb}", {**LIFE, **args})
    target = {"pid": 7, **LIFE}
    assert answered == (200, {"target": target, "before": 0, "after": 5})
    assert api.obeyed.orders == [Order((TARGET,), action)]
    assert api.obeyed.who == [ALICE]


@pytest.mark.parametrize(("verb", "args", "action"), VERBS)
async def test_orders_to_many(api: Api, verb: str, args: dict[str, Any], action: Action) -> None:
    api.obeyed.outcomes = (Outcome(TARGET), Outcome(TARGET, "stale", "gone"))
    how = {"dry_run": True, "force": True, "idempotency_key": "k"}
    targets = [{**LIFE, "pid": 7}, {**LIFE, "pid": 8}]
    answered = await api.post(f"/v2/processes/{verb}", {"targets": targets, **args, **how})
    assert answered.status == 200
    assert [outcome.get("error") for outcome in answered.body["outcomes"]] == [None, "stale"]
    (order,) = api.obeyed.orders
    other = Gpid("tokyo", "tokyo-1", "i", 8, 100)
    assert order == Order((TARGET, other), action, dry_run=True, force=True, key="k")


async def test_an_error_of_the_only_one_is_the_answers(api: Api) -> None:
    api.obeyed.outcomes = (Outcome(TARGET, "stale", "it is gone"),)
    answered = await api.post("/v2/processes/7/signal", {**LIFE, "signal": 9})
    assert answered == (410, {"error": Stale.code, "message": "it is gone"})


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"dryrun": True}, "dryrun"),
        ({"dry_run": "yes"}, "dry_run"),
        ({"dry_run": 1}, "dry_run"),
        ({"start_ticks": None}, "start_ticks"),
        ({"start_ticks": 0}, "start_ticks"),
        ({"start_ticks": "100"}, "start_ticks"),
        ({"start_ticks": 1 << 63}, "start_ticks"),
        ({"incarnation": ""}, "incarnation"),
        ({"incarnation": None}, "incarnation"),
        ({"node": "x" * 65}, "node"),
        ({"signal": None}, "signal"),
        ({"signal": 1.5}, "signal"),
        ({"signal": True}, "signal"),
        ({"signal": []}, "signal"),
        ({"idempotency_key": "k" * 129}, "idempotency_key"),
        ({"idempotency_key": 5}, "idempotency_key"),
        ({"pid": 7}, "pid"),
    ],
)
async def test_bodies_are_strict(api: Api, change: dict[str, Any], where: str) -> None:
    body = {
        key: value for key, value in {**LIFE, "signal": 9, **change}.items() if value is not None
    }
    status, location = await api.post("/v2/processes/7/signal", body)
    assert status == 400
    assert where in location
    assert api.obeyed.orders == []


@pytest.mark.parametrize("signal", ["", "TERMINATE", "-9", 65, -1])
async def test_what_is_no_signal_is_said(api: Api, signal: Any) -> None:
    answered = await api.post("/v2/processes/7/signal", {**LIFE, "signal": signal})
    assert answered.body["error"] == "usage"
    assert "is no signal: write its name or number" in answered.body["message"]
    assert api.obeyed.orders == []


@pytest.mark.parametrize("pid", ["0", "-1", "4194305", "x", "1.0", "7 ", "1_0"])
async def test_pids_are_numbers(api: Api, pid: str) -> None:
    answered = await api.post(f"/v2/processes/{pid}/signal", {**LIFE, "signal": 9})
    assert answered.body["error"] == "usage"
    assert "is no process" in answered.body["message"]
    assert api.obeyed.orders == []


@pytest.mark.parametrize("targets", [[], [{"pid": 7}], [{**LIFE, "pid": 7}] * 1025, None, {}])
async def test_targets_are_one_to_many(api: Api, targets: Any) -> None:
    answered = await api.post("/v2/processes/signal", {"targets": targets, "signal": 9})
    assert answered.status == 400
    assert api.obeyed.orders == []


@pytest.mark.parametrize(
    ("verb", "args", "action"),
    [
        ("pause", {}, orders.Pause()),
        ("resume", {}, orders.Resume()),
        ("limits", {"cpu": 0.5, "pids": 10}, Confine(cpu=0.5, pids=10)),
        ("limits", {"cpu": 2, "memory_bytes": 1 << 20}, Confine(2.0, 1 << 20)),
    ],
)
async def test_orders_to_instances(
    api: Api, verb: str, args: dict[str, Any], action: orders.InstanceAction
) -> None:
    body = {**INSTANCE, **args, "dry_run": True, "idempotency_key": "k"}
    answered = await api.post(f"/v2/instances/abc123/{verb}", body)
    generation = Generation("i", InstanceId("abc123"), 3)
    target = InstanceTarget(NodeName("tokyo/tokyo-1"), generation)
    assert api.obeyed.orders == [InstanceOrder(target, action, dry_run=True, key="k")]
    assert answered.status == 200
    assert (answered.body["before"], answered.body["after"]) == ({"cpu": 1.0}, {"cpu": 0.5})


@pytest.mark.parametrize(
    "change", [{"cpu": 0}, {"cpu": "1"}, {"pids": 0}, {"memory": 5}, {"counter": -1}]
)
async def test_bodies_of_instances_are_strict(api: Api, change: dict[str, Any]) -> None:
    answered = await api.post("/v2/instances/abc123/limits", {**INSTANCE, "pids": 5, **change})
    assert answered.status == 400
    assert api.obeyed.orders == []


def test_the_description_tells_bodies_apart(api: Api) -> None:
    described = api.app.openapi()
    assert set(described["paths"]) >= {"/v2/processes/signal", "/v2/processes/{pid}/nice"}
    schemas = described["components"]["schemas"]
    assert {"signal", "start_ticks", "incarnation"} <= schemas["SignalOne"]["properties"].keys()
    assert {"targets", "cpus"} <= schemas["AffinityMany"]["properties"].keys()
    assert schemas["SignalOne"]["additionalProperties"] is False


@pytest.mark.parametrize(
    "text",
    [
        '{"dry_run": true, "signal": 9, "dry_run": false, REST}',
        '{"signal": 0, "signal": 9, REST}',
        '{"signal": 9, "start_ticks": 100, REST}',
        '{"signal": 9, REST, "idempotency_key": NaN}',
        '{"signal": ' + "[" * 100_000 + "}",
    ],
)
async def test_json_that_parsers_read_differently(api: Api, text: str) -> None:
    answered = await api.post_text(
        "/v2/processes/7/signal", text.replace("REST", json.dumps(LIFE)[1:-1])
    )
    assert answered.status == 400
    assert api.obeyed.orders == []


@pytest.mark.parametrize(
    "media_type", ["application/x-www-form-urlencoded", "text/plain", "", "multipart/form-data"]
)
async def test_a_body_is_json_whatever_it_is_called(api: Api, media_type: str) -> None:
    """As `curl -d` sends it."""
    text = json.dumps({**LIFE, "nice": 5})
    answered = await api.post_text("/v2/processes/7/nice", text, media_type)
    assert answered.status == 200
    assert api.obeyed.orders == [Order((TARGET,), Nice(5))]
    assert (await api.post_text("/v2/processes/7/nice", "nice=5", media_type)).status == 400


async def test_a_name_that_stands_twice_is_named(api: Api) -> None:
    twice = '{"signal": 9, "targets": [{"pid": 7, "pid": 8}]}'
    answered = await api.post_text("/v2/processes/signal", twice)
    assert answered == (400, {"detail": "'pid' stands twice in its body"})


async def test_a_body_that_is_too_large(api: Api) -> None:
    answered = await api.post("/v2/processes/7/pause", {**LIFE, "dc": "x" * (1 << 20)})
    assert answered == (413, {"detail": "its body has more than 1048576 bytes"})
    assert api.obeyed.orders == []


async def test_the_largest_order_fits(api: Api) -> None:
    longest = {"dc": "d" * 64, "node": "n" * 64, "incarnation": "i" * 64}
    targets = [{**longest, "pid": MAX_PID, "start_ticks": (1 << 63) - 1}] * MAX_TARGETS
    api.obeyed.outcomes = ()
    body = {"targets": targets, "signal": "RTMIN+30", "idempotency_key": "k" * 128}
    answered = await api.post_text("/v2/processes/signal", json.dumps(body, indent=4))
    assert answered.status == 200
