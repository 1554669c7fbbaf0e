"""What a node answers to each question, with all that could do harm to a terminal."""

from __future__ import annotations

from typing import Any

from tests.tools.conftest import EVIL, reply

from tabane.api.frames import ERROR, EXIT, OUTPUT, encode, encode_number

APP = {
    "namespace": "default",
    "name": "hello",
    "class": "container",
    "image": EVIL,
    "digest": "sha256:" + EVIL,
    "changed": True,
    "warnings": [],
    "services": {},
    "command": [EVIL],
    "hosts": [EVIL],
    "port": 80,
    "revision": 1,
    "ready": 0,
    "instances": 1,
    "reactive": {"min": 0, "max": 1},
    "known": [EVIL],
    "unreachable": [],
}
INSTANCE = {
    "id": "abc123",
    "app": "default/hello",
    "node": "tokyo/tokyo-1",
    "state": "ready",
    "revision": 1,
    "driver": EVIL,
    "address": EVIL,
    "created_at": 0.0,
    "age_s": 42.3,
    "reason": EVIL,
}
EVENT = {"at": 0.0, "instance": "abc123", "app": "default/hello", "state": "failed", "reason": EVIL}
EVENT |= {"node": "tokyo/tokyo-1"}
WAKE = EVENT | {"option": EVIL, "total_us": 5, "phases_us": {}, "outcome": EVIL, "gateway": EVIL}
HOME = {
    "home": EVIL,
    "waiting": 0,
    "waits_for": EVIL,
    "reason": EVIL,
    "failures": 1,
    "trouble": EVIL,
}
HOME |= {"problem": EVIL, "callers": EVIL, "placement": [EVIL]}
DRIVER = {"driver": EVIL, "class": EVIL, "works": False, "reason": EVIL, "emulated": False}
DRIVER |= {"detail": EVIL, "defaults": [{"default": EVIL, "enforced": True, "how": EVIL}]}
IMAGE = {"node": "tokyo/tokyo-1", "digest": "sha256:" + "a" * 64, "kind": EVIL, "source": EVIL}
IMAGE |= {"sources": [EVIL]}
IMAGE |= {"bytes": 5, "unpacked_bytes": 5, "used_at": 0.0, "apps": [EVIL], "instances": []}
CHECKPOINT = {"node": "tokyo/tokyo-1", "digest": "sha256:" + "b" * 64, "revision": 3}
CHECKPOINT |= {"isolation": "container", "driver": EVIL, "bytes": 5, "disk_bytes": 5, "users": 0}
CHECKPOINT |= {"app": "default/hello", "instance": "abc123", "is_warm": True, "is_wanted": False}
CHECKPOINT |= {"made_at": 0.0, "used_at": 0.0}
VAULT = {"node": "tokyo/tokyo-1", "used_bytes": 5, "limit_bytes": 10, "problem": EVIL}
VAULT |= {"memory_used_bytes": 5, "memory_limit_bytes": 10, "quarantined": 0}
STORE = {"node": "tokyo/tokyo-1", "used_bytes": 5, "limit_bytes": 10}
TRIGGER = {"app": "default/hello", "name": EVIL, "cron": EVIL, "room": "", "request": EVIL}
MEMBER = {"node": EVIL, "gateway": EVIL, "asked": False, "linked": True, "control": True}
MEMBER |= {"drivers": [EVIL], "instances": 3}
ENDED = encode(OUTPUT, b"\x1b[2J\x1b") + encode(ERROR, b"\xff") + encode_number(EXIT, 7)
ANSWERS: dict[str, Any] = {
    "GET /api/v1/apps": {"apps": [APP], "silent": []},
    "POST /api/v1/apps": APP,
    "POST /api/v1/apps/default/hello/scale": APP,
    "DELETE /api/v1/apps/default/hello": {"name": EVIL, "known": [EVIL], "unreachable": []},
    "GET /api/v1/apps/default/hello": {
        "app": APP,
        "instances": [INSTANCE],
        "advice": [EVIL],
        "homes": [HOME],
        "events": [EVENT],
        "wakes": [WAKE],
        "silent": [],
    },
    "GET /api/v1/instances": {"instances": [INSTANCE], "silent": []},
    "POST /api/v1/instances/abc123/stop": {"instance": "abc123", "state": "draining"},
    "GET /api/v1/events": {"records": [EVENT], "silent": []},
    "GET /api/v1/wakes": {"records": [WAKE], "silent": []},
    "GET /api/v1/members": {"members": [MEMBER], "silent": []},
    "GET /api/v1/images": {"images": [IMAGE], "stores": [STORE], "silent": []},
    "GET /api/v1/checkpoints": {"checkpoints": [CHECKPOINT], "stores": [VAULT], "silent": []},
    "GET /api/v1/triggers": {"triggers": [TRIGGER], "silent": []},
    "GET /api/v1/doctor": {"node": EVIL, "drivers": [DRIVER]},
    "POST /api/v1/instances/abc123/exec": ENDED,
    "GET /api/v1/instances/abc123/log": b"2026-01-31T23:59:59.1Z stdout F \x1b[2J\xff\n",
    "GET /v2/processes": {"processes": [], "nodes": [], "silent": []},
}


def answer(line: str, body: bytes) -> bytes:
    method, target = line.split()[:2]
    return reply(ANSWERS[f"{method} {target.partition('?')[0]}"])
