"""`/metrics`: a node's figures for Prometheus and its kin, in the format that is asked for.

They are the node's own: scrape every node, and add up there. Labels are few on purpose: none is an
app's name, as there may be ten thousand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from tabane.node.meters import BOUNDS_S, Histogram, ask_gateways
from tabane.scheduler.pressure import kept_bytes

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from tabane.node.agent import Agent
    from tabane.node.messages import Counted

Labels = tuple[str, ...]
Values = Mapping[Any, int]
"""By the values of the labels, in their order."""


def build_metrics(agent: Agent) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """In the exposition format of Prometheus or OpenMetrics, as `Accept` says."""
        from prometheus_client.exposition import choose_encoder

        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        families = [*_agent_families(agent), *_gateway_families(await ask_gateways(agent))]
        return Response(encode(_registry(families)), media_type=media_type)

    return router


def _registry(families: list[Metric]) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry

    class Collected:
        def collect(self) -> Iterable[Metric]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected())
    return registry


def _agent_families(agent: Agent) -> Iterator[Metric]:
    meters, home = agent.meters, agent.home
    yield _histogram(
        "tabane_wake_seconds",
        "From a session without a free slot to the first byte of its answer.",
        ("class", "option"),
        meters.wakes,
    )
    yield _histogram(
        "tabane_wake_phase_seconds",
        "The same by phase.",
        ("class", "option", "phase"),
        meters.phases,
    )
    instances = Counter(
        (str(one.isolation), one.driver, str(one.state)) for one in agent.executor.instances()
    )
    labels = "class", "driver", "state"
    yield _gauge("tabane_instances", "Instances on this node.", labels, instances)
    entered = {(str(state),): count for state, count in meters.states.items()}
    yield _counter("tabane_instance_states", "Instances that entered a state.", ("state",), entered)
    ends = {(part,): count for part, count in meters.part_ends.items()}
    yield _counter("tabane_part_ends", "Ends of the node's own processes.", ("part",), ends)
    ledgers = [ledger for app in home.apps() if (ledger := home.ledger(app)) is not None]
    waiting = sum(ledger.total_waiting() for ledger in ledgers)
    yield _gauge(
        "tabane_sessions_waiting",
        "Sessions that wait for apps whose home is here.",
        (),
        {(): waiting},
    )
    yield _gauge(
        "tabane_apps", "Deployed apps that this node knows.", (), {(): len(agent.all_apps())}
    )
    admission = agent.executor.admission
    starts = {
        ("waiting",): admission.waiting,
        ("under_way",): admission.under_way,
        ("limit",): admission.capacity.limit,
    }
    yield _gauge("tabane_starts", "Starts of instances, by their turns.", ("what",), starts)
    live = len(agent.nodes.live_nodes())
    yield _gauge("tabane_nodes_live", "Nodes that this one sees, itself included.", (), {(): live})
    memory = agent.pressure.memory()
    of_memory = {
        ("total",): memory.capacity_bytes,
        ("available",): memory.available_bytes,
        ("kept_free",): kept_bytes(memory.capacity_bytes),
    }
    yield _gauge("tabane_memory_bytes", "Memory for instances.", ("what",), of_memory)
    store = agent.checkpoints.store
    room = {("used",): store.room.used_bytes, ("limit",): store.room.limit_bytes}
    yield _gauge("tabane_checkpoint_bytes", "Disk of saved instances.", ("what",), room)


HTTP_COUNTERS = {
    "requests": "Requests.",
    "received_bytes": "Bytes from clients.",
    "sent_bytes": "Bytes to clients.",
    "retries": "Requests that were tried at another instance.",
    "refused_connections": "Connections beyond the limit.",
    "aborted": "Sessions that ended without a whole response.",
}
TCP_COUNTERS = {
    "sessions": "Sessions of TCP apps.",
    "refused": "Sessions that got no instance.",
    "received_bytes": "Bytes from clients, of sessions that have ended.",
    "sent_bytes": "Bytes to clients, of sessions that have ended.",
}


def _gateway_families(told: dict[str, Counted | None]) -> Iterator[Metric]:
    """`side`: whom it serves, `clients` or other `gateways`."""
    up = {(name,): int(counted is not None) for name, counted in told.items()}
    yield _gauge("tabane_gateway_up", "1: the gateway answers.", ("gateway",), up)
    counted = {name: each for name, each in told.items() if each is not None}
    http = {(name, side): c for name, each in counted.items() for side, c in each.http.items()}
    tcp = {(name,): each.tcp for name, each in counted.items()}
    of_http: Labels = ("gateway", "side")
    of_tcp: Labels = ("gateway",)
    for field, help_text in HTTP_COUNTERS.items():
        values = {labels: getattr(counters, field) for labels, counters in http.items()}
        yield _counter(f"tabane_http_{field}", help_text, of_http, values)
    responses = {
        (*labels, f"{kind}xx"): count
        for labels, counters in http.items()
        for kind, count in counters.responses.items()
    }
    yield _counter(
        "tabane_http_responses",
        "Responses by class of status, the gateway's own included.",
        (*of_http, "code"),
        responses,
    )
    active = {labels: counters.active for labels, counters in http.items()}
    yield _gauge("tabane_http_active", "Requests that are being answered.", of_http, active)
    for field, help_text in TCP_COUNTERS.items():
        sums = {name: getattr(counters, field) for name, counters in tcp.items()}
        yield _counter(f"tabane_tcp_{field}", help_text, of_tcp, sums)
    open_now = {name: counters.active for name, counters in tcp.items()}
    yield _gauge("tabane_tcp_active", "Sessions that are connected to an app.", of_tcp, open_now)


def _gauge(name: str, help_text: str, labels: Labels, values: Values) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, help_text, labels=labels), values)


def _counter(name: str, help_text: str, labels: Labels, values: Values) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, help_text, labels=labels), values)


def _filled(family: Any, values: Values) -> Metric:
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family  # type: ignore[no-any-return]


def _histogram(
    name: str, help_text: str, labels: Labels, values: Mapping[Any, Histogram]
) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, help_text, labels=labels)
    edges = [*map(str, BOUNDS_S), "+Inf"]
    for key, histogram in sorted(values.items()):
        buckets = [*zip(edges, accumulate(histogram.counts), strict=True)]
        family.add_metric(key, buckets, histogram.total_s)
    return family
