"""`/metrics`, read by Prometheus's own parsers."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from tabane.api import metrics
from tabane.gateway.limits import HttpCounters, TcpCounters
from tabane.model import Class, State
from tabane.node import messages as say
from tabane.node.meters import Histogram
from tabane.node.pressure import Memory

OPEN = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def node(api: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node of straw: two instances, a wake, and a gateway of the two that there should be."""
    cold = Histogram()
    cold.add(0.018)
    meters = SimpleNamespace(
        wakes={("container", "cold"): cold},
        phases={("container", "cold", "engine"): cold},
        states=Counter({State.READY: 4}),
        part_ends=Counter({"hub": 1}),
    )
    http = HttpCounters(requests=7, active=1)
    http.responses[5] += 2
    counted = say.Counted({"clients": http}, TcpCounters(sessions=3, received_bytes=9))

    async def ask_gateways(agent: Any) -> dict[str, say.Counted | None]:
        return {"gateway-0": counted, "gateway-1": None}

    monkeypatch.setattr(metrics, "ask_gateways", ask_gateways)
    instance = SimpleNamespace(isolation=Class.CONTAINER, driver="crun", state=State.READY)
    room = SimpleNamespace(used_bytes=10, limit_bytes=100)
    admission = SimpleNamespace(waiting=7, under_way=3, capacity=SimpleNamespace(limit=4))
    vars(api.agent).update(
        meters=meters,
        home=SimpleNamespace(
            apps=lambda: ["a/b", "a/c"],
            ledger=lambda app: SimpleNamespace(total_waiting=lambda: 5) if app == "a/b" else None,
        ),
        executor=SimpleNamespace(instances=lambda: [instance, instance], admission=admission),
        all_apps=lambda: [1, 2, 3],
        nodes=SimpleNamespace(live_nodes=lambda: ["tokyo/tokyo-1"]),
        pressure=SimpleNamespace(memory=lambda: Memory(1000 << 20, 300 << 20)),
        checkpoints=SimpleNamespace(store=SimpleNamespace(room=room)),
    )
    return api


@pytest.mark.parametrize(("parse", "accept"), [(parse_plain, "*/*"), (parse_open, OPEN)])
async def test_parsers_find_every_figure(node: Any, parse: Any, accept: str) -> None:
    answer = await node.ask("GET", "/metrics", accept=accept)
    assert answer.status == 200
    families = [*parse(answer.body.decode())]
    assert all(family.documentation and family.samples for family in families)
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }
    expected: dict[tuple[str, ...], float] = {
        ("tabane_wake_seconds_bucket", "container", "cold", "0.01"): 0,
        ("tabane_wake_seconds_bucket", "container", "cold", "0.02"): 1,
        ("tabane_wake_seconds_bucket", "container", "cold", "+Inf"): 1,
        ("tabane_wake_seconds_sum", "container", "cold"): 0.018,
        ("tabane_wake_phase_seconds_count", "container", "cold", "engine"): 1,
        ("tabane_instances", "container", "crun", "ready"): 2,
        ("tabane_instance_states_total", "ready"): 4,
        ("tabane_part_ends_total", "hub"): 1,
        ("tabane_sessions_waiting",): 5,
        ("tabane_apps",): 3,
        ("tabane_nodes_live",): 1,
        ("tabane_starts", "waiting"): 7,
        ("tabane_starts", "under_way"): 3,
        ("tabane_starts", "limit"): 4,
        ("tabane_memory_bytes", "total"): 1000 << 20,
        ("tabane_memory_bytes", "available"): 300 << 20,
        ("tabane_memory_bytes", "kept_free"): 64 << 20,
        ("tabane_checkpoint_bytes", "used"): 10,
        ("tabane_gateway_up", "gateway-0"): 1,
        ("tabane_gateway_up", "gateway-1"): 0,
        ("tabane_http_requests_total", "gateway-0", "clients"): 7,
        ("tabane_http_responses_total", "gateway-0", "clients", "5xx"): 2,
        ("tabane_http_active", "gateway-0", "clients"): 1,
        ("tabane_tcp_sessions_total", "gateway-0"): 3,
        ("tabane_tcp_received_bytes_total", "gateway-0"): 9,
    }
    ordered = {(name, *sorted(labels)): value for (name, *labels), value in expected.items()}
    assert ordered.items() <= found.items()
