"""The description of the routes that change something is true; nothing is changed to see that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from tests.k2i.described import check_answers
from tests.k2i.test_cli import Service, serve

from tabane.k2i.control_api import VERBS

PATHS = [
    *(f"/v2/processes/{verb}" for verb in VERBS),
    *(f"/v2/processes/{{pid}}/{verb}" for verb in VERBS),
    *(f"/v2/instances/{{instance}}/{verb}" for verb in ("pause", "resume", "limits")),
]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    program = str(Path(__file__).with_name("pretending.py"))
    yield from serve(program=[sys.executable, program])


@pytest.fixture(scope="module")
def described(service: Service) -> Any:
    return schemathesis.openapi.from_dict(service.get("/openapi.json"))


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_described(
    path: str, mode: schemathesis.GenerationMode, described: Any, service: Service
) -> None:
    check_answers(described[path]["POST"], mode, service)
