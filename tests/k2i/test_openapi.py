"""The description of `/v2` is true: for requests made of it, and for those it forbids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from tests.k2i.described import check_answers
from tests.k2i.test_cli import Service, serve

from tabane.k2i.kinds import KINDS

AS_ROOT = """
from tabane.k2i import api, cli
from tabane.security.identity import Principal
api.ANYBODY = Principal("peer", 0)
cli.main()
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A k2i that takes everybody for root."""
    yield from serve(program=[sys.executable, "-c", AS_ROOT])


@pytest.fixture(scope="module")
def described(service: Service) -> Any:
    return schemathesis.openapi.from_dict(service.get("/openapi.json"))


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_as_described(
    kind: str, mode: schemathesis.GenerationMode, described: Any, service: Service
) -> None:
    check_answers(described[f"/v2/{kind}"]["GET"], mode, service)


def test_every_route_is_described(service: Service) -> None:
    paths = service.get("/openapi.json")["paths"]
    assert {f"/v2/{kind}" for kind in KINDS} | {"/v2/changes"} <= paths.keys()
    for kind in KINDS:
        route = paths[f"/v2/{kind}"]["get"]
        assert route["responses"].keys() >= {"200", "400", "401"}
        assert {parameter["name"] for parameter in route["parameters"]} == {
            "scope",
            *KINDS[kind].parameters,
        }
