"""A gateway's table of all apps: some hundred bytes each, however many there are.

An app is kept packed, with its host names and ports beside it. It is unpacked when a session comes
for it, and kept so as long as it is among the last `WARM` of which that was so.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

import msgspec

from tabane.gateway.api import Route, TcpRoute
from tabane.model import App, AppName, Class, app_of_cohort

WARM = 512
"""Apps, host names, and ports, of which what sessions need is at hand."""
INSIDE = "tabane"
"""The last label of the names by which instances call apps."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(App).decode


def routed(app: App) -> App:
    """What gateways have to know of it; all else is as of an app that says nothing."""
    return App(
        name=app.name,
        image="",
        namespace=app.namespace,
        revision=app.revision,
        isolation=app.isolation,
        port=app.port,
        hosts=app.hosts,
        protocol=app.protocol,
        tcp=app.tcp,
        resources=app.resources,
        reactive=app.reactive,
        placement=app.placement,
        pinned_to=app.pinned_to,
        owner=app.owner,
    )


class Routes:
    """See the module's text."""

    def __init__(self) -> None:
        self._packed: dict[AppName, bytes] = {}
        self._hosts: dict[str, AppName] = {}
        self._ports: dict[int, AppName] = {}
        self._apps: dict[AppName, App] = {}
        """Warm ones, by cohort; the same of what is below."""
        self._by_host: dict[str, Route] = {}
        self._by_port: dict[int, TcpRoute] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def put(self, app: App) -> None:
        """It is new, or has changed."""
        key = app.key
        self.drop(key)
        self._packed[key] = _pack(app)
        if app.port is not None:
            self._hosts.update(dict.fromkeys(app.hosts, key))
        self._ports.update({tcp.port: key for tcp in app.tcp})
        for host in app.hosts:
            self._by_host.pop(host, None)
        for tcp in app.tcp:
            self._by_port.pop(tcp.port, None)

    def drop(self, key: AppName) -> None:
        """It is no more; nothing, when it is not known."""
        if (packed := self._packed.pop(key, None)) is None:
            return
        old = _unpack(packed)
        for host in (*old.hosts, *internal_names(old)):
            if self._hosts.get(host) == key:
                del self._hosts[host]
            if (route := self._by_host.get(host)) is not None and _is_of(key, route):
                del self._by_host[host]
        for tcp in old.tcp:
            if self._ports.get(tcp.port) == key:
                del self._ports[tcp.port]
                self._by_port.pop(tcp.port, None)
        for each in (old, *old.cohorts()):
            self._apps.pop(each.cohort, None)

    def known(self) -> frozenset[AppName]:
        return frozenset(self._packed)

    def app(self, cohort: AppName) -> App | None:
        """An app, or a cohort of one."""
        found = self._apps.get(cohort)
        return found if found is not None else self._unpack(cohort)

    def route(self, host: str) -> Route | None:
        """Where an app's host name leads, or the name by which instances call it."""
        found = self._by_host.get(host)
        return found if found is not None else self._find(host)

    def tcp_route(self, port: int) -> TcpRoute | None:
        found = self._by_port.get(port)
        return found if found is not None else self._find_port(port)

    def is_app(self, host: str) -> bool:
        """Whether a name is one of an app's, whatever that speaks."""
        if host in self._hosts:
            return True
        app = self.app(key) if (key := _called(host)) in self._packed else None
        return app is not None and app.takes_sessions

    def _unpack(self, cohort: AppName) -> App | None:
        key = AppName(cohort.partition("@")[0])
        if (packed := self._packed.get(key)) is None:
            return None
        app = _unpack(packed)
        for each in (app, *app.cohorts()):
            if each.cohort == cohort:
                return _keep(self._apps, cohort, each)
        return None

    def _find(self, host: str) -> Route | None:
        key = self._hosts.get(host) or _called(host)
        app = self.app(key) if key in self._packed else None
        if app is None or app.port is None:
            return None
        return _keep(self._by_host, host, route_to(app))

    def _find_port(self, port: int) -> TcpRoute | None:
        if (key := self._ports.get(port)) is None or (app := self.app(key)) is None:
            return None
        tcp = next(each for each in app.tcp if each.port == port)
        route = TcpRoute(route_to(app), tcp.session_idle_s, tcp.proxy_protocol)
        return _keep(self._by_port, port, route)


def route_to(app: App, hops: int = 0) -> Route:
    reactive = app.reactive
    return Route(
        app.cohort,
        app.revision,
        reactive.start_timeout_s,
        reactive.response_timeout_s,
        hops,
        by_caller=app.isolation is Class.AUTO and app.trust is None,
    )


def internal_names(app: App) -> tuple[str, ...]:
    """The names by which other apps call it, besides its hosts."""
    names = [f"{app.name}.{app.namespace}.{INSIDE}"]
    if app.namespace == "default":
        names.append(f"{app.name}.{INSIDE}")
    return tuple(names) if app.takes_sessions else ()


def _called(host: str) -> AppName:
    """The app that has this internal name, if there is one of it; empty for any other name."""
    match host.split("."):
        case [name, "tabane"]:
            return AppName(f"default/{name}")
        case [name, namespace, "tabane"]:
            return AppName(f"{namespace}/{name}")
    return AppName("")


def _is_of(key: AppName, route: Route) -> bool:
    return app_of_cohort(route.app)[0] == key


def _keep(warm: dict[K, V], key: K, value: V) -> V:
    if len(warm) >= WARM:
        del warm[next(iter(warm))]
    warm[key] = value
    return value
