"""WebAssembly apps in a cluster: deployed from a file, woken by a request, gone when idle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import LocalCluster, wait_for

from tabane.testing.wasm import compile_wasm

pytestmark = pytest.mark.real

SOURCES = Path(__file__).parent / "wasm"
APP = """
name = "{name}"
class = "unikernel"
image = "wasm:{program}.wasm"
port = 8080
hosts = ["{name}.test"]
[resources]
memory = "32MiB"
[reactive]
stop_after = "{stop_after}"
response_timeout = "2s"
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def deploy(cluster: LocalCluster, place: Path, name: str, stop_after: str = "1h") -> None:
    compile_wasm(SOURCES / "cgi.c", place / "cgi.wasm")
    file = place / f"{name}.toml"
    file.write_text(APP.format(name=name, program="cgi", stop_after=stop_after))
    done = cluster.tabane("deploy", str(file))
    assert done.code == 0, done.err


def rows_inside(cluster: LocalCluster, app: str) -> list[dict[str, Any]]:
    out = cluster.tabane("ps", "--json", "--app", app).out
    found: list[dict[str, Any]] = json.loads(out)["processes"]
    return [row for row in found if row.get("inside")]


def test_the_life_of_a_wasm_app(cluster: LocalCluster, tmp_path: Path) -> None:
    deploy(cluster, tmp_path, "small")
    answer = cluster.get("small", path="/")
    assert answer.status == 200 and "request 1\n" in answer.body
    assert "request 1\n" in cluster.get("small", path="/").body
    (instance,) = cluster.instances("small")
    assert (instance["isolation"], instance["driver"]) == ("unikernel", "wasmtime")
    wake, *_ = cluster.records("wakes", "small")
    assert wake["option"] == "cold" and wake["phases_us"]["engine"] > 0

    assert "served /" in cluster.tabane("logs", instance["id"]).err
    entered = cluster.tabane("exec", instance["id"], "--", "sh")
    assert entered.code and "no command can be run in a unikernel" in entered.err
    row, *_ = wait_for(lambda: rows_inside(cluster, "small"), "the program in the table")
    assert (row["class"], row["inside"], row["name"]) == ("unikernel", "wasm", "cgi.wasm")

    assert cluster.get("small", path="/loop").status in (503, 504)
    assert cluster.get("small", path="/").status == 200
    assert cluster.tabane("stop", instance["id"]).code == 0
    wait_for(lambda: not cluster.instances("small"), "its end")


def test_it_goes_when_it_is_idle_and_comes_back(cluster: LocalCluster, tmp_path: Path) -> None:
    deploy(cluster, tmp_path, "brief", stop_after="300ms")
    assert cluster.get("brief", path="/").status == 200
    wait_for(lambda: not cluster.instances("brief"), "its end")
    assert "request 1\n" in cluster.get("brief", path="/").body
    wait_for(lambda: not cluster.instances("brief"), "its end again")
    assert not any(event["state"] == "failed" for event in cluster.records("events", "brief"))


def test_a_foreign_import_is_said_to_who_asks(cluster: LocalCluster, tmp_path: Path) -> None:
    source = tmp_path / "foreign.c"
    source.write_text(
        '__attribute__((import_module("env"), import_name("launch"))) void launch(void);\n'
        "int main(void) { launch(); return 0; }\n"
    )
    compile_wasm(source, tmp_path / "foreign.wasm")
    file = tmp_path / "foreign.toml"
    file.write_text(APP.format(name="foreign", program="foreign", stop_after="1h"))
    assert cluster.tabane("deploy", str(file)).code == 0
    answer = cluster.get("foreign", path="/")
    assert answer.status == 503 and "imports function env.launch" in answer.body
    wait_for(lambda: not cluster.instances("foreign"), "its end")
