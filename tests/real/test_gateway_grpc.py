"""gRPC's own server and client, with the gateway in between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.real.gateways import Place, free_port, gateway_before, running

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
HOST = "grpc.test"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    port = free_port()
    with (
        running(sys.executable, str(HERE / "grpc_server.py"), str(port)),
        gateway_before(tmp_path, {HOST: (port, "h2c")}) as place,
    ):
        yield place


def call(place: Place, *names: str, authority: str = HOST) -> dict[str, Any]:
    """What a client got from these calls."""
    argv = (sys.executable, str(HERE / "grpc_client.py"), f"127.0.0.1:{place.port}", authority)
    done = subprocess.run([*argv, *names], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_calls_of_all_kinds_pass_with_metadata_and_statuses(place: Place) -> None:
    found = call(place, "echo", "big", "total", "count", "shout", "refuse", "unknown")
    assert found == {
        "echo": ["hello", "7", "1", [0, 1]],
        "big": [1 << 24, True],
        "total": "5000000",
        "count": True,
        "shout": ["ONE", "TWO", "THREE"],
        "refuse": ["FAILED_PRECONDITION", "not so: ünïcode", "because"],
        "unknown": ["UNIMPLEMENTED", "Method not found!"],
    }
    ended = place.finish()
    assert (ended["held"], ended["released_once"]) == (0, True)


def test_a_deadline_is_told_to_the_server_and_nobody_waits_for_a_slow_reader(place: Place) -> None:
    call(place, "echo")
    before = place.peak_bytes()
    found = call(place, "deadline", "slow_reader")
    assert found == {"deadline": ["DEADLINE_EXCEEDED", "yes"], "slow_reader": True}
    assert place.peak_bytes() - before < 8 << 20
    assert place.finish()["held"] == 0


def test_what_the_gateway_says_itself_comes_as_a_status(place: Place) -> None:
    found = call(place, "unknown", authority="other.test")
    assert found["unknown"] == ["UNIMPLEMENTED", "no app has the host name 'other.test'"]
