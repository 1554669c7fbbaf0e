"""What is allowed and yet hardly meant."""

from __future__ import annotations

import pytest

from tabane.api.advice import advise
from tabane.model import App, Placement, Reactive, SecurityPolicy

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
