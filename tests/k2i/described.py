"""Requests made of a service's description, and those that it forbids: what they are answered."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.k2i.test_cli import Service

CASES = 10
"""Of requests as described for each route, and as many of others."""
LONGEST_REQUEST = 50_000
"""Much longer ones are not read to their end."""
UNTRUE = [positive_data_acceptance]
"""Not checked: which values go ill together, or name a signal or a resource, is not described."""


def check_answers(operation: Any, mode: schemathesis.GenerationMode, service: Service) -> None:
    """That all answers to requests of that mode are as the operation's description says."""
    base = f"http://127.0.0.1:{service.port}"

    @seed(1)
    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        assume(len(case.as_curl_command()) < LONGEST_REQUEST)
        case.call_and_validate(base_url=base, excluded_checks=UNTRUE)

    ask()
