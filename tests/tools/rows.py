"""Processes as nodes tell them."""

from __future__ import annotations

from typing import Any

ROW: dict[str, Any] = {
    "dc": "tokyo",
    "node": "tokyo-1",
    "incarnation": "i-1",
    "namespace": "default",
    "app": "default/hello",
    "instance": "abc123",
    "container": "",
    "class": "container",
    "inside": "",
    "pid": 42,
    "ppid": 1,
    "pgrp": 42,
    "session": 42,
    "tpgid": -1,
    "uid": 33,
    "user": "www-data",
    "gid": 33,
    "group": "www-data",
    "ruid": 33,
    "start_ticks": 100,
    "started_at": 1_699_996_400.0,
    "name": "httpd",
    "command": "httpd -f -p 8000",
    "tty": "?",
    "state": "S",
    "stat": "Ss",
    "flags": 0x400100,
    "processor": 1,
    "nice": 0,
    "priority": 20,
    "policy": 0,
    "rt_priority": 0,
    "threads": 1,
    "cpu_percent": 1.5,
    "recent_cpu_percent": None,
    "cpu_s": 3725.4,
    "memory_percent": 0.2,
    "vsz_kib": 4096,
    "rss_kib": 812,
    "minor_faults": 10,
    "major_faults": 0,
    "elapsed_s": 3600.0,
}
HOST = ROW | {
    "dc": "osaka",
    "node": "osaka-1",
    "incarnation": "i-2",
    "namespace": "",
    "app": "",
    "instance": "",
    "class": "",
    "pid": 7,
    "pgrp": 7,
    "session": 7,
    "uid": 0,
    "user": "root",
    "gid": 0,
    "group": "root",
    "ruid": 0,
}


def row(**fields: Any) -> dict[str, Any]:
    return ROW | fields
