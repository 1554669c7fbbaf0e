"""Whatever a request says, the answer is a status and one sentence, and nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.api.conftest import Api

from tabane.api import frames
from tabane.images import ImageStore
from tabane.runtimes.fake import FakeDriver


@pytest.mark.parametrize(
    "body", [{"min": 10**30}, {"max": 1_000_001}, {"min": True}, {"max": 2.0}, {"min": "1"}]
)
async def test_scaling_to_what_is_no_number_of_instances(api: Api, body: dict[str, Any]) -> None:
    answer = await api.ask("POST", "/api/v1/apps/default/hello/scale", body)
    assert answer.status == 400
    assert answer.json()["error"] == "usage"


async def test_bodies_are_json_as_curl_sends_them_too(api: Api) -> None:
    form = "application/x-www-form-urlencoded"
    for path, body in (("/api/v1/apps/default/hello/scale", {"min": -1}), (EXEC, {"argv": []})):
        as_json = await api.ask("POST", path, body)
        as_form = await api.ask("POST", path, body, media_type=form)
        assert as_form == as_json
        assert "dictionary" not in as_form.json()["message"]


async def test_the_way_from_the_root(api: Api) -> None:
    answer = await api.ask("GET", "/")
    assert answer.status == 200
    for path in (answer.json()["v1"], answer.json()["description"]):
        assert (await api.ask("GET", path)).status == 200
    assert {answer.json()["api"], answer.json()["v2"]} <= set(
        (await api.ask("GET", "/openapi.json")).json()["paths"]
    )


NO_IMAGE = "sha256:" + "0" * 64
EXEC, COPY = "/api/v1/instances/abc/exec", "/api/v1/instances/abc/copy"


@pytest.mark.parametrize(
    ("status", "method", "path", "body"),
    [
        (400, "GET", "/api/v1/instances/%2e%2e/log", None),
        (400, "GET", "/api/v1/instances/" + "a" * 5000 + "/log", None),
        (400, "GET", "/api/v1/instances/%00/log", None),
        (400, "POST", "/api/v1/instances/%2e/stop", None),
        (400, "POST", EXEC, {"argv": ["\ud800"]}),
        (400, "POST", EXEC, {"argv": ["a\0b"]}),
        (400, "POST", EXEC, {"argv": ["x" * 200_000]}),
        (400, "POST", EXEC, {"argv": ["x" * 100_000] * 20}),
        (400, "POST", EXEC, {"argv": []}),
        (400, "POST", EXEC, {"argv": ["true"], "user": "\ud800"}),
        (400, "POST", EXEC, {"argv": ["true"], "workdir": "/a\0b"}),
        (400, "POST", EXEC, {"argv": ["true"], "timeout_s": True}),
        (400, "POST", EXEC, {"argv": "true"}),
        (400, "POST", EXEC, ["true"]),
        (400, "POST", EXEC, {"argv": ["true"], "timeout_s": -1}),
        (400, "POST", EXEC, {"argv": ["true"], "env": {"A=B": "c"}}),
        (400, "POST", EXEC, {"argv": ["true"], "env": {"": "c"}}),
        (400, "POST", EXEC, {"argv": ["true"], "env": {"A": "\0"}}),
        (400, "POST", EXEC, {"argv": ["true"], "terminal": {"rows": 0, "columns": 80}}),
        (400, "POST", EXEC, {"argv": ["true"], "terminal": {"rows": 1, "columns": 1 << 16}}),
        (400, "POST", COPY, {"path": "relative", "inward": True}),
        (400, "POST", COPY, {"path": "/a\0b", "inward": False}),
        (400, "POST", COPY, {"path": "/a"}),
        (400, "GET", "/api/v1/instances/abc/log?since=yesterday", None),
        (400, "GET", "/api/v1/instances/abc/log?since=2026-13-01T00:00:00Z", None),
        (400, "GET", "/api/v1/instances/abc/log?tail=x", None),
        (400, "POST", "/api/v1/apps", {"text": "\ud800", "image": "host"}),
        (400, "POST", "/api/v1/apps", {"text": "x", "image": "host", "file": "\ud800"}),
        (400, "GET", "/api/v1/images/host", None),
        (400, "GET", "/api/v1/images/%2e%2e", None),
        (400, "GET", "/api/v1/images/sha256:" + "0" * 63, None),
        (404, "GET", "/api/v1/images/sha256:" + "0" * 64, None),
        (400, "POST", "/api/v1/images", "garbage"),
        (400, "POST", "/api/v1/images?size=x", "garbage"),
        (400, "GET", "/api/v1/images/sha256:0/description", None),
        (400, "GET", "/api/v1/blobs/..", None),
        (404, "GET", "/api/v1/blobs/sha256:" + "0" * 64, None),
        (400, "DELETE", "/api/v1/images/all", None),
        (400, "POST", "/api/v1/images/pull", {}),
        (400, "POST", "/api/v1/images/pull", {"source": "nginx"}),
        (400, "POST", "/api/v1/images/pull", {"source": "docker://r.test/a", "auth": "{}"}),
        (400, "POST", "/api/v1/images/pull", {"source": "docker://r.test/a", "auth": "\ud800"}),
        (400, "POST", "/api/v1/images/pull", {"source": "docker://r.test/a", "more": 1}),
        (400, "POST", "/api/v1/images/pull", {"digest": "sha256:" + "0" * 63}),
        (400, "POST", "/api/v1/images/push", {"digest": "x", "target": "docker://r.test/a"}),
        (400, "POST", "/api/v1/images/push", {"digest": NO_IMAGE, "target": "oci:x"}),
        (404, "POST", "/api/v1/images/push", {"digest": NO_IMAGE, "target": "docker://r.test/a"}),
        (400, "POST", "/api/v1/images/gc", {"dry_run": "yes"}),
        (400, "GET", "/api/v1/checkpoints/all/description", None),
        (400, "DELETE", "/api/v1/checkpoints/sha256:0", None),
        (400, "POST", "/api/v1/checkpoints/gc", {"dry_run": False, "more": 1}),
        (404, "GET", "/nothing", None),
        (405, "DELETE", "/api/v1/members", None),
        (400, "GET", "/api/v1/wakes?limit=x", None),
    ],
)
async def test_what_cannot_be(
    api: Api, tmp_path: Path, status: int, method: str, path: str, body: Any
) -> None:
    store = ImageStore(tmp_path / "images")
    take = lambda blocks, name, size: store.import_layout(blocks, name)  # noqa: E731
    api.agent.images = SimpleNamespace(store=store, take=take)
    if path in (EXEC, COPY):
        begin = frames.encode(frames.BEGIN, json.dumps(body).encode())
        answer = await api.ask(method, path, raw=begin)
    else:
        answer = await api.ask(method, path, body)
    assert answer.status == status, answer.body
    said = answer.json()
    assert said["error"] == ("not_found" if status == 404 else "usage")
    assert 0 < len(said["message"]) < 500
    assert "Traceback" not in said["message"]


async def test_an_image_that_is_no_digest_is_not_looked_for(api: Api, tmp_path: Path) -> None:
    api.agent.images = SimpleNamespace(store=ImageStore(tmp_path / "images"))
    api.agent.engines = SimpleNamespace(drivers={"fake": FakeDriver()})
    text = 'name = "a"\nimage = "oci:dir"\ncommand = ["x"]\n'
    body = {"text": text, "image": "sha256:../../x"}
    answer = await api.ask("POST", "/api/v1/apps", body)
    assert (answer.status, answer.json()["error"]) == (400, "usage")
    assert "is not a digest" in answer.json()["message"]


async def test_a_mistake_of_the_node_is_one_sentence_and_in_its_log(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await api.ask("GET", "/api/v1/members")  # this agent has none
    assert (answer.status, answer.json()["error"]) == (500, "fault")
    assert "GET /api/v1/members failed" in caplog.text
    assert "Traceback" in caplog.text
