"""The gateway's table of apps: small for those without sessions, and right for all."""

import gc
import sys

from msgspec.structs import replace

from tabane.gateway import routes
from tabane.gateway.routes import Routes, routed
from tabane.model import App, AppName, Class, Reactive, Resources, TcpPort, Trust, name_cohort

BYTES_AN_APP = 700
"""Of one with a host name, in a gateway that has no session for it."""


def make_app(number: int) -> App:
    return App(
        f"app-{number}",
        "sha256:" + "0" * 64,
        command=("serve", "--port", "8000"),
        env={"TOKEN": "x" * 200},
        port=8000,
        hosts=(f"app-{number}.test",),
        resources=Resources(memory_bytes=64 << 20),
        reactive=Reactive(stop_after_s=3600.0),
        revision=1,
        id_base=1 << 24,
        deployed_at=1.5,
    )


def test_what_gateways_are_told_of_an_app_says_where_it_leads_and_not_what_it_runs() -> None:
    app = replace(make_app(1), tcp=(TcpPort(25, 2525),), owner=7, isolation=Class.AUTO)
    told = routed(app)
    assert (told.key, told.hosts, told.tcp, told.owner) == (app.key, app.hosts, app.tcp, 7)
    assert (told.isolation, told.reactive, told.resources) == (
        app.isolation,
        app.reactive,
        app.resources,
    )
    assert told.image == "" and not told.command and not told.env and not told.id_base


def test_an_app_without_sessions_is_some_hundred_bytes() -> None:
    count = 2000
    table = Routes()
    gc.collect()
    before, objects = sys.getallocatedblocks(), len(gc.get_objects())
    for number in range(count):
        table.put(routed(make_app(number)))
    gc.collect()
    assert len(gc.get_objects()) - objects < 50, "none of them is an object that is looked through"
    assert sys.getallocatedblocks() - before < 4 * count, "its key, its host, its text"
    (packed,) = {len(table._packed[AppName(f"default/app-{n}")]) for n in range(1000, count)}
    assert packed + 2 * 80 + 3 * 33 + 100 < BYTES_AN_APP


def test_what_was_used_of_it_is_bounded() -> None:
    table = Routes()
    for number in range(2 * routes.WARM):
        table.put(routed(make_app(number)))
        route = table.route(f"app-{number}.test")
        assert route is not None and route.app == f"default/app-{number}"
    assert len(table._by_host) == len(table._apps) == routes.WARM
    first = table.route("app-0.test")
    assert first is not None and first.app == "default/app-0"


def test_names_that_no_app_has_leave_nothing_behind() -> None:
    table = Routes()
    table.put(routed(make_app(1)))
    for host in ("", "tabane", "a.b.c.tabane", "nobody.tabane", "x.y.tabane", "app-1.other.tabane"):
        assert table.route(host) is None and not table.is_app(host)
    assert not table._by_host and not table._apps
    assert table.app(AppName("default/app-1@nobody")) is None


def test_a_removed_or_changed_app_leaves_no_route_behind() -> None:
    table, app = Routes(), replace(make_app(1), tcp=(TcpPort(25, 2525),))
    names = ("app-1.test", "app-1.tabane", "app-1.default.tabane")
    table.put(app)
    assert all(table.route(name) and table.is_app(name) for name in names)
    assert table.tcp_route(25) is not None
    table.put(replace(app, revision=2, hosts=("other.test",), tcp=()))
    assert table.route("app-1.test") is None and table.tcp_route(25) is None
    for name in ("other.test", *names[1:]):
        found = table.route(name)
        assert found is not None and found.revision == 2
    table.drop(app.key)
    table.drop(app.key)
    assert not any(table.route(name) or table.is_app(name) for name in ("other.test", *names))
    assert table.app(app.key) is None and len(table) == 0


def test_a_host_that_another_app_takes_leads_there_at_once() -> None:
    table, first = Routes(), make_app(1)
    table.put(first)
    assert table.route("app-1.test") is not None
    table.put(replace(make_app(2), hosts=("app-1.test",)))
    found = table.route("app-1.test")
    assert found is not None and found.app == "default/app-2"
    table.drop(first.key)
    assert table.route("app-1.test") == found, "it is not the first one's any more"


def test_an_app_of_tcp_alone_has_a_name_and_no_route() -> None:
    table = Routes()
    table.put(App("mail", "", tcp=(TcpPort(25, 25, session_idle_s=9.0),)))
    assert table.is_app("mail.tabane") and table.route("mail.tabane") is None
    found = table.tcp_route(25)
    assert found is not None and found.session_idle_s == 9.0
    assert table.tcp_route(26) is None


def test_cohorts_are_found_by_their_names_and_go_with_their_app() -> None:
    table, app = Routes(), replace(make_app(1), isolation=Class.AUTO)
    table.put(routed(app))
    trusted = table.app(name_cohort(app.key, Trust.TRUSTED))
    assert trusted is not None and trusted.trust is Trust.TRUSTED
    route = table.route("app-1.test")
    assert route is not None and route.by_caller
    table.put(routed(replace(app, isolation=Class.SANDBOX)))
    assert table.app(name_cohort(app.key, Trust.TRUSTED)) is None
    route = table.route("app-1.test")
    assert route is not None and not route.by_caller
