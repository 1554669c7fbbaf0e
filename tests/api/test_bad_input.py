"""Whatever a request says, the answer is a status and one sentence, and nothing else happens."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.conftest import Api


@pytest.mark.parametrize(
    "body", [{"min": 10**30}, {"max": 1_000_001}, {"min": True}, {"max": 2.0}, {"min": "1"}]
)
async def test_scaling_to_what_is_no_number_of_instances(api: Api, body: dict[str, Any]) -> None:
    answer = await api.ask("POST", "/api/v1/apps/default/hello/scale", body)
    assert answer.status == 400
    assert answer.json()["error"] == "usage"
