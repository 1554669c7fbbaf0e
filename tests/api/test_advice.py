"""What is allowed and yet hardly meant."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tabane.api.advice import advise, doubt
from tabane.model import App, Class, NodeName, Placement, Reactive, Resources, SecurityPolicy
from tabane.runtimes.runsc.driver import RunscDriver
from tabane.scheduler.engines import EngineView
from tabane.scheduler.placement import NodeView

THERE = ("tokyo", "osaka")


def app(*datacenters: str, port: int | None = 80, least: int = 0) -> App:
    placement = Placement(datacenters or ("*",))
    return App("hello", "host", port=port, placement=placement, reactive=Reactive(min=least))


@pytest.mark.parametrize("meant", [app(), app("tokyo"), app("*", "osaka"), app(port=None, least=1)])
def test_nothing_to_say(meant: App) -> None:
    assert advise(meant, THERE) == []


def test_a_data_center_that_is_not_there() -> None:
    said = "placement.datacenters: there is no data center kyoto (there are: tokyo, osaka)"
    assert advise(app("kyoto"), THERE) == [f"{said}, so it can run nowhere"]
    assert advise(app("kyoto", "osaka"), THERE) == [said]


def test_what_nothing_ever_starts() -> None:
    (said,) = advise(app(port=None), THERE)
    assert "nothing ever starts it" in said


def test_a_capability_that_undoes_other_defaults() -> None:
    policy = SecurityPolicy(("CAP_NET_RAW", "CAP_SYS_ADMIN"))
    (said,) = advise(App("hello", "host", port=80, security=policy), THERE)
    assert said.startswith("security.capabilities: with CAP_SYS_ADMIN")


def view(node: str, *engines: EngineView, memory: int | None = None) -> NodeView:
    return NodeView(NodeName(node), engines, memory_available_bytes=memory)


BROKEN = EngineView("firecracker", Class.MICROVM, broken="firecracker is not installed")
QEMU = EngineView("qemu-microvm", Class.MICROVM, emulated=True)
RUNC = EngineView("runc", Class.CONTAINER)


def test_what_no_node_can_run_is_doubted_with_what_is_in_the_way_on_each() -> None:
    asked = App("hello", "sha256:1", isolation=Class.MICROVM)
    nodes = [view("tokyo/a", RUNC, BROKEN), view("osaka/a", QEMU), view("osaka/b", QEMU)]
    (said,) = doubt(asked, nodes)
    assert said == (
        "no node can run it now (tokyo/a: firecracker does not work: firecracker is not installed; "
        "osaka/a, osaka/b: qemu-microvm could only emulate a processor, "
        "which neither app nor node allow (allow_emulation))"
    )
    assert doubt(replace(asked, allow_emulation=True), nodes) == []


def test_what_a_sandbox_can_never_have_is_said_before_it_is_started() -> None:
    security = SecurityPolicy(capabilities=("CAP_SYS_ADMIN",))
    asked = App("hello", "host", isolation=Class.SANDBOX, security=security)
    runsc = EngineView("runsc", Class.SANDBOX, refuses=RunscDriver.capabilities.refuses)
    (said,) = doubt(asked, [view("tokyo/a", runsc)])
    assert "runsc cannot hold the number of processes in a sandbox with CAP_SYS_ADMIN" in said


def test_where_it_may_not_run_nothing_more_is_said() -> None:
    asked = App("hello", "host", isolation=Class.VM, placement=Placement(("kyoto",)))
    assert doubt(asked, [view("tokyo/a", RUNC)]) == []
    assert len(doubt(asked, [view("tokyo/a", RUNC), view("kyoto/a", RUNC)])) == 1


def test_more_memory_than_any_node_has_is_doubted() -> None:
    asked = App("hello", "host", resources=Resources(memory_bytes=1 << 40))
    (said,) = doubt(asked, [view("tokyo/a", RUNC, memory=1 << 30)])
    assert "tokyo/a: has 1024 MiB of memory available, 1048576 are needed" in said


def test_a_kind_of_callers_that_nothing_is_for_is_named() -> None:
    (said,) = doubt(App("hello", "host", isolation=Class.AUTO), [view("tokyo/a", RUNC)])
    assert said.startswith("no node can run it now for anonymous callers (tokyo/a: has nothing")
