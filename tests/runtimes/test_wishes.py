"""What an engine can never give."""

from __future__ import annotations

import pytest

from tabane.errors import Unsupported
from tabane.model import App, SecurityPolicy
from tabane.runtimes.wishes import check_wishes, refusal

REFUSES = {
    "CAP_SYS_ADMIN": "cannot hold it",
    "CAP_SYS_RESOURCE": "cannot hold it",
    "workdir": "has no directories",
    "port": "has no network",
}


def make_app(*capabilities: str, port: int | None = None, workdir: str = "") -> App:
    security = SecurityPolicy(capabilities=capabilities)
    return App("app", "image", port=port, workdir=workdir, security=security)


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (make_app(), ""),
        (make_app("CAP_NET_RAW"), ""),
        (make_app("CAP_NET_RAW", "CAP_SYS_ADMIN"), "cannot hold it"),
        (make_app("CAP_SYS_RESOURCE", "CAP_SYS_ADMIN"), "cannot hold it"),
        (make_app("CAP_SYS_ADMIN", workdir="/"), "cannot hold it, and has no directories"),
        (make_app(port=80), "has no network"),
    ],
)
def test_only_what_is_asked_for_is_refused_and_each_reason_said_once(app: App, reason: str) -> None:
    assert refusal(app, REFUSES) == reason


def test_some_give_no_capabilities_at_all() -> None:
    refuses = {"capabilities": "gives none"}
    assert refusal(make_app("CAP_NET_RAW"), refuses) == "gives none"
    assert refusal(make_app(), refuses) == ""


def test_a_driver_refuses_with_its_name() -> None:
    check_wishes(make_app(), "runsc", REFUSES)
    with pytest.raises(Unsupported, match=r"^default/app: runsc has no network$"):
        check_wishes(make_app(port=80), "runsc", REFUSES)
